"""The whole pipeline with methods that change experts: what it builds is the student that the recipe describes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]
Command = Callable[..., Sequence[str]]


def _built(
    choice: dict[str, Any], others: dict[str, Any], tiny_recipe: Path, folder: Path, command: Command, run: Run
) -> Path:
    """The output folder of the tiny recipe with another choice of compression."""
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["compress"] = choice
    recipe["budget"]["bytes"] = 50_000_000
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | others))
    result = run(command(folder / "out", "--recipe", str(folder / "recipe.yaml")))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "out"


def _report(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def test_merged_and_slimmed_experts_arrive_in_both_files(
    tiny_recipe: Path, toy_command: Command, run_command: Run, tmp_path: Path
) -> None:
    choice = {"method": "ream", "experts": 12, "width": 96, "sequential": True, "sample_blocks": 1}
    others = {"gguf": "Q4_K", "onnx": "F32", "save_student": True}
    out = _built(choice, others, tiny_recipe, tmp_path, toy_command, run_command)
    report = _report(out)
    student = report["student"]
    assert (student["n_layers"], student["n_experts"], student["expert_width"], student["top_k"]) == (2, 12, 96, 4)
    assert student["merged"] is True
    for layer in student["expert_map"]["layers"]:
        members = sorted(expert for group in layer["groups"] for expert in group)
        assert (members, layer["width"]) == (list(range(32)), 96), "each expert goes on living in some group"
    assert [len(kept) for kept in student["kept"]] == [12, 12]
    parameters = sum(tensor.numel() for tensor in AutoModelForCausalLM.from_pretrained(out / "student").parameters())
    assert student["parameters"] == parameters
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
    with safe_open(next((out / "student").glob("model-00001-*.safetensors")), framework="pt") as file:
        assert file.get_slice("model.layers.0.mlp.experts.11.down_proj.weight").get_shape() == [256, 96]
    assert "32 experts per layer merged into 12" in (out / "README.md").read_text()


def test_a_layer_without_experts_arrives_in_onnx(
    tiny_recipe: Path, toy_command: Command, run_command: Run, tmp_path: Path
) -> None:
    """Layer Drop, then pruning of what is left; taught routers, whose layer is the only one."""
    choice = {"drop_moe_layers": 1, "method": "reap", "experts": [9]}
    out = _built(choice, {"gguf": None, "onnx": "Q4_0"}, tiny_recipe, tmp_path, toy_command, run_command)
    report = _report(out)
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
