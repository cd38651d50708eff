"""Reads the buffers that llama.cpp allocated from its log."""

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
"""The lines of ``load_tensors``, ``llama_kv_cache``, ``llama_memory_recurrent`` and ``llama_context``."""
_ADDED = "KV"
_ON_HOST = re.compile("CPU.*|.*_Host")


class ReportedBuffers:
    """Bytes by device and purpose of one model; a later report of the same pair replaces the earlier one.

    Those of keys and values add up: where some layers have a window, these have a cache of their own.
    """

    def __init__(self) -> None:
        self._bytes: dict[tuple[str, str], int] = {}

    def clear(self) -> None:
        """Forgets the reports of earlier models."""
        self._bytes.clear()

    def read(self, line: str) -> None:
        """Reads a line of the log, if it is about a buffer."""
        match = _LINE.search(line)
        if match is not None:
            place, n_bytes = (match[1], match[2]), round(float(match[3]) * 2**20)
            self._bytes[place] = n_bytes + (self._bytes.get(place, 0) if match[2] == _ADDED else 0)

    @property
    def by_purpose(self) -> dict[str, int]:
        """Bytes of ``weights``, ``kv_cache``, ``recurrent_state``, ``compute`` and ``output``, over all devices."""
        return {
            ours: sum(n_bytes for (_, purpose), n_bytes in self._bytes.items() if purpose == theirs)
            for theirs, ours in _PURPOSES.items()
        }

    @property
    def on_device(self) -> int | None:
        """Bytes outside of the host's memory; None if there are none."""
        return sum(n_bytes for (device, _), n_bytes in self._bytes.items() if not _ON_HOST.fullmatch(device)) or None
