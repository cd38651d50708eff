"""The comparison with llama.cpp: both sides get the same importance matrix, and different tensors are noticed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from benchmarks.export.importance import write_imatrix, write_statistics
from benchmarks.export.tensors import equal_tensors
from compressors.calibration.statistics import StoredStatistics, importance
from compressors.model.description.roles import Role
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing.gguf.writer import write_gguf


def test_both_sides_get_the_same_importance_matrix(fine_folder: Path, tmp_path: Path) -> None:
    spec = open_source(fine_folder).spec
    write_statistics(spec, tmp_path / "statistics")
    write_imatrix(spec, tmp_path / "statistics", tmp_path / "imatrix.gguf")
    matrix = importance(StoredStatistics(tmp_path / "statistics", spec.n_layers), ExpertMap.identity(spec), spec)
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    entries = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(entries) == 2 * 7 * spec.n_layers  # query, key, value, output; gate, up, down
    for role, name in ((Role.EXPERT_DOWN, "blk.3.ffn_down_exps.weight"), (Role.QUERY, "blk.3.attn_q.weight")):
        sums, counts = entries[f"{name}.in_sum2"], entries[f"{name}.counts"]
        np.testing.assert_array_equal(sums, matrix[role, 3].reshape(sums.shape).numpy())
        expected = [1] * (spec.n_experts - 1) + [0] if role.is_expert else [1]
        np.testing.assert_array_equal(counts.reshape(-1), expected)


def test_tensors_that_differ_are_counted(fine_folder: Path, tmp_path: Path) -> None:
    student = Student.teacher(open_source(fine_folder))
    router = student.tensor(Role.ROUTER, 2).float()
    changed = student.with_overlay({student.name(Role.ROUTER, 2): torch.nextafter(router, router + 1)})
    for name, source in (("one", student), ("other", changed)):
        write_gguf(source, "Q8_0", tmp_path / name, name="x", threads=1)
    n_tensors = len(gguf.GGUFReader(tmp_path / "one").tensors)
    assert equal_tensors(tmp_path / "one", tmp_path / "one") == (n_tensors, n_tensors)
    assert equal_tensors(tmp_path / "one", tmp_path / "other") == (n_tensors - 1, n_tensors)
    write_gguf(student, "Q4_0", tmp_path / "third", name="x", threads=1)
    equal, total = equal_tensors(tmp_path / "one", tmp_path / "third")
    assert 0 < equal < total == n_tensors
