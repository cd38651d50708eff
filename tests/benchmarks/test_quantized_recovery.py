"""The table of routers taught before and after quantization says what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quantized_recovery import Measured, interval, write_csv, write_markdown


def test_the_interval_is_that_of_a_mean() -> None:
    """The interval over many chunks reaches 1.96 standard errors to each side."""
    differences_C = np.random.default_rng(1).normal(-0.02, 0.1, size=400)
    low, high = interval(differences_C)
    error = differences_C.std() / 20
    assert (low + high) / 2 == pytest.approx(differences_C.mean(), abs=0.1 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert interval(np.full(30, 0.5)) == (0.5, 0.5)


def _measured(arm: str, value: float) -> Measured:
    heldout = {"llama.cpp": np.full(5, value), "onnxruntime": np.full(5, value / 2)}
    return Measured(arm, value / 4, value, heldout)


def test_both_files_have_every_arm_and_each_comparison_its_sign(tmp_path: Path) -> None:
    pruned = {"none": 1.0, "before": 0.8, "after": 0.7, "before, twice": 0.6, "before, then after": 0.66}
    whole = {"none": 0.01, "after, rate 1e-05": 0.008, "after, rate 0.0001": 0.012}
    tables = {
        n_experts: [_measured(arm, value) for arm, value in arms.items()]
        for n_experts, arms in ((16, pruned), (32, whole))
    }
    write_csv(tables, tmp_path / "x.csv")
    write_markdown(tables, tmp_path / "x.md")
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert lines[:2] == [
        "experts,routers,unquantized,selection,llama.cpp,onnxruntime",
        "16,none,0.2500,1.0000,1.0000,0.5000",
    ]
    assert len(lines) == 1 + len(pruned) + len(whole)
    page = (tmp_path / "x.md").read_text()
    assert "| before, twice | 0.1500 | 0.6000 | 0.6000 | 0.3000 |" in page
    assert "after against before, llama.cpp: -0.1000 nats (-0.1000 to -0.1000), -12.50%" in page
    assert "before, then after against before, twice, onnxruntime: +0.0300 nats (+0.0300 to +0.0300), +10.00%" in page
    assert "after, rate 0.0001 against none, llama.cpp: +0.0020 nats (+0.0020 to +0.0020), +20.00%" in page
