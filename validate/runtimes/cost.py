"""The cost of a model in a runtime: memory, load time and speed.

Speeds are medians of short runs, so a run that another program disturbed does not count.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from compressors.model.errors import InputError
from validate.runtimes.mapped_pages import bytes_with_all_pages

__all__ = [
    "CHUNK_TOKENS",
    "LEAST_CONTEXT",
    "Feed",
    "Runs",
    "RuntimeCost",
    "measure_cost",
    "own_bytes",
    "peak_rss_bytes",
]

Feed = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]
"""Appends tokens to a model's sequence; returns the next token's logits [V], valid until the next call."""

CHUNK_TOKENS = 512
"""Prompts are fed in pieces of this many tokens, which both runtimes take at once by default."""

_DECODED_TOKENS = 32
LEAST_CONTEXT = 2 * _DECODED_TOKENS
"""The fewest tokens of cache that can be measured."""


@dataclass(frozen=True)
class RuntimeCost:
    """The cost of a model, measured in a process that did nothing else."""

    peak_rss_bytes: int  # largest resident set of the process, all pages of the weights included
    base_rss_bytes: int  # the same before the model was loaded: interpreter and libraries
    load_seconds: float  # time of one load; the file may lie in the system's cache
    prefill_tokens_per_second: float  # median over the prompt's pieces
    prefill_runs: int  # the number of these pieces
    decode_tokens_per_second: float  # median over single tokens at the full context
    decode_runs: int  # the number of these tokens
    buffers: Mapping[str, int] | None = None  # bytes by purpose, as the runtime itself reports them
    device_bytes: int | None = None  # bytes of these buffers on a GPU; None if the runtime reports none


def measure_cost(load: Callable[[], Feed], *, context: int, prompt_tokens: Sequence[int]) -> RuntimeCost:
    """Loads a model, fills its cache and generates; call it in a process of its own, or the peak is not the model's.

    The prompt is fed in pieces of 512 tokens until 32 tokens of the context are left, which are then generated.
    Prefill speed is the median over the pieces, decode speed that over the tokens, at the full context.

    Args:
        load: opens the model with an empty cache.
        context: tokens of cache to fill, at least 64.
        prompt_tokens: the text to feed, repeated until the cache is full.

    Raises:
        InputError: the model cannot be loaded, the context is too short or the prompt is empty.
    """
    if context < LEAST_CONTEXT or not len(prompt_tokens):
        raise InputError(f"measuring needs a context of at least {LEAST_CONTEXT} tokens and a prompt")
    base = peak_rss_bytes()
    started = time.perf_counter()
    feed = load()
    load_seconds = time.perf_counter() - started
    prompt = np.resize(np.asarray(prompt_tokens, dtype=np.int64), context - _DECODED_TOKENS)
    prefill = Runs()
    for first in range(0, len(prompt), CHUNK_TOKENS):
        piece = prompt[first : first + CHUNK_TOKENS]
        logits_V = feed(piece)
        prefill.done(len(piece))
    decode = Runs()
    for _ in range(_DECODED_TOKENS):
        logits_V = feed(np.array([logits_V.argmax()]))
        decode.done(1)
    return RuntimeCost(
        peak_rss_bytes=max(peak_rss_bytes(), bytes_with_all_pages()),
        base_rss_bytes=base,
        load_seconds=load_seconds,
        prefill_tokens_per_second=prefill.tokens_per_second,
        prefill_runs=len(prefill),
        decode_tokens_per_second=decode.tokens_per_second,
        decode_runs=len(decode),
    )


class Runs:
    """Times consecutive pieces of work; each is a run."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._speeds: list[float] = []

    def done(self, n_tokens: int) -> None:
        """Ends another run, of ``n_tokens`` tokens."""
        now = time.perf_counter()
        self._speeds.append(n_tokens / (now - self._last))
        self._last = now

    @property
    def tokens_per_second(self) -> float:
        """The median speed."""
        return statistics.median(self._speeds)

    def __len__(self) -> int:
        return len(self._speeds)


def own_bytes() -> int:
    """The memory that this process takes for itself now; pages of files that it maps, which may go, do not count.

    Where the system does not tell them apart, they count if no other process maps them.
    """
    anonymous = _of_status("RssAnon")
    return psutil.Process().memory_full_info().uss if anonymous is None else anonymous


def peak_rss_bytes() -> int:
    """The largest resident set that this process has had.

    On Linux it is VmHWM of ``/proc/self/status``, which a forked child, unlike ``ru_maxrss``, does not inherit.
    """
    peak = _of_status("VmHWM")
    if peak is not None:
        return peak
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _of_status(name: str) -> int | None:
    """Bytes of a line of ``/proc/self/status``; None if there is none."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
