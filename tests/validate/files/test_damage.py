"""Every metric can fail: files that an exporter damaged, in both runtimes, and the report's sentences about each.

The writers' inputs are damaged: the files are complete and load, as an exporter's bug would leave them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.damage.metadata import rewrite
from compressors.model.description.roles import Role
from compressors.model.files.gguf.ggml import dequantize_rows, ggml_library_for, row_bytes
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.cli import main
from exporter.writing.gguf.container import uint32
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import write_onnx

_LAYERS, _EXPERTS = 2, 32
_EXPERT_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)

Overlay = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Workshop:
    """Where files are made: an original of two layers, and a little text."""

    folder: Path
    checkpoint: Path
    text: Path

    @property
    def original(self) -> Student:
        return Student.teacher(open_source(self.checkpoint))

    def write(self, student: Student, file_format: str, name: str) -> Path:
        path = self.folder / f"{name}-{file_format}"
        if path.exists():
            return path
        if file_format == "gguf":
            write_gguf(student, "Q8_0", path, name="x", threads=1)
        else:
            write_onnx(student, "F32", path, threads=1)
            write_client_files(student, path)
        return path


@pytest.fixture(scope="module")
def workshop(
    tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path], heldout_folder: Path
) -> Workshop:
    folder = tmp_path_factory.mktemp("damage")
    text = (heldout_folder / "religion.txt").read_text(encoding="utf-8")
    (folder / "text.txt").write_text(text[:6500], encoding="utf-8")
    return Workshop(folder, toy_checkpoint(folder, n_layers=_LAYERS), folder / "text.txt")


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def file_format(request: pytest.FixtureRequest) -> str:
    """In llama.cpp, then in ONNX Runtime."""
    return str(request.param)


def _validate(workshop: Workshop, path: Path, *arguments: str, against: Path | None = None) -> tuple[int, Any, str]:
    """Exit code, report and stderr of the command."""
    command = ["validate", str(path), "--against", str(against or workshop.checkpoint), "--text", str(workshop.text)]
    result = CliRunner().invoke(main, [*command, "--threads", "1", "--json", *arguments])
    assert result.exit_code in (0, 4), result.stderr
    return result.exit_code, json.loads(result.stdout), result.stderr


def _failed(report: Mapping[str, Any]) -> set[str]:
    return {check["name"].partition(".")[2] for check in report["checks"] if not check["passed"]}


def _zeroed_expert(student: Student) -> Overlay:
    names = [student.name(role, 1, 5) for role in _EXPERT_ROLES]
    return {name: torch.zeros_like(student.expert(role, 1, 5)) for name, role in zip(names, _EXPERT_ROLES, strict=True)}


def _permuted_router(student: Student) -> Overlay:
    return {student.name(Role.ROUTER, 1): student.tensor(Role.ROUTER, 1).roll(1, dims=0)}


def _swapped_layers(student: Student) -> Overlay:
    overlay = {}
    for layer, source in ((0, 1), (1, 0)):
        for role in (tensor.role for tensor in student.spec.layers[layer].shared_tensors):
            overlay[student.name(role, layer)] = student.tensor(role, source)
        for role in _EXPERT_ROLES:
            for expert in range(_EXPERTS):
                overlay[student.name(role, layer, expert)] = student.expert(role, source, expert)
    return overlay


def _exchanged_gate_and_up(student: Student) -> Overlay:
    pairs = ((Role.EXPERT_GATE, Role.EXPERT_UP), (Role.EXPERT_UP, Role.EXPERT_GATE))
    return {
        student.name(role, 1, expert): student.expert(other, 1, expert)
        for role, other in pairs
        for expert in range(_EXPERTS)
    }


def _two_bits(student: Student) -> Overlay:
    """ggml's Q2_K of the up projections of one layer, as float32."""
    experts = range(_EXPERTS)
    return {student.name(Role.EXPERT_UP, 1, n): _in_two_bits(student.expert(Role.EXPERT_UP, 1, n)) for n in experts}


def _in_two_bits(values: torch.Tensor) -> torch.Tensor:
    kind, source = GGMLQuantizationType.Q2_K, values.float().contiguous()
    n_rows, length = source.shape
    stored = np.empty((n_rows, row_bytes(kind, length)), np.uint8)
    library = ggml_library_for(kind)
    library.ggml_quantize_chunk(int(kind), source.data_ptr(), stored.ctypes.data, 0, n_rows, length, None)
    return torch.from_numpy(dequantize_rows(stored, kind, length))


@dataclass(frozen=True)
class Damage:
    """A damage, a check that must fail, and the report's sentences with and without the original's weights."""

    overlay: Callable[[Student], Overlay]
    failed: str
    symptom: str
    measured_symptom: str | None = None


_DAMAGES = {
    "zeroed expert": Damage(
        _zeroed_expert,
        "damaged_weights",
        r"expert 5 of layer 1 is zero \(expert gate, expert up, expert down\)",
        r"layer 1: tokens that expert 5 gets diverge by 0\.\d+ nats, the others by (< )?0\.000\d: that expert",
    ),
    "permuted router": Damage(
        _permuted_router,
        "routing",
        r"layer 1: 32 rows of its router are permuted \(number 0 is the original's 31\)",
        r"layer 1: routing overlap falls from (1\.00|0\.99) \(layer 0\) to 0\.\d+: its router's rows are permuted; "
        r"tokens of expert 0 go to 1, and so on for 3\d of 3\d experts",
    ),
    "swapped layers": Damage(
        _swapped_layers,
        "top1",
        r"layers 0 and 1 are swapped \(26\d tensors, experts and router rows apart\)",
        r"layer 0: routing overlap falls from .* to 0\.\d+: its router, or what comes into it",
    ),
    "exchanged gate and up": Damage(
        _exchanged_gate_and_up,
        "kld",
        r"layer 1: expert gate and expert up projections are exchanged \(32 experts\)",
    ),
    "two bits": Damage(
        _two_bits,
        "coarse_weights",
        r"layer 1: expert up is much coarser than the rest: relative error 0\.3",
    ),
}


@pytest.fixture(scope="module")
def whole(workshop: Workshop, file_format: str) -> Path:
    """An undamaged file."""
    return workshop.write(workshop.original, file_format, "whole")


def _damaged(workshop: Workshop, file_format: str, name: str) -> Path:
    original = workshop.original
    return workshop.write(original.with_overlay(_DAMAGES[name].overlay(original)), file_format, name)


def test_an_undamaged_file_passes(workshop: Workshop, whole: Path, file_format: str) -> None:
    exit_code, report, stderr = _validate(workshop, whole)
    assert (exit_code, report["failures"], stderr) == (0, [], "")
    assert report["rows"][0]["symptoms"] == []
    names = {"finite", "perplexity_change", "routing", "kld", "top1"}
    names |= {"settings", "tokenizer", "damaged_weights", "coarse_weights"}
    assert {check["name"] for check in report["checks"]} == {f"{file_format}.{name}" for name in names}


@pytest.mark.parametrize("name", _DAMAGES)
def test_damaged_weights_fail_and_are_named(workshop: Workshop, file_format: str, name: str) -> None:
    damage = _DAMAGES[name]
    exit_code, report, stderr = _validate(workshop, _damaged(workshop, file_format, name))
    assert exit_code == 4
    assert not report["passed"]
    assert damage.failed in _failed(report)
    symptoms = report["rows"][0]["symptoms"]
    assert re.match(damage.symptom, symptoms[0]), symptoms
    if damage.measured_symptom is not None:
        assert any(re.match(damage.measured_symptom, symptom) for symptom in symptoms), symptoms
    assert stderr.splitlines() == [f"failed: {failure}" for failure in report["failures"]]
    assert all(failure.startswith(f"{file_format.upper()}: ") for failure in report["failures"])


def test_another_rope_base_fails_and_is_named(workshop: Workshop, file_format: str) -> None:
    other = workshop.folder / f"other-base-{file_format}"
    shutil.copytree(workshop.checkpoint, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6}), encoding="utf-8")
    path = workshop.write(Student.teacher(open_source(other)), file_format, "rope")
    exit_code, report, _ = _validate(workshop, path)
    assert exit_code == 4
    assert {"settings", "kld", "top1", "routing"} <= _failed(report)
    assert "damaged_weights" not in _failed(report)
    assert re.match(
        r"rope base \(position-dependent.*: (1,000,000|999,99\d) in the file, 10,000 in config",
        report["rows"][0]["symptoms"][0],
    )


def test_routing_alone_catches_a_permuted_router(workshop: Workshop, whole: Path, file_format: str) -> None:
    """Beside another file, whose weights are not read, and with everything else allowed."""
    allowed = "kld=100,top1=0,perplexity_change=100"
    exit_code, report, stderr = _validate(
        workshop, _damaged(workshop, file_format, "permuted router"), "--require", allowed, against=whole
    )
    assert exit_code == 4
    assert _failed(report) == {"routing"}
    assert re.fullmatch(
        r"failed: (GGUF|ONNX): routing overlap with the unquantized model: [56]\d\.\d+ % \(.*\)\n", stderr
    )
    assert any("its router's rows are permuted" in symptom for symptom in report["rows"][0]["symptoms"])
    again, report, _ = _validate(workshop, whole, "--require", allowed, against=whole)
    assert (again, report["rows"][0]["routing"]["overlap"]) == (0, 1.0)


def test_logits_that_are_no_numbers_fail_where_nothing_else_is_known(workshop: Workshop) -> None:
    """V1: the original is known by its log-probabilities alone, so that neither settings nor weights are compared."""
    whole = workshop.write(workshop.original, "gguf", "whole")
    base = workshop.folder / "base.kld"
    _validate(workshop, whole, "--save-reference-logits", str(base))
    broken = workshop.folder / "not-a-number.gguf"
    shutil.copy(whole, broken)
    norm = GgufFile(broken).tensors["output_norm.weight"]
    with broken.open("r+b") as stream:
        stream.seek(norm.offset)
        stream.write(np.full(norm.shape, np.nan, np.float32).tobytes())
    for path, exit_code in ((broken, 4), (whole, 0)):
        result = CliRunner().invoke(
            main, ["validate", str(path), "--reference-logits", str(base), "--threads", "1", "--json"]
        )
        assert result.exit_code == exit_code, result.stderr
        (check,) = json.loads(result.stdout)["checks"]
        assert check["name"] == "gguf.finite"
        if exit_code:
            assert result.stderr.startswith("failed: GGUF: scored tokens with a finite probability: 0.00 %")
    shown = CliRunner().invoke(main, ["validate", str(whole), "--reference-logits", str(base), "--threads", "1"])
    assert "Only that the logits are numbers was checked" in shown.stdout


@pytest.mark.parametrize(("key", "value", "exit_code"), [("expert_used_count", 0, 4), ("block_count", 3, 2)])
def test_a_file_that_cannot_run_is_told_its_wrong_setting(
    workshop: Workshop, key: str, value: int, exit_code: int
) -> None:
    """llama.cpp dies of the one and refuses the other, and says neither key."""
    damaged = workshop.folder / f"{key}.gguf"
    rewrite(workshop.write(workshop.original, "gguf", "whole"), damaged, {f"qwen3moe.{key}": uint32(value)})
    command = ["validate", str(damaged), "--against", str(workshop.checkpoint), "--text", str(workshop.text)]
    result = CliRunner().invoke(main, [*command, "--threads", "1"])
    assert result.exit_code == exit_code, result.stderr
    name = {"expert_used_count": "number of experts per token"}.get(key, key)
    assert f"{name}: {value} in the file" in " ".join((result.stdout + result.stderr).split())
