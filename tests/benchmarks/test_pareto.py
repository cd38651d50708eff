"""The comparison with llama.cpp: what its tools print is read, and promises are judged as they were made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.decode import one_type
from benchmarks.export.llama_cpp import Tools
from benchmarks.pareto.bars import SIZES_OF_PRESETS, judged
from benchmarks.pareto.llama_cpp import Figures, Measuring
from benchmarks.pareto.table import write_markdown
from benchmarks.third_model import train_third_model
from benchmarks.training import Training
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.sources.opening import open_source
from exporter.curve.rows import OURS, ParetoRow

_PRESET = ParetoRow("fine", "llama-quantize", "Q4_K_M", 14_000_000, 0.33, 0.004, 0.0001, 0.95, 41.4)
_OURS = replace(
    _PRESET, method=OURS, n_bytes=13_999_000, structure="all 32 experts", predicted=0.0011, budget=14_000_000
)

_PRINTED = """\
Mean PPL(Q)                   :  41.455661 ±   1.234567
Mean    KLD:   0.003400 ±   0.000093
Same top p: 95.856 ± 0.228 %
"""


def _program(folder: Path, name: str, script: str) -> tuple[str, ...]:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return (str(path),)


def test_what_llama_perplexity_prints_is_read(tmp_path: Path) -> None:
    (tmp_path / "printed").write_text(_PRINTED)
    script = 'case "$*" in *--save-all-logits*) for last; do :; done; touch "$last"; echo Final estimate;; '
    script += f'*) cat "{tmp_path}/printed";; esac'
    nothing = ("false",)
    tools = Tools(nothing, nothing, perplexity=_program(tmp_path, "perplexity", script), imatrix=nothing)
    measuring = Measuring(tools, tmp_path / "whole.gguf", tmp_path / "work", 1)
    assert measuring.figures(tmp_path / "some.gguf") == Figures(0.0034, 0.000093, pytest.approx(0.95856), 41.455661)
    assert (tmp_path / "work" / "heldout.kld").exists()


@pytest.mark.parametrize(
    ("divergence", "is_kept"), [(0.45 * 0.004, True), (0.45 * 0.004 + 1e-6, False), (0.0041, False)]
)
def test_a_promise_is_a_share_of_the_best_preset(divergence: float, is_kept: bool) -> None:
    (one,) = judged([_PRESET, replace(_OURS, divergence=divergence)])
    assert one.baseline == _PRESET and one.bar == pytest.approx(0.0018) and one.is_kept is is_kept


def test_a_promise_in_nats_is_broken_by_a_better_baseline() -> None:
    small = replace(_OURS, mix="7.0 MB", n_bytes=6_999_000, budget=7_000_000, divergence=0.02)
    (alone,) = judged([_PRESET, small])
    assert alone.is_kept and alone.baseline is None
    (beside,) = judged([replace(_PRESET, n_bytes=6_900_000, divergence=0.019), small])
    assert not beside.is_kept


def test_the_table_has_every_row(tmp_path: Path) -> None:
    rows = [_PRESET, replace(_OURS, divergence=0.001)]
    write_markdown(rows, [], tmp_path / "pareto.md")
    text = (tmp_path / "pareto.md").read_text()
    assert "| fine | Q4_K_M | 13,999,000 | all 32 experts | 0.00100 | 0.00110 | llama-quantize, Q4_K_M: 0.00400" in text
    assert text.count("\n| llama-quantize, Q4_K_M |") == text.count("\n| moe-export, Q4_K_M |") == 1


def test_every_bar_of_a_preset_names_one() -> None:
    from benchmarks.pareto.baselines import MIXES

    assert {mix for mixes in SIZES_OF_PRESETS.values() for mix in mixes} <= set(MIXES)


def test_a_file_of_one_type_has_it_in_every_matrix(fine_folder: Path) -> None:
    tensors = one_type(open_source(fine_folder).spec, "Q8_0")
    types = {tensor.ggml_type for tensor in tensors if tensor.is_matrix}
    assert types == {GGMLQuantizationType.Q8_0}


def test_the_third_model_is_a_checkpoint_that_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("benchmarks.third_model._TRAINING", Training(seed=1, steps=3))
    try:
        train_third_model(tmp_path / "model")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    spec = open_source(tmp_path / "model").spec
    assert (spec.n_layers, spec.n_experts, spec.expert_width) == (4, 16, 256)
