"""Bad input gets one clear sentence and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


@pytest.fixture
def model(tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> Path:
    """A small checkpoint to damage."""
    return toy_checkpoint(tmp_path, n_layers=1)


def _no_config(model: Path) -> None:
    (model / "config.json").unlink()


def _dense(model: Path) -> None:
    _edit_config(model, model_type="qwen3", drop=("num_experts",))
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if "experts" not in name}, model / "model.safetensors")


def _unsupported_family(model: Path) -> None:
    _edit_config(model, model_type="jamba")


def _missing_shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _missing_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def _truncated(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def _wrong_dtype(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"].to(torch.int8)
    save_file(tensors, model / "model.safetensors")


def _nan(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.experts.9.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors")


def _edit_config(model: Path, *, drop: Sequence[str] = (), **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    for key in drop:
        del config[key]
    (model / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_config, "config.json"),
        (_dense, "dense"),
        (_unsupported_family, "not a supported MoE family: ONNX Runtime has no operator"),
        (_missing_shard, "model-00001-of-00001.safetensors"),
        (_missing_tensor, "model.layers.0.mlp.experts.3.up_proj.weight"),
        (_truncated, "truncated"),
        (_wrong_dtype, "model.layers.0.mlp.gate.weight has dtype I8"),
    ],
)
def test_a_damaged_model_is_refused_before_any_work(
    model: Path, damage: Callable[[Path], None], said: str, run_command: Run
) -> None:
    damage(model)
    assert_refused(run_command, model.parent, [str(model), "--budget", "3MB", "--budget-kind", "file"], said)


def test_nan_weights_are_found_when_they_are_read(
    model: Path, small_texts: tuple[Path, Path], run_command: Run
) -> None:
    _nan(model)
    arguments = [str(model), "--budget", "3MB", "--budget-kind", "file", "--threads", "1", *_given(small_texts)]
    out = model.parent / "out"
    result = run_command([sys.executable, "-m", "exporter", *arguments, "--out", str(out)])
    assert result.returncode == 2
    assert "model.layers.0.mlp.experts.9.down_proj.weight holds NaN" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def _given(texts: tuple[Path, Path]) -> list[str]:
    """Little text, since that of the bundled model takes seconds to tokenize."""
    return ["--calibration", str(texts[0]), "--text", str(texts[1])]


def _empty_text(folder: Path) -> list[str]:
    (folder / "empty.txt").write_text("\n")
    return ["--budget", "3MB", "--calibration", str(folder / "empty.txt")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda folder: ["--budget", "a lot"], "--budget"),
        (lambda folder: ["--budget", "-3GB"], "--budget"),
        (_empty_text, "empty.txt is empty"),
        (lambda folder: [str(folder / "nowhere"), "--budget", "3GB"], "nowhere"),
        (lambda folder: ["--budget", "3GB", "--experts", "99"], "--experts: 99"),
        (lambda folder: ["--budget", "3GB", "--require", "beauty=1"], "beauty"),
        (lambda folder: ["--budget", "3GB", "--calibration", str(folder / "no.txt")], "no.txt"),
        (lambda folder: [], "--budget"),
        (lambda folder: ["--recipe", str(folder / "mine.yaml"), "--quant", "Q8_0"], "--quant: the recipe holds"),
        (lambda folder: ["--recipe", str(folder / "mine.yaml"), "--student", "dense"], "--student: the recipe holds"),
        (lambda folder: ["--budget", "3GB", "--student", "dense", "--experts", "9"], "--experts: a dense student"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: Callable[[Path], list[str]], said: str, run_command: Run, tmp_path: Path
) -> None:
    assert_refused(run_command, tmp_path, arguments(tmp_path), said)


def test_a_folder_of_somebody_else_is_not_touched(run_command: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    result = run_command([sys.executable, "-m", "exporter", "--budget", "10MB", "--out", str(tmp_path / "out")])
    assert result.returncode == 2
    assert "choose another folder" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("flag", ["--out", "--work-dir"])
def test_a_place_where_nothing_can_be_written_is_refused_before_any_work(
    flag: str, run_command: Run, tmp_path: Path
) -> None:
    """/proc takes no files, not even root's."""
    places = ["--out", str(tmp_path / "out"), flag, "/proc/self/moe-export"]
    result = run_command([sys.executable, "-m", "exporter", "--budget", "10MB", *places])
    assert result.returncode == 2
    assert f"error: {flag}: nothing can be written in /proc/self" in result.stderr
    assert result.stderr.endswith("; choose another place\n")
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_too_little_is_refused_with_the_figures(
    run_command: Run, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "exporter", "--budget-kind", "file", "--budget", "10MB", "--memory", "200MB"]
    command += _given(small_texts)
    result = run_command([*command, "--out", str(tmp_path / "out")])
    assert result.returncode == 2
    assert "error: --memory: 200.0 MB (190.7 MiB) (without the flag it is half of what is free)" in result.stderr
    assert "is below the 864.5 MB (824.4 MiB) that this model needs (two decoder layers 13.4 MB" in result.stderr
    assert "give more of it, close programs, or use --force" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plan_shows_the_time_and_what_the_run_itself_needs(
    run_command: Run, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Nothing is refused: the plan is there to be looked at."""
    command = [sys.executable, "-m", "exporter", "--budget-kind", "file", "--budget", "10MB", "--memory", "200MB"]
    command += _given(small_texts)
    result = run_command([*command, "--out", str(tmp_path / "new" / "out"), "--dry-run"])
    assert result.returncode == 0, result.stderr
    for line in ("time ", "(calibration ", "work on disk, at most ", "hidden states ", "memory, at least "):
        assert line in result.stdout
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.recipe.yaml"]


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can(
    run_command: Run, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "exporter", "--budget-kind", "file", "--out", str(tmp_path / "out")]
    command += _given(small_texts)
    result = run_command([*command, "--budget", "1MB"])
    assert result.returncode == 3
    found = re.search(r"smallest budget that works is --budget (\d+B), and GGUF alone fits yours", result.stderr)
    assert found is not None, result.stderr
    smallest = found[1]
    assert list(tmp_path.iterdir()) == []
    assert run_command([*command, "--budget", smallest, "--dry-run"]).returncode == 0
    too_little = f"{int(smallest[:-1]) - 1}B"
    assert run_command([*command, "--budget", too_little, "--dry-run"]).returncode == 3


def assert_refused(run_command: Run, folder: Path, arguments: Sequence[str], said: str) -> None:
    out = folder / "out"
    result = run_command([sys.executable, "-m", "exporter", *arguments, "--out", str(out)])
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()
    assert not out.with_name("out.work").exists()
