"""The model with latent attention is trained with biases that take part; its bars are read from a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.latent.__main__ import bars, markdown
from benchmarks.latent.model import train_latent_model
from benchmarks.training import Training
from compressors.model.description.roles import Role
from compressors.model.sources.opening import open_source


def test_the_model_is_a_checkpoint_whose_biases_follow_the_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("benchmarks.latent.model._TRAINING", Training(seed=1, length=32, steps=2, warm_up=1))
    try:
        train_latent_model(tmp_path / "model")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    source = open_source(tmp_path / "model")
    assert [layer.n_experts for layer in source.spec.layers] == [0, 32, 32, 32]
    bias_E = source.tensor(Role.SELECTION_BIAS, 1)
    assert bias_E.dtype == torch.float32
    assert (bias_E > 0).any() and (bias_E < 0).any()


def _report(overlap: float, after: float) -> dict[str, Any]:
    floor = {
        "perplexity": 50.1,
        "perplexity_torch": 50.0,
        "perplexity_ratio": 1.002,
        "kld": {"mean": 1e-4},
        "top1_agreement": 0.99,
        "routing": {"overlap": overlap},
    }
    rows = [{"artifact": name, "runtime": "torch", "perplexity": 48.0, "kld": {"mean": 0.2}} for name in ("a", "b")]
    files = [
        row | {"artifact": name, "runtime": name, "floor": {"same_weights": floor}}
        for name, row in zip(("gguf", "onnx"), rows, strict=True)
    ]
    rung = {"rung": "router", "tokens": 1000, "learning_rate": 0.1, "accepted": True}
    routers = rung | {"selection_kld_before": 0.5, "selection_kld_after": 0.48}
    experts = rung | {"selection_kld_before": 0.48, "selection_kld_after": after}
    ruined = rung | {"selection_kld_before": after, "selection_kld_after": 9.0, "accepted": False}
    return {
        "source": {"bytes": 7_000_000},
        "artifacts": [{"format": name, "bytes": 1_000_000} for name in ("gguf", "onnx")],
        "validation": [*rows, *files],
        "recovery": [routers, experts, ruined],
    }


@pytest.mark.parametrize(("overlap", "after", "n_missed"), [(0.995, 0.3, 0), (0.98, 0.3, 2), (0.995, 0.45, 1)])
def test_bars_are_judged(overlap: float, after: float, n_missed: int) -> None:
    report = _report(overlap, after)
    assert sum(not bar.is_met for bar in bars(report)) == n_missed
    assert markdown(report).count("| missed |") == n_missed
