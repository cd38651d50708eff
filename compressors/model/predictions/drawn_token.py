"""Draws a next token so that similar models draw the same one, in numpy alone: runtimes' processes have no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["drawn_token"]


def drawn_token(logits_V: npt.NDArray[np.floating[Any]], key: Sequence[int]) -> int:
    """Draws a token from the softmax of the logits, at temperature 1; the key decides the random numbers.

    Every token gets a waiting time, exponential with its probability as the rate, and the first one is drawn (the
    Gumbel-max trick). Two models whose distributions have the total variation distance D draw different tokens with a
    probability of at most 2 D / (1 + D) (M. Daliri et al., Coupling without Communication and Drafter-Invariant
    Speculative Decoding, arXiv 2408.07978); by one number on the cumulative distribution they differ far more often,
    because a change of one token's probability moves the places of all later tokens.

    Args:
        logits_V: the logits of the next token; a longer vocabulary with the same first tokens keeps their numbers.
        key: such as the text and the place in it.
    """
    waits_V = np.random.default_rng(list(key)).standard_exponential(len(logits_V))
    return int((logits_V.astype(np.float64) - np.log(waits_V)).argmax())
