"""Measures whether a model loops: pruned models fall into repetition before their perplexity shows it.

A few dozen beginnings of held-out text are continued greedily and at temperature 1, by the runtime with its KV cache
and by the teacher in torch. The random numbers of a draw belong to the prompt and the place, the same for every model:
two models with equal logits write equal texts. One more text is for people to read, and counts nowhere.

Letters: P prompts, N new tokens of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compressors.model.predictions.drawn_token import drawn_token
from validate.metrics.bootstrap import Interval
from validate.runtimes.backend import ChooseToken, RuntimeBackend

__all__ = [
    "EXAMPLE_TEMPERATURE",
    "NEW_TOKENS",
    "PROMPTS",
    "PROMPT_TOKENS",
    "GeneratedTexts",
    "TextFigures",
    "example_of",
    "example_prompt",
    "generate_texts",
    "generation_figures",
    "greedy",
    "largest_share_by_chance",
    "least_difference",
    "longest_repeat",
    "loops",
    "prompts_of",
    "rate_interval",
    "sampled",
]

PROMPTS = 24
"""The most prompts; with :data:`NEW_TOKENS` about five minutes of a runtime that decodes 10 tokens a second."""

PROMPT_TOKENS = 32

NEW_TOKENS = 64
"""Four times the longest cycle that counts as a loop."""

EXAMPLE_TEMPERATURE = 0.5
"""Temperature of the text that people read: greedy texts of small models loop, those at 1 wander off."""

_TEXTS_AT_ONCE = 16  # more are hardly faster, and each needs a cache

_LONGEST_CYCLE = 16
_NORMAL_QUANTILE = 1.959964  # at 97.5 %: a 95 % interval leaves out half of the rest on each side


@dataclass(frozen=True)
class GeneratedTexts:
    """A model's texts after the prompts: int64 [P, N] each; they may contain an end of text."""

    greedy_PN: npt.NDArray[np.int64]
    sampled_PN: npt.NDArray[np.int64]
    example_N: npt.NDArray[np.int64]  # after one prompt, for people to read


@dataclass(frozen=True)
class TextFigures:
    """The figures of texts that were written in one way; an end of text ends a text."""

    loop_rate: float  # share that ends in a loop
    loop_rate_interval: Interval
    end_of_text_rate: float  # share that ends by itself
    end_of_text_rate_interval: Interval
    longest_repeat_mean: float  # tokens of the longest n-gram that occurs twice in a text
    longest_repeat_max: int


def prompts_of(chunks_BT: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The beginnings of at most :data:`PROMPTS` chunks, evenly spaced so that every domain has its share: [P, 32].

    Chunks begin as the model needs it, with BOS or without.
    """
    n_prompts = min(PROMPTS, len(chunks_BT))
    chosen = [(2 * index + 1) * len(chunks_BT) // (2 * n_prompts) for index in range(n_prompts)]
    return chunks_BT[chosen, :PROMPT_TOKENS]


def example_prompt(n_prompts: int) -> int:
    """The prompt of the text that people read: two thirds down the list, whatever the models write after it.

    In the bundled text this is the Bible, whose sentences the bundled model writes best of its five domains.
    """
    return 2 * n_prompts // 3


def generate_texts(
    backend: RuntimeBackend, prompts_PT: npt.NDArray[np.int64], progress: Callable[[int], None] | None = None
) -> GeneratedTexts:
    """Continues every prompt in the runtime, in both ways.

    Args:
        backend: the loaded model.
        prompts_PT: int64 token ids.
        progress: called with the number of new texts.
    """
    example = example_prompt(len(prompts_PT))
    wanted: list[tuple[list[int], ChooseToken]] = []
    for number, prompt in enumerate(prompts_PT.tolist()):  # side by side, since equal prompts are run once
        wanted += [(prompt, greedy), (prompt, sampled(number))]
    wanted.append((prompts_PT[example].tolist(), sampled(example, temperature=EXAMPLE_TEMPERATURE)))
    texts: list[list[int]] = []
    for start in range(0, len(wanted), _TEXTS_AT_ONCE):
        prompts, choose = zip(*wanted[start : start + _TEXTS_AT_ONCE], strict=True)
        texts += backend.generate_together(prompts, NEW_TOKENS, choose)
        if progress is not None:
            progress(len(prompts))
    texts_BN = np.array(texts, dtype=np.int64)
    return GeneratedTexts(texts_BN[:-1:2], texts_BN[1:-1:2], texts_BN[-1])


def greedy(logits_V: npt.NDArray[np.float32]) -> int:
    """The most probable token."""
    return int(logits_V.argmax())


def sampled(prompt: int, first_place: int = 0, temperature: float = 1.0) -> ChooseToken:
    """Draws the tokens after a prompt, which is given by its number, from a place on."""
    places = itertools.count(first_place)
    return lambda logits_V: drawn_token(logits_V / temperature, (prompt, next(places)))


def generation_figures(texts: GeneratedTexts, end_of_text: Sequence[int]) -> dict[str, Any]:
    """The report's figures of a model's texts, as plain data."""
    return {
        "prompts": len(texts.greedy_PN),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "greedy": asdict(_figures(texts.greedy_PN, end_of_text)),
        "sampled": asdict(_figures(texts.sampled_PN, end_of_text)),
    }


def example_of(
    prompts_PT: npt.NDArray[np.int64],
    texts: GeneratedTexts,
    end_of_text: Sequence[int],
    decode: Callable[[list[int]], str],
) -> dict[str, Any]:
    """One prompt and a model's text after it for people to read, as plain data.

    Args:
        prompts_PT: the prompts.
        texts: the texts after them.
        end_of_text: the tokens that end a text.
        decode: turns tokens into text.
    """
    return {
        "prompt": decode(prompts_PT[example_prompt(len(prompts_PT))].tolist()),
        "temperature": EXAMPLE_TEMPERATURE,
        "text": decode(_until_end(texts.example_N.tolist(), end_of_text)),
    }


def _until_end(tokens: list[int], end_of_text: Iterable[int]) -> list[int]:
    """The tokens before the first that ends a text."""
    ends = set(end_of_text)
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


def _figures(texts_PN: npt.NDArray[np.int64], end_of_text: Iterable[int]) -> TextFigures:
    n_loops = n_ended = 0
    repeats = []
    for tokens in texts_PN.tolist():
        text = _until_end(tokens, end_of_text)
        n_ended += len(text) < len(tokens)
        n_loops += loops(text)
        repeats.append(longest_repeat(text))
    n_texts = len(repeats)
    return TextFigures(
        loop_rate=n_loops / n_texts,
        loop_rate_interval=rate_interval(n_loops, n_texts),
        end_of_text_rate=n_ended / n_texts,
        end_of_text_rate_interval=rate_interval(n_ended, n_texts),
        longest_repeat_mean=sum(repeats) / n_texts,
        longest_repeat_max=max(repeats),
    )


def loops(tokens: Sequence[int]) -> bool:
    """True if a text ends in the same 1 to 16 tokens three times in a row (at least 8 tokens in all)."""
    for cycle in range(1, _LONGEST_CYCLE + 1):
        length = max(3 * cycle, 8)
        tail = list(tokens[-length:])
        if len(tail) == length and tail[cycle:] == tail[:-cycle]:
            return True
    return False


def longest_repeat(tokens: Sequence[int]) -> int:
    """The length of the longest n-gram that occurs at least twice, perhaps overlapping; 0 if no token does.

    Longest repeated substrings show repetition inside texts (K. Lee et al., Deduplicating Training Data
    Makes Language Models Better, arXiv 2107.06499, section 4.1); here inside one text of a few dozen tokens.
    """
    length = 0
    while True:
        ngrams = [tuple(tokens[start : start + length + 1]) for start in range(len(tokens) - length)]
        if len(set(ngrams)) == len(ngrams):
            return length
        length += 1


def rate_interval(n_yes: int, n_all: int) -> Interval:
    """The 95 % interval of a share of a few independent texts: none out of 24 does not mean never.

    E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    squared = _NORMAL_QUANTILE**2
    share = n_yes / n_all
    center = (share + squared / (2 * n_all)) / (1 + squared / n_all)
    spread = math.sqrt(share * (1 - share) / n_all + squared / (4 * n_all**2)) / (1 + squared / n_all)
    return max(0.0, center - _NORMAL_QUANTILE * spread), min(1.0, center + _NORMAL_QUANTILE * spread)


def least_difference(n_yes: int, n_all: int, n_others: int, n_all_others: int) -> float:
    """The lower end of the 95 % interval of the difference of two shares, the first minus the other.

    R. Newcombe, Interval Estimation for the Difference Between Independent Proportions, 1998, method 10, which combines
    Wilson's intervals of both.
    """
    share, others = n_yes / n_all, n_others / n_all_others
    below, above = share - rate_interval(n_yes, n_all)[0], rate_interval(n_others, n_all_others)[1] - others
    return share - others - math.hypot(below, above)


def largest_share_by_chance(n_yes: int, n_all: int) -> float:
    """The largest share that another model may have in as many texts before it counts as significantly larger."""
    not_more = [
        n_others for n_others in range(n_yes, n_all + 1) if least_difference(n_others, n_all, n_yes, n_all) <= 0
    ]
    return max(not_more) / n_all
