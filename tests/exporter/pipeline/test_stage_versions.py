"""Notices when a writer's output changed: its stage's version must then be raised, or old work would pass for new.

Only bytes that are the same on every processor are looked at: copied values and structure, no sums.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.stages.table import ALL_STAGES
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.graph import build_model
from exporter.writing.onnx.layout import plan_tensors

_GOLDEN = {
    "gguf": (2, "72229cbe1c0f63c76a6e22bd578af0a7210e92ebf390c8b02669d989d7aa37fc"),
    "onnx": (9, "d4f449d837d889daf686a49d61cf8287aa864cadc85185b645e731019bb1c7dc"),
}


def _gguf_digest(toy_model: Path, folder: Path) -> str:
    source = open_source(toy_model)
    student = Student(source, ExpertMap.keeping(32, ((1, 5, 6, 7, 30), (0, 2, 3, 4, 31))))
    write_gguf(student, "BF16", folder / "toy.gguf", name="toy", threads=1)
    return hashlib.sha256((folder / "toy.gguf").read_bytes()).hexdigest()


def _onnx_digest(toy_model: Path) -> str:
    spec = open_source(toy_model).spec.with_experts(5)
    graphs = [
        build_model(plan_tensors(spec, preset)).SerializeToString(deterministic=True) for preset in ("F32", "Q4_0")
    ]
    return hashlib.sha256(b"".join(graphs)).hexdigest()


@pytest.mark.parametrize("name", sorted(_GOLDEN))
def test_a_changed_output_raises_its_stage_s_version(name: str, toy_model: Path, tmp_path: Path) -> None:
    digest = _gguf_digest(toy_model, tmp_path) if name == "gguf" else _onnx_digest(toy_model)
    (version,) = (stage.version for stage in ALL_STAGES if stage.name == name)
    assert (version, digest) == _GOLDEN[name], (
        f"the output of {name} changed: raise its version in exporter/stages/table.py, then put the pair here"
    )
