"""What a model costs in a runtime: memory, load time and speed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RuntimeCost", "peak_rss_bytes"]


@dataclass(frozen=True)
class RuntimeCost:
    """Measured in a process that did nothing else."""

    peak_rss_bytes: int  # largest resident set of the process, weights included
    base_rss_bytes: int  # the same before the model was loaded: interpreter and libraries
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


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
