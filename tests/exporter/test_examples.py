"""The scripts in ``examples/`` run as they stand, on a small model and short texts."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from examples import export_model, fits_machines, inspect_model, validate_files
from exporter import Flags, fits, inspect, validate
from tests.exporter.stage_runs import stages_in_this_process

_FOLDER = Path(__file__).parents[2] / "examples"


def test_the_page_lists_all_scripts() -> None:
    listed = re.findall(r"`python examples/(\w+\.py) ", (_FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(file.name for file in _FOLDER.glob("*.py"))


def test_a_model_is_inspected(toy_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_model.main(str(toy_model))
    printed = capsys.readouterr().out
    assert f"2 layers, {inspect(toy_model)['parameters']:,} parameters" in printed
    assert "32 experts in a layer, 4 for each token: softmax over all experts" in printed
    assert "gguf: can hold it" in printed


def test_machines_are_compared(toy_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits_machines.main(str(toy_model))
    printed = capsys.readouterr().out
    for row in fits(toy_model, machines=["8gb-gpu", "16gb-mac", "32gb-laptop"]):
        assert f"{row['machine']}: {row['file'] / 1e9:.2f} GB" in printed and row["run"] in printed


def test_a_model_is_exported_and_validated(
    toy_model: Path,
    small_texts: tuple[Path, Path],
    short_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calibration = small_texts[0] / "religion.txt"
    monkeypatch.setattr(export_model, "Flags", partial(Flags, calibration=calibration, text=short_text, threads=1))
    with stages_in_this_process():
        export_model.main(str(toy_model), "90MB", str(tmp_path / "out"))
    exported = capsys.readouterr().out
    (perplexity,) = re.findall(r"^llama.cpp: perplexity ([\d.]+), divergence 0\.0", exported, re.MULTILINE)
    assert exported.endswith(f"{tmp_path / 'out'}\n")
    monkeypatch.setattr(validate_files, "validate", partial(validate, text=short_text, threads=1))
    validate_files.main(str(tmp_path / "out"))
    assert f"gguf in llama.cpp: perplexity {perplexity}\n" in capsys.readouterr().out
