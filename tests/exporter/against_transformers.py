"""Stock transformers as the reference of what a file or the streamed model computes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from validate.runtimes.backend import Backend, scored_positions

SAME = 1e-6
"""Mean divergence in nats that two float32 implementations of one model stay below; measured is less than 1e-7."""


def log_probs(model: torch.nn.Module, tokens_BT: npt.NDArray[np.int64]) -> torch.Tensor:
    """float32 [B, S, V] at the positions that a backend scores, by stock transformers."""
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens_BT)).logits[:, scored_positions(tokens_BT.shape[1])]
    return torch.log_softmax(logits, -1)


def divergence(expected: torch.Tensor, backend: Backend, tokens_BT: npt.NDArray[np.int64]) -> float:
    """Mean KL divergence of a backend from the reference, in nats."""
    outputs = torch.stack([torch.from_numpy(output.logits_SV.copy()) for output in backend.run(tokens_BT)])
    found = torch.log_softmax(outputs, -1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())
