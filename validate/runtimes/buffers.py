"""The buffers that llama.cpp says it allocated, read from its log."""

from __future__ import annotations

import re

__all__ = ["ReportedBuffers"]

_PURPOSES = {
    "model": "weights",
    "KV": "kv_cache",
    "RS": "recurrent_state",
    "compute": "compute",
    "output": "output",
}
_LINE = re.compile(r"\s(\S+)\s+(model|KV|RS|compute|output) buffer size = +([0-9.]+) MiB")
"""As ``load_tensors``, ``llama_kv_cache``, ``llama_memory_recurrent`` and ``llama_context`` log them."""
_ON_HOST = re.compile("CPU.*|.*_Host")


class ReportedBuffers:
    """Bytes by device and purpose; what is reported again for the same pair replaces what was."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[str, str], int] = {}

    def clear(self) -> None:
        """Forgets what earlier models reported."""
        self._bytes.clear()

    def read(self, line: str) -> None:
        """Takes what a line of the log says, if it speaks of a buffer."""
        match = _LINE.search(line)
        if match is not None:
            self._bytes[match[1], match[2]] = round(float(match[3]) * 2**20)

    @property
    def by_purpose(self) -> dict[str, int]:
        """``weights``, ``kv_cache``, ``recurrent_state``, ``compute`` and ``output``, of all devices together."""
        return {
            ours: sum(n_bytes for (_, purpose), n_bytes in self._bytes.items() if purpose == theirs)
            for theirs, ours in _PURPOSES.items()
        }

    @property
    def on_device(self) -> int | None:
        """What does not lie in the host's memory; None if everything does."""
        return sum(n_bytes for (device, _), n_bytes in self._bytes.items() if not _ON_HOST.fullmatch(device)) or None
