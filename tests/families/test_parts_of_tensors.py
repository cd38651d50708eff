"""A tensor that a file holds in two parts of different types: each is compared by its own type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressors.model.description.roles import Role
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf
from tests.families.checkpoints import write_model
from tests.families.rows import ROWS
from tests.mxfp4_checkpoints import edit_tensors
from validate.files.weight_comparison import compare_weights
from validate.files.weight_symptoms import weight_symptoms

_NAME = "model.layers.0.linear_attn.in_proj_qkvz.weight"


@pytest.fixture(scope="module")
def folder(fine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are long enough for llama.cpp's types of 256 values."""
    path = tmp_path_factory.mktemp("parts") / "model"
    write_model("qwen3_next", ROWS["qwen3_next"], path, fine_folder, hidden_size=256, moe_intermediate_size=256)
    return path


def test_each_part_is_as_near_as_its_type_allows(folder: Path, tmp_path: Path) -> None:
    student = Student.teacher(Checkpoint(folder))
    write_gguf(student, "Q4_K_M", tmp_path / "x.gguf", name="x", threads=1)
    weights = GgufWeights(tmp_path / "x.gguf", student.spec)
    types = [weights.stored_type(Role.MIXER_INPUT, 0, part).name for part in range(2)]
    assert len(set(types)) == 2
    assert compare_weights(student, student.as_written(weights), weights.stored_type).damage == ()
    edit_tensors(folder, _with_other_gates)
    other = Student.teacher(Checkpoint(folder))
    damage = compare_weights(other, student.as_written(weights), weights.stored_type).damage
    assert {(entry.unit.role, entry.unit.layer, entry.unit.part) for entry in damage} == {(Role.MIXER_INPUT, 0, 1)}
    (symptom,) = weight_symptoms(damage)
    assert "part 1: row 3 " in symptom


def _with_other_gates(tensors: dict[str, torch.Tensor]) -> None:
    """Changes the fourth gate of the first key head, which follow queries, keys and values of 16, 16 and 32 rows."""
    tensors[_NAME][64 + 3] *= -1
