"""Drops whole layers: those that change the hidden states least.

He et al., "Demystifying the Compression of Mixture-of-Experts Through a Unified Framework" (arXiv 2406.02500): Layer
Drop removes MoE sub-layers, Block Drop whole decoder layers. The highest cosine between the states that enter and
those that leave, averaged over the tokens, is dropped first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from compressors.calibration.statistics import LayerStatistics
from compressors.model.errors import InputError
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.shrink.prune import highest

__all__ = ["block_similarities", "moe_similarities", "most_similar", "window_similarities"]


def moe_similarities(statistics: Sequence[LayerStatistics]) -> torch.Tensor:
    """Layer Drop's scores: mean cos(x, x + MoE(norm(x))) of each layer, float64 [L]."""
    return torch.stack([layer.moe_cosine_sum / layer.n_tokens.clamp_min(1) for layer in statistics])


def block_similarities(statistics: Sequence[LayerStatistics]) -> torch.Tensor:
    """Discrete Block Drop's scores: mean cos(input, output) of each decoder layer, float64 [L]."""
    return torch.stack([layer.block_cosine_sum / layer.n_tokens.clamp_min(1) for layer in statistics])


def most_similar(similarities_N: torch.Tensor, n_dropped: int, what: str) -> tuple[int, ...]:
    """Returns the layers (or MoE sub-layers) to drop, ascending; of equal scores the earlier goes.

    Args:
        similarities_N: the score of each.
        n_dropped: the number to drop.
        what: their name in the message.

    Raises:
        InputError: nothing would be left.
    """
    if not 0 <= n_dropped < len(similarities_N):
        raise InputError(
            f"cannot drop {n_dropped} of {len(similarities_N)} {what}: give a number from 0 to "
            f"{len(similarities_N) - 1}"
        )
    return highest(similarities_N, n_dropped)


@torch.no_grad()
def window_similarities(
    model: StreamedModel, tokens_BT: torch.Tensor, n_layers: int, progress: Callable[[int], None] | None = None
) -> torch.Tensor:
    """Consecutive Block Drop's scores: mean cosine between the states that enter layer i and leave layer i + n - 1.

    Args:
        model: the teacher.
        tokens_BT: int64 token blocks.
        n_layers: n, the layers that would go together.
        progress: called with 1 for each finished layer.

    Returns:
        float64 [L - n + 1], by the first layer of the window.
    """
    groups = [TokenGroup(tokens_BT)]
    hidden = model.first_states(groups)
    entered = deque([_copy(hidden[0])])
    scores = []
    for _ in model.advance(groups, hidden, range(model.spec.n_layers)):
        if len(entered) == n_layers:
            scores.append(_mean_cosine(entered.popleft(), hidden[0]))
        entered.append(_copy(hidden[0]))
        if progress is not None:
            progress(1)
    return torch.tensor(scores, dtype=torch.float64)


def _copy(states: HiddenStates) -> HiddenStates:
    copied = HiddenStates(states.shape, states.dtype, states.spill)
    for blocks in states.groups(_BLOCKS):
        copied.write(blocks, states.read(blocks))
    return copied


def _mean_cosine(before: HiddenStates, after: HiddenStates) -> float:
    total = torch.zeros((), dtype=torch.float64)
    for blocks in before.groups(_BLOCKS):
        first, second = before.read(blocks).float(), after.read(blocks).float()
        total += torch.cosine_similarity(first, second, dim=-1, eps=1e-30).sum(dtype=torch.float64)
    return total.item() / (before.shape[0] * before.shape[1])


_BLOCKS = 8  # blocks that are copied or compared at a time
