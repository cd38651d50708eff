"""Does the model loop? Pruned models fall into repetition before their perplexity shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from validate.backend import RuntimeBackend

__all__ = ["Repetition", "ends_in_a_loop", "measure_repetition"]

_GENERATED_TOKENS = 64
_LONGEST_CYCLE = 16


@dataclass(frozen=True)
class Repetition:
    """Of a few greedy continuations."""

    prompts: int
    loop_rate: float  # share that ends in a loop
    end_of_text_rate: float  # share that ends the text by itself


def measure_repetition(
    backend: RuntimeBackend, prompts: Sequence[npt.NDArray[np.int64]], end_of_text: Sequence[int]
) -> Repetition:
    """Continues each prompt greedily by 64 tokens in the runtime."""
    loops = ended = 0
    for prompt in prompts:
        tokens = backend.greedy(prompt.tolist(), _GENERATED_TOKENS)
        stops = [index for index, token in enumerate(tokens) if token in end_of_text]
        ended += bool(stops)
        loops += ends_in_a_loop(tokens[: stops[0]] if stops else tokens)
    return Repetition(len(prompts), loops / len(prompts), ended / len(prompts))


def ends_in_a_loop(tokens: Sequence[int]) -> bool:
    """Whether a sequence ends in the same 1 to 16 tokens three times in a row (at least 8 tokens in all)."""
    for cycle in range(1, _LONGEST_CYCLE + 1):
        length = max(3 * cycle, 8)
        tail = list(tokens[-length:])
        if len(tail) == length and tail[cycle:] == tail[:-cycle]:
            return True
    return False
