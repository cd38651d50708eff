"""``--student dense`` from the command line to the report: what is written, how it is judged, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import yaml

from compressors.model.config.reading import read_spec

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]

_PROGRAM = (sys.executable, "-m", "exporter")
_ARCHITECTURES = {"fine": ("qwen3", "qwen3"), "coarse": ("llama", "mistral")}
"""The architectures of the GGUF file and of the ONNX graph."""

_TEXT = {"calibration_blocks": 16, "selection_blocks": 1, "heldout_chunks_per_file": 1}


@dataclass(frozen=True)
class _Run:
    """A finished run of a family's two-layer toy."""

    model: str
    source: Path
    out: Path
    printed: str

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.out / "report.json").read_text(encoding="utf-8"))
        return report


@pytest.fixture(scope="module", params=sorted(_ARCHITECTURES))
def run(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    toy_checkpoint: Callable[..., Path],
    small_texts: tuple[Path, Path],
    run_command: Run,
) -> _Run:
    """The command's own recipe with less text, each family in both containers and as a checkpoint."""
    folder = tmp_path_factory.mktemp(f"dense-{request.param}")
    source = toy_checkpoint(folder, n_layers=2, model=request.param)
    calibration, heldout = small_texts
    inputs = [str(source), "--calibration", str(calibration), "--text", str(heldout), "--out", str(folder / "out")]
    choices = ["--student", "dense", "--budget", "50MB", "--budget-kind", "file", "--quant", "Q4_0", "--save-student"]
    planned = run_command([*_PROGRAM, *inputs, *choices, "--context", "512", "--threads", "1", "--dry-run", "--json"])
    assert planned.returncode == 0, planned.stderr
    recipe = json.loads(planned.stdout)
    recipe["text"] |= _TEXT
    embeddings = ["token_embd.weight"] if read_spec(source).tied_embeddings else ["token_embd.weight", "output.weight"]
    recipe["gguf"] |= {"tensors": dict.fromkeys(embeddings, "Q8_0"), "quantizer": "kernel"}  # the numbers of ONNX's
    recipe["onnx"] |= {"quantizer": "kernel"}
    (rung,) = recipe["recover"]["rungs"]
    rung |= {"blocks": 16, "blocks_per_step": 2}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = run_command([*_PROGRAM, *inputs, "--recipe", str(path)])
    assert result.returncode == 0, result.stdout + result.stderr
    return _Run(request.param, source, folder / "out", result.stdout)


def test_both_files_hold_the_dense_architecture_and_the_predicted_bytes(run: _Run) -> None:
    report, (in_gguf, in_onnx) = run.report, _ARCHITECTURES[run.model]
    teacher = read_spec(run.source)
    student = report["student"]
    assert report["recipe"]["compress"]["student"] == "dense"
    assert (student["dense"], student["n_layers"]) == (True, 2)
    assert student["expert_width"] == teacher.top_k * teacher.expert_width
    assert [student[key] for key in ("n_experts", "fewest_experts", "n_moe_layers", "top_k")] == [None] * 4
    assert [len(kept) for kept in student["kept"]] == [teacher.top_k] * 2
    layer = teacher.layers[0]
    removed = (layer.n_experts - layer.top_k) * layer.expert_parameters + layer.n_experts * teacher.hidden_size
    assert student["parameters"] == teacher.parameters - 2 * removed
    (path,) = run.out.glob("*.gguf")
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == in_gguf
    assert onnx.load(run.out / "onnx" / "model.onnx", load_external_data=False).graph.name == in_onnx
    assert json.loads((run.out / "student" / "config.json").read_text())["model_type"] == in_onnx
    for artifact in report["artifacts"]:
        assert artifact["bytes"] == report["budget"]["predicted"][artifact["format"]]["file"]


def test_the_report_is_what_its_schema_says(run: _Run, schema_errors: Callable[[Any], list[str]]) -> None:
    assert schema_errors(run.report) == []


def test_both_runtimes_agree_with_torch_and_nothing_is_said_of_routing(run: _Run) -> None:
    report = run.report
    rows = {row["artifact"]: row for row in report["validation"]}
    assert set(rows) == {"teacher", "student", "gguf", "onnx"}
    for row in rows.values():
        assert row["routing"] == dict.fromkeys(["vs_torch_student", "vs_other_runtime", "vs_teacher", "router_alone"])
    for name in ("gguf", "onnx"):
        assert rows[name]["perplexity"] == pytest.approx(rows["student"]["perplexity"], rel=0.1)
        assert rows[name]["kld"]["mean"] == pytest.approx(rows["student"]["kld"]["mean"], rel=0.1)
    assert 0 < rows["onnx"]["kld_vs_other_runtime"] < 0.01, "the same numbers in both runtimes"
    assert rows["teacher"]["perplexity"] < rows["student"]["perplexity"]
    names = {check["name"] for check in report["verdict"]["checks"]}
    assert names == {f"{name}.{what}" for name in ("gguf", "onnx") for what in ("budget", "perplexity_change", "loops")}
    assert report["verdict"]["passed"]


def test_recovery_teaches_the_feed_forwards_as_nothing_else_could_be(run: _Run) -> None:
    (rung,) = run.report["recipe"]["recover"]["rungs"]
    assert (rung["scope"], rung["loss"]) == ("experts", "kd")
    (tried,) = run.report["recovery"]
    assert (tried["rung"], tried["accepted"]) == ("feed-forwards", True)
    assert tried["selection_kld_after"] < tried["selection_kld_before"]


def test_page_card_and_terminal_say_that_it_is_dense(run: _Run) -> None:
    teacher = read_spec(run.source)
    width = teacher.top_k * teacher.expert_width
    said = f"one dense feed-forward per layer ({width} wide, from {teacher.top_k} of {teacher.n_experts} experts)"
    page, card = ((run.out / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    assert said in page and said in card
    assert said in " ".join(run.printed.split())
    assert "The student is dense" in page and "Same routing" not in page and "Overlap" not in page
    assert "outing as in" not in card + run.printed
    assert "- dense\n" in card and "mixture-of-experts" not in card


@pytest.mark.parametrize("run", ["fine"], indirect=True)
def test_validate_judges_the_published_files_again(run: _Run, small_texts: tuple[Path, Path], run_command: Run) -> None:
    command = ["validate", str(run.out), "--text", str(small_texts[1]), "--threads", "1", "--json"]
    again = run_command([*_PROGRAM, *command])
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert [row["routing_overlap_vs_teacher"] for row in result["rows"]] == [None, None]
    checks = {check["name"] for check in result["checks"]}
    assert {"files changed", "gguf.perplexity_as_reported", "onnx.perplexity_as_reported"} <= checks
    assert not any("routing" in name for name in checks)
    reported = {row["artifact"]: row["perplexity"] for row in run.report["validation"]}
    for row in result["rows"]:
        assert np.isclose(row["perplexity"], reported[row["artifact"]], rtol=1e-3)
