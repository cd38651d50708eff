"""A whole run from a GGUF file keeps the experts that the run from the checkpoint keeps, and changes none of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml

from compressors.calibration.statistics import StatisticsCollector
from compressors.model.files.tokenizer_files import tokens_of
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]

_N_KEPT = 20


@pytest.fixture(scope="module")
def file(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "toy-Q8_0.gguf"
    write_gguf(Student.teacher(open_source(toy_model)), "Q8_0", path, name="toy", threads=1)
    return path


@pytest.fixture(scope="module")
def outs(
    toy_model: Path,
    file: Path,
    tiny_recipe: Path,
    small_texts: tuple[Path, Path],
    run_command: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The output folders of a whole run from each, by the same recipe."""
    folder = tmp_path_factory.mktemp("outs")
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["source"] = {"model": "toy", "identity": None}
    recipe["compress"] = {"method": "reap", "experts": _N_KEPT}
    recipe["budget"]["bytes"] = 50_000_000
    recipe["recover"] |= {"rungs": [], "after_quantizing": None}
    recipe |= {"gguf": {"mix": "Q8_0", "quantizer": "kernel"}, "onnx": None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    outs = {"file": folder / "from-file", "checkpoint": folder / "from-checkpoint"}
    for model, out in zip((file, toy_model), outs.values(), strict=True):
        result = run_command(
            [
                *(sys.executable, "-m", "exporter", str(model), "--recipe", str(folder / "recipe.yaml")),
                *("--calibration", str(small_texts[0]), "--text", str(small_texts[1]), "--out", str(out)),
            ]
        )
        assert result.returncode == 0, result.stdout + result.stderr
    return outs


def _report(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def _perplexity(out: Path) -> float:
    rows = {row["artifact"]: row for row in _report(out)["validation"]}
    return float(rows["gguf"]["perplexity"])


def test_no_byte_of_a_kept_expert_changes(file: Path, outs: dict[str, Path]) -> None:
    kept = _report(outs["file"])["student"]["kept"]
    assert [len(layer) for layer in kept] == [_N_KEPT, _N_KEPT]
    (written,) = outs["file"].glob("*.gguf")
    before, after = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (file, written))
    for layer, experts in enumerate(kept):
        for name in ("gate", "up", "down"):
            key = f"blk.{layer}.ffn_{name}_exps.weight"
            np.testing.assert_array_equal(after[key].data, before[key].data[experts])


def test_the_file_is_as_good_as_one_that_is_pruned_and_then_quantized(outs: dict[str, Path]) -> None:
    assert _perplexity(outs["file"]) == pytest.approx(_perplexity(outs["checkpoint"]), rel=0.01)


def test_the_report_knows_where_it_comes_from(file: Path, outs: dict[str, Path]) -> None:
    source = _report(outs["file"])["source"]
    assert source["identity"] == open_source(file).identity()
    assert (source["dtype"], source["stored_as"]) == ("float32", "blocks of Q8_0")
    assert source["bytes"] == file.stat().st_size
    (ratio,) = (one["size_ratio"] for one in _report(outs["file"])["against_original"]["files"].values())
    assert 0.6 < ratio < 0.8
    assert "in blocks of Q8_0" in (outs["file"] / "README.md").read_text()
    named = {of: {path.name for path in outs[of].iterdir()} for of in ("file", "checkpoint")}
    assert named["file"] == named["checkpoint"] - {"LICENSE"}, "a GGUF file has no text of its licence"


def _reap_scores(source: Source, tokens_BT: torch.Tensor) -> list[torch.Tensor]:
    collector = StatisticsCollector(source.spec)
    StreamedModel(Student.teacher(source)).stream([TokenGroup(tokens_BT, [collector.observe])])
    return [collector.take(layer).reap_scores() for layer in range(source.spec.n_layers)]


@torch.no_grad()
def test_survivors_are_those_of_the_original_but_for_near_ties(
    toy_model: Path, file: Path, small_texts: tuple[Path, Path]
) -> None:
    text = (small_texts[0] / "encyclopedic.txt").read_text(encoding="utf-8")
    (tokens,) = tokens_of(toy_model, [text])
    tokens_BT = torch.tensor(tokens[: 16 * 512]).view(16, 512)
    original, from_file = (_reap_scores(open_source(path), tokens_BT) for path in (toy_model, file))
    for ours, theirs in zip(from_file, original, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)
        kept, wanted = (set(scores.topk(_N_KEPT).indices.tolist()) for scores in (ours, theirs))
        threshold = theirs.topk(_N_KEPT).values[-1]
        swapped = sorted(kept ^ wanted)
        assert all(abs(theirs[expert] / threshold - 1) < 0.02 for expert in swapped), swapped
