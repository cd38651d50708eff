"""The whole pipeline with methods that change experts: what it builds is the student that the recipe describes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressors.model.config.reading import read_spec
from exporter import load_student

Command = Callable[..., Sequence[str]]

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


def _write_recipe(tiny_recipe: Path, folder: Path, choice: dict[str, Any], **others: Any) -> Path:
    """The tiny recipe with another choice of compression, and room for it."""
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["compress"] = choice
    recipe["budget"]["bytes"] = 50_000_000
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | others))
    return path


def _built(out: Path, recipe: Path, toy_command: Command, run_command: Run) -> dict[str, Any]:
    """The report of a run, which says where it is as programs read it."""
    result = run_command(toy_command(out, "--recipe", str(recipe), "--progress", "json"))
    assert result.returncode == 0, result.stdout + result.stderr
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in result.stderr.splitlines()]
    ended = [event for event in events if event["event"] == "stage_ends"]
    assert [event["stage"] for event in ended] == list(report["timings"])
    assert [event["number"] for event in ended] == list(range(1, len(ended) + 1))
    assert {event["of"] for event in ended} == {len(ended)}
    layers = [event for event in events if event["event"] == "progress" and event["stage"] == "calibrate"]
    assert (layers[-1]["unit"], layers[-1]["done"], layers[-1]["total"]) == ("layers", 2, 2)
    return report


def test_merged_and_slimmed_experts_arrive_in_both_files(
    toy_model: Path, tiny_recipe: Path, toy_command: Command, run_command: Run, tmp_path: Path
) -> None:
    choice = {"method": "ream", "experts": 12, "width": 96, "sequential": True, "sample_blocks": 1}
    recipe, out = _write_recipe(tiny_recipe, tmp_path, choice, gguf="Q4_K", onnx="F32"), tmp_path / "out"
    report = _built(out, recipe, toy_command, run_command)
    student = report["student"]
    assert (student["n_layers"], student["n_experts"], student["expert_width"], student["top_k"]) == (2, 12, 96, 4)
    assert student["merged"] is True
    for layer in student["expert_map"]["layers"]:
        members = sorted(expert for group in layer["groups"] for expert in group)
        assert (members, layer["width"]) == (list(range(32)), 96), "each expert goes on living in some group"
    assert [len(kept) for kept in student["kept"]] == [12, 12]
    spec = read_spec(toy_model)
    removed = 20 * (spec.layers[0].expert_parameters + spec.hidden_size)  # experts, and their router rows
    removed += 12 * 3 * spec.hidden_size * 32  # neurons of those that are left
    assert student["parameters"] == spec.parameters - 2 * removed
    for artifact in report["artifacts"]:
        assert artifact["bytes"] == report["budget"]["predicted"][artifact["format"]]["file"]
    assert {artifact["format"]: artifact["type"] for artifact in report["artifacts"]} == {"gguf": "Q4_K", "onnx": "F32"}
    rows = {row["artifact"]: row for row in report["validation"]}
    for name, difference in (("gguf", 0.05), ("onnx", 1e-3)):
        assert rows[name]["perplexity"] == pytest.approx(rows["student"]["perplexity"], rel=difference)
        assert rows[name]["routing"]["vs_torch_student"]["overlap"] > 0.85
    assert rows["teacher"]["perplexity"] < rows["student"]["perplexity"]
    assert rows["student"]["routing"]["vs_teacher"]["kept_gate_weight"] == pytest.approx(1.0), "nothing was dropped"
    recorded = yaml.safe_load((out / "recipe.yaml").read_text())["compress"]
    assert recorded == report["recipe"]["compress"]
    assert {name: recorded[name] for name in choice} == choice
    assert "32 experts per layer merged into 12" in (out / "README.md").read_text()


def test_a_layer_without_experts_arrives_in_onnx(
    tiny_recipe: Path, toy_command: Command, run_command: Run, tmp_path: Path
) -> None:
    """Layer Drop, then pruning of what is left; taught routers, whose layer is the only one."""
    choice = {"drop_moe_layers": 1, "method": "reap", "experts": [9]}
    recipe, out = _write_recipe(tiny_recipe, tmp_path, choice, gguf=None, onnx="Q4_0"), tmp_path / "out"
    report = _built(out, recipe, toy_command, run_command)
    groups = [layer["groups"] for layer in report["student"]["expert_map"]["layers"]]
    assert sorted(map(len, groups)) == [0, 9]
    empty = [len(layer) for layer in groups].index(0)
    assert (report["student"]["n_layers"], report["student"]["n_experts"]) == (2, 9)
    rows = {row["artifact"]: row for row in report["validation"]}
    for comparison in ("vs_torch_student", "vs_teacher"):
        layers = rows["onnx"]["routing"][comparison]["per_layer"]
        assert [layer is None for layer in layers] == [number == empty for number in range(2)]
    assert rows["onnx"]["perplexity"] == pytest.approx(rows["student"]["perplexity"], rel=0.1)
    assert (out / "report.html").stat().st_size > 10_000


def test_replaced_experts_arrive_in_onnx_and_in_the_saved_student(
    tiny_recipe: Path, toy_command: Command, run_command: Run, tmp_path: Path
) -> None:
    """Bases and adapters are taught, written as predicted, and put together again by who loads the student."""
    numbers = {"edit": "lightmoe", "edit_size": 8, "replaced": [0, 29], "bases": [0, 7], "apart": True}
    rung = {"scope": "replaced", "blocks": 2, "blocks_per_step": 1, "learning_rate": 1e-4, "fade": 0.5}
    recipe = _write_recipe(
        tiny_recipe,
        tmp_path,
        {"experts": 32, "sample_blocks": 1, **numbers},
        gguf=None,
        onnx="Q4_0",
        save_student=True,
        recover={"rungs": [rung], "after_quantizing": None, "seed": 1},
    )
    report = _built(tmp_path / "out", recipe, toy_command, run_command)
    shared = [layer.get("shared") for layer in report["student"]["expert_map"]["layers"]]
    assert sum(base is not None for layer in shared if layer for base in layer["base_of"]) == 29
    assert sum(layer["bases"] for layer in shared if layer) == 7
    (artifact,) = report["artifacts"]
    assert artifact["bytes"] == report["budget"]["predicted"]["onnx"]["file"]
    assert [rung["rung"] for rung in report["recovery"]] == ["router + bases and adapters"]
    rows = {row["artifact"]: row for row in report["validation"]}
    assert rows["onnx"]["perplexity"] == pytest.approx(rows["student"]["perplexity"], rel=0.1)
    assert "29 of them on 7 shared bases" in (tmp_path / "out" / "README.md").read_text()
    assert sum(parameter.numel() for parameter in load_student(tmp_path / "out" / "student").parameters()) > 7_000_000
