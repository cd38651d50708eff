"""Files of a checkpoint with experts in MXFP4 equal files of the same numbers in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compressors.model.description.roles import Role
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.storage_type import StorageType
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from compressors.sensitivity import allocate, default_table
from exporter.planning.recipe import FileChoice
from exporter.searching.units import gguf_units
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE
from exporter.writing.onnx.writer import write_onnx
from tests.mxfp4_checkpoints import write_both

_KEPT = (6, 0, 3)
_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, fine_folder: Path) -> tuple[Student, Student]:
    """Three of eight experts, of the checkpoint in MXFP4 and of the one in bfloat16."""
    packed, plain = write_both(tmp_path_factory.mktemp("mxfp4"), fine_folder)
    return _pruned(packed), _pruned(plain)


def _pruned(folder: Path) -> Student:
    return Student(open_source(folder), ExpertMap.keeping(8, [_KEPT, _KEPT]))


@pytest.mark.parametrize("mix", ["F32", "Q8_0"])
def test_other_types_have_the_same_bytes(students: tuple[Student, Student], tmp_path: Path, mix: str) -> None:
    for number, student in enumerate(students):
        write_gguf(student, mix, tmp_path / f"{number}.gguf", name="x", threads=1)
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()


def test_onnx_files_have_the_same_bytes(students: tuple[Student, Student], tmp_path: Path) -> None:
    for name, student in zip(("packed", "plain"), students, strict=True):
        write_onnx(student, "Q4_0", tmp_path / name, threads=1)
    for file in (MODEL_FILE, DATA_FILE):
        assert (tmp_path / "packed" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_experts_in_mxfp4_are_copied(students: tuple[Student, Student], tmp_path: Path) -> None:
    """Code by code: quantizing the numbers again would keep them too, but choose other scales and zeros."""
    student = students[0]
    write_gguf(student, "MXFP4_MOE", tmp_path / "x.gguf", name="x", threads=1)
    written = GgufWeights(tmp_path / "x.gguf", student.spec)
    stored = (tmp_path / "x.gguf").read_bytes()
    for layer in range(2):
        for role in _ROLES:
            assert written.stored_type(role, layer) is GGMLQuantizationType.MXFP4
            rows = [student.stored_rows(role, layer, 0, slice(None), expert) for expert in range(3)]
            assert b"".join(row.numpy().tobytes() for row in rows if row is not None) in stored
            for expert in range(3):
                found = torch.empty(student.spec.dimensions(role, layer))
                written.read_expert(role, layer, expert, found)
                assert torch.equal(found, student.expert(role, layer, expert).float())


def test_the_search_takes_mxfp4_where_the_source_has_it(students: tuple[Student, Student]) -> None:
    """It is exact there, so the smallest file without any error has it for all experts, and for nothing else.

    A checkpoint in bfloat16 has no exact type but bfloat16, which is larger.
    """
    choice, chosen = FileChoice(mix="Q8_0"), []
    for student in students:
        plans = gguf_units(student.spec, StorageType.BF16, choice, student.stored_types)
        exact = {plan.name: [each for each in plan.candidates if each.quantize is None] for plan in plans}
        smallest = {name: min(found, key=lambda each: each.n_bytes) for name, found in exact.items()}
        table = default_table(student.spec, plans)
        best = allocate(table, sum(each.n_bytes for each in smallest.values()))
        assert best.choices == {name: each.choice for name, each in smallest.items()}
        assert best.divergence == 0
        chosen.append(best)
    packed, plain = chosen
    assert {name for name, found in packed.choices.items() if found == "MXFP4"} == {
        f"blk.{layer}.ffn_{part}_exps.weight" for layer in range(2) for part in ("gate", "up", "down")
    }
    assert set(plain.choices.values()) == {"BF16"} and packed.n_bytes < plain.n_bytes


def test_a_saved_student_is_in_bfloat16(students: tuple[Student, Student], tmp_path: Path) -> None:
    for name, student in zip(("packed", "plain"), students, strict=True):
        write_checkpoint(student, tmp_path / name)
    tensors = {file.name: load_file(file) for file in sorted((tmp_path / "packed").glob("*.safetensors"))}
    for name, found in tensors.items():
        wanted = load_file(tmp_path / "plain" / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())
    gate_up = tensors["model-00001-of-00003.safetensors"]["model.layers.0.mlp.experts.gate_up_proj"]
    assert gate_up.shape == (3, 64, 192) and gate_up.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "packed" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    assert torch.equal(loaded.model.layers[0].mlp.experts.gate_up_proj, gate_up)
