"""What a model costs in a runtime: memory, load time and speed.

Speeds are medians of short runs: one that another program disturbed does not count.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Runs", "RuntimeCost", "peak_rss_bytes"]


@dataclass(frozen=True)
class RuntimeCost:
    """Measured in a process that did nothing else."""

    peak_rss_bytes: int  # largest resident set of the process, weights included
    base_rss_bytes: int  # the same before the model was loaded: interpreter and libraries
    load_seconds: float  # of one load; the file may lie in the system's cache
    prefill_tokens_per_second: float  # median over the prompt's pieces
    prefill_runs: int  # those pieces
    decode_tokens_per_second: float  # median over single tokens at the full context
    decode_runs: int  # those tokens
    buffers: Mapping[str, int] | None = None  # bytes by purpose, as the runtime itself reports them
    device_bytes: int | None = None  # of those buffers, what lies on a GPU; None if the runtime reports none


class Runs:
    """Times consecutive pieces of work: each is a run."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._speeds: list[float] = []

    def done(self, n_tokens: int) -> None:
        """Another run of so many tokens ends now."""
        now = time.perf_counter()
        self._speeds.append(n_tokens / (now - self._last))
        self._last = now

    @property
    def tokens_per_second(self) -> float:
        """The median."""
        return statistics.median(self._speeds)

    def __len__(self) -> int:
        return len(self._speeds)


def peak_rss_bytes() -> int:
    """The largest resident set this process has had.

    Linux: VmHWM of ``/proc/self/status``, which a forked child does not inherit, as it does ``ru_maxrss``.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
