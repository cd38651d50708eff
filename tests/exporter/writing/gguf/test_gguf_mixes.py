"""The mixes are llama-quantize's: its own function tells the types, and writes the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compressors.calibration.statistics import Importance
from compressors.model.config.reading import read_spec
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec, MoeSize
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.validation.static_checks import check_weights
from exporter.writing.gguf.container import TensorEntry, aligned, render_header, render_values
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.metadata import model_metadata
from exporter.writing.gguf.mixes import ALIASES, MIXES, mix_named
from exporter.writing.gguf.writer import write_gguf
from tests.altered import altered
from tests.described_folder import DescribedFolder
from tests.llama_quantize import quantize, types_in_a_dry_run
from validate.files.model_file import find_model_file


def _header_alone(spec: ModelSpec, folder: Path, path: Path) -> None:
    """A float32 file whose weights are holes."""
    tensors = plan_tensors(spec, "F32")
    entries = [TensorEntry(tensor.name, tensor.shape, tensor.ggml_type, tensor.n_bytes) for tensor in tensors]
    metadata = model_metadata(spec, DescribedFolder(folder), "x", "F32")
    header = render_header(len(metadata), render_values(metadata), entries)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(aligned(tensor.n_bytes) for tensor in tensors))


def _sized(spec: ModelSpec, n_layers: int, n_experts: int, expert_width: int, n_kv_heads: int) -> ModelSpec:
    sizes = [MoeSize(n_experts, expert_width)] * n_layers
    return altered(spec, n_layers=n_layers, n_kv_heads=n_kv_heads, vocab_size=64).with_sizes(sizes)


@pytest.mark.parametrize(
    ("family", "n_layers", "n_experts", "expert_width", "n_kv_heads", "tied"),
    [
        ("fine", 6, 32, 128, 2, True),  # the trained model
        ("coarse", 6, 8, 512, 2, True),  # the trained model
        ("fine", 48, 128, 768, 1, False),  # Qwen3-30B-A3B's layers and experts
        ("coarse", 32, 8, 512, 2, False),  # Mixtral-8x7B's
        ("olmoe", 16, 64, 1024, 4, False),
        ("coarse", 17, 2, 100, 4, True),  # rows of 100 values fit no block
        ("fine", 9, 3, 96, 4, False),  # nor rows of 96 one of 64
        ("coarse", 80, 1, 256, 2, False),  # what llama.cpp takes for the dense 70B model
    ],
)
def test_types_are_those_of_llama_quantize(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    family: str,
    n_layers: int,
    n_experts: int,
    expert_width: int,
    n_kv_heads: int,
    tied: bool,
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    spec = replace(read_spec(folder), tied_embeddings=tied)
    spec = _sized(spec, n_layers, n_experts, expert_width, n_kv_heads)
    _header_alone(spec, folder, tmp_path / "x.gguf")
    for mix in MIXES.values():
        theirs = types_in_a_dry_run(tmp_path / "x.gguf", mix.file_type)
        ours = {tensor.name: tensor.ggml_type.name for tensor in plan_tensors(spec, mix.name)}
        assert ours == theirs, mix.name


@pytest.mark.parametrize("model", ["fine", "coarse"])
@pytest.mark.parametrize("mix", ["Q4_K_M", "Q3_K_M", "IQ4_XS", "Q2_K_S", "MXFP4_MOE", "Q2_0"])
def test_files_are_those_of_llama_quantize(
    tmp_path: Path, toy_checkpoint: Callable[..., Path], model: str, mix: str
) -> None:
    """Types, bytes and size of files of two layers, with one importance matrix."""
    checkpoint = open_source(toy_checkpoint(tmp_path, n_layers=2, model=model))
    n_experts = 8 if model == "coarse" else 3
    student = Student(checkpoint, ExpertMap.keeping(checkpoint.spec.n_experts, [range(n_experts)] * 2))
    write_gguf(student, "F32", tmp_path / "f32.gguf", name="x", threads=1)
    importance = _importance(student.spec)
    given = {tensor.name: importance.get((tensor.role, tensor.layer)) for tensor in plan_tensors(student.spec, mix)}
    entries = {name: values.numpy() for name, values in given.items() if values is not None}
    quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", mix_named(mix).file_type, entries)
    write_gguf(student, mix, tmp_path / "ours.gguf", importance=importance, name="x", threads=1)
    ours, theirs = GgufFile(tmp_path / "ours.gguf"), GgufFile(tmp_path / "theirs.gguf")
    assert ours.metadata == theirs.metadata
    assert set(ours.tensors) == set(theirs.tensors)
    for name, entry in ours.tensors.items():
        other = theirs.tensors[name]
        assert (entry.ggml_type, entry.shape) == (other.ggml_type, other.shape), name
        n_rows = entry.n_bytes // entry.row_bytes
        np.testing.assert_array_equal(ours.read_rows(entry, 0, n_rows), theirs.read_rows(other, 0, n_rows), name)
    assert ours.path.stat().st_size == theirs.path.stat().st_size


def _importance(spec: ModelSpec) -> Importance:
    """The importance of every matrix except the embedding."""
    random = torch.Generator().manual_seed(0)
    experts = {Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN}
    found = {}
    for tensor in plan_tensors(spec, "F32"):
        if tensor.role in experts | {Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUTPUT}:
            leading = tensor.shape[:1] if tensor.role in experts else ()
            found[tensor.role, tensor.layer] = torch.rand(*leading, tensor.row_length, generator=random).square()
    return found


def test_aliases_are_the_tool_s() -> None:
    assert {name: mix_named(name).name for name in ALIASES} == {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
    assert not ALIASES.keys() & MIXES.keys()


@pytest.mark.parametrize("mix", ["Q2_K", "Q2_0", "TQ1_0", "TQ2_0", "MXFP4_MOE"])
def test_coarse_types_are_no_damage_and_another_tensor_is(
    tmp_path: Path, toy_checkpoint: Callable[..., Path], mix: str
) -> None:
    checkpoint = open_source(toy_checkpoint(tmp_path, n_layers=1, model="coarse"))
    student = Student(checkpoint, ExpertMap.keeping(8, [range(3)]))
    importance = _importance(student.spec)
    write_gguf(student, mix, tmp_path / "x.gguf", importance=importance, name="x", threads=1)
    assert check_weights(find_model_file(tmp_path / "x.gguf"), student).symptoms == []
    name = student.name(Role.EXPERT_UP, 0, 1)
    swapped = student.with_overlay({name: student.expert(Role.EXPERT_UP, 0, 2)})
    write_gguf(swapped, mix, tmp_path / "x.gguf", importance=importance, name="x", threads=1)
    found = check_weights(find_model_file(tmp_path / "x.gguf"), student)
    assert [symptom for symptom in found.symptoms if "expert up" in symptom], found.symptoms
