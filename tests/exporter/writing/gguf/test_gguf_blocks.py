"""From a GGUF file to a GGUF file: blocks that nothing changed are the source's, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from compressors.model.description.roles import Role
from compressors.model.sources.gguf_source import GgufSource
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from compressors.quantize import GGMLQuantizationType
from compressors.sensitivity import allocate_file, default_table
from exporter.planning.recipe import BudgetChoice, FileChoice
from exporter.searching.units import units_of
from exporter.searching.untyped_file import UntypedFile
from exporter.writing.gguf.writer import predict_file_size, write_gguf
from exporter.writing.onnx.writer import write_onnx
from tests.gguf_copies import split_gguf

_T = GGMLQuantizationType
_KEPT = ((1, 5, 6, 7, 8, 20, 30, 31), (0, 2, 3, 4, 9, 10, 11, 12))
_MIXED = {"blk.0.ffn_up_exps.weight": "Q6_K", "blk.1.attn_q.weight": "BF16", "blk.1.ffn_down_exps.weight": "Q4_0"}


@pytest.fixture(scope="module")
def toy(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("toy"), n_layers=2, model="coarse")


@pytest.fixture(scope="module")
def fine_toy(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("fine"), n_layers=2)


@pytest.fixture(scope="module")
def file(fine_toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy in Q8_0, but for a few tensors."""
    path = tmp_path_factory.mktemp("gguf") / "toy-Q8_0.gguf"
    write_gguf(Student.teacher(Checkpoint(fine_toy)), "Q8_0", path, types=_MIXED, name="toy", threads=1)
    return path


def _pruned(source: Source) -> Student:
    return Student(source, ExpertMap.keeping(source.spec.n_experts, _KEPT))


def _stored(path: Path) -> dict[str, tuple[GGMLQuantizationType, npt.NDArray[np.uint8]]]:
    """Types and bytes by another reader; experts are along the first axis."""
    return {
        tensor.name: (tensor.tensor_type, np.asarray(tensor.data).view(np.uint8))
        for tensor in gguf.GGUFReader(path).tensors
    }


def test_no_byte_of_a_kept_expert_changes(file: Path, tmp_path: Path) -> None:
    """Nor of any other matrix; routers lose the rows of experts that are gone."""
    write_gguf(_pruned(open_source(file)), "Q8_0", tmp_path / "x.gguf", types=_MIXED, name="toy", threads=2)
    before, after = _stored(file), _stored(tmp_path / "x.gguf")
    assert before.keys() == after.keys()
    for name, (ggml_type, rows) in before.items():
        layer = int(name.split(".")[1]) if name.startswith("blk.") else None
        has_experts = "_exps" in name or "ffn_gate_inp" in name
        wanted = rows[list(_KEPT[layer])] if layer is not None and has_experts else rows
        assert after[name][0] == ggml_type
        np.testing.assert_array_equal(after[name][1], wanted, err_msg=name)


def test_pruning_blocks_is_pruning_and_then_quantizing(fine_toy: Path, file: Path, tmp_path: Path) -> None:
    """With the kernels' codes: the same file, but for nothing."""
    for name, source in (("blocks", GgufSource(file)), ("original", Checkpoint(fine_toy))):
        write_gguf(_pruned(source), "Q8_0", tmp_path / name, types=_MIXED, name="toy", threads=2)
    assert (tmp_path / "blocks").read_bytes() == (tmp_path / "original").read_bytes()


def test_other_types_are_made_of_the_dequantized_values(file: Path, tmp_path: Path) -> None:
    types = {**_MIXED, "blk.0.ffn_gate_exps.weight": "Q4_0"}
    source = GgufSource(file)
    write_gguf(Student.teacher(source), "Q8_0", tmp_path / "x.gguf", types=types, name="toy", threads=1)
    before, after = _stored(file), _stored(tmp_path / "x.gguf")
    changed = {name for name in before if before[name][1].tobytes() != after[name][1].tobytes()}
    assert changed == {"blk.0.ffn_gate_exps.weight"}
    values = torch.empty(source.spec.dimensions(Role.EXPERT_GATE, 0))
    source.read_expert(Role.EXPERT_GATE, 0, 3, values)
    wanted = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(after["blk.0.ffn_gate_exps.weight"][1][3], wanted)


def test_changed_tensors_are_quantized_again(file: Path, tmp_path: Path) -> None:
    student = Student.teacher(GgufSource(file))
    doubled = 2 * student.expert(Role.EXPERT_GATE, 0, 3)
    changed = student.with_overlay({student.name(Role.EXPERT_GATE, 0, 3): doubled})
    write_gguf(changed, "Q8_0", tmp_path / "x.gguf", types=_MIXED, name="toy", threads=1)
    before, after = (_stored(path)["blk.0.ffn_gate_exps.weight"][1] for path in (file, tmp_path / "x.gguf"))
    differing = [expert for expert in range(len(before)) if (before[expert] != after[expert]).any()]
    assert differing == [3]
    np.testing.assert_array_equal(after[3], gguf.quants.quantize(doubled.numpy(), gguf.GGMLQuantizationType.Q8_0))


def test_rows_of_interleaved_heads_are_copied_as_they_lie(toy: Path, tmp_path: Path) -> None:
    """llama.cpp has the queries and keys of a Mixtral in another order than transformers."""
    write_gguf(Student.teacher(Checkpoint(toy)), "Q4_K_M", tmp_path / "a.gguf", name="toy", threads=1)
    source = GgufSource(tmp_path / "a.gguf")
    types = {name: entry[0].name for name, entry in _stored(tmp_path / "a.gguf").items()}
    write_gguf(Student.teacher(source), "Q4_K_M", tmp_path / "b.gguf", types=types, name="toy", threads=2)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def _best_types(source: Source, path: Path, n_bytes: int) -> Mapping[str, str]:
    """The types of the best file of all experts within so many bytes, by the default sensitivities."""
    choice, budget = (
        FileChoice(mix="Q8_0", quantizer="feedback"),
        BudgetChoice(bytes=n_bytes, kind="file", context=512, kv_type="f16"),
    )
    untyped = UntypedFile("gguf", source, "toy", source.spec, budget, 1, choice)
    table = default_table(source.spec, units_of(untyped, source.storage_type))
    found = allocate_file(table, n_bytes, lambda choices: untyped.counted(untyped.file(choices, table.units)))
    return untyped.file(found.choices, table.units).tensors


def test_the_source_s_types_are_exact(file: Path) -> None:
    """With room for them, the best file has them all; a byte less, and one tensor gets smaller blocks."""
    source = GgufSource(file)
    own = {name: entry[0].name for name, entry in _stored(file).items()}
    n_bytes = predict_file_size(source.spec, source, "Q8_0", "toy", own)
    for room in (0, 300_000):
        types = _best_types(source, file, n_bytes + room)
        assert types == {name: own[name] for name in types}
    smaller = _best_types(source, file, n_bytes - 1)
    assert 1 <= sum(own[name] != smaller[name] for name in smaller) <= 3


def test_parts_are_one_source(file: Path, tmp_path: Path) -> None:
    parts = split_gguf(file, tmp_path / "big", 3)
    split, whole = open_source(parts[0]), open_source(file)
    assert (split.spec, split.files, split.n_bytes) == (whole.spec, tuple(parts), whole.n_bytes)
    for name, source in (("split", split), ("whole", whole)):
        write_gguf(_pruned(source), "Q8_0", tmp_path / name, types=_MIXED, name="toy", threads=1)
    assert (tmp_path / "split").read_bytes() == (tmp_path / "whole").read_bytes()


def test_onnx_is_made_of_it_as_of_a_checkpoint(fine_toy: Path, tmp_path: Path) -> None:
    """From a file that lost nothing, the same bytes."""
    original = Checkpoint(fine_toy)
    write_gguf(Student.teacher(original), "BF16", tmp_path / "x.gguf", name="toy", threads=1)
    source = GgufSource(tmp_path / "x.gguf")
    assert source.dtype == original.dtype == torch.bfloat16
    for name, one in (("a", source), ("b", original)):
        write_onnx(_pruned(one), "Q4_0", tmp_path / name, threads=1)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
