"""Durations as people write and read them: ``30m`` on the command line, ``about 1 h 40 min`` in a plan."""

from __future__ import annotations

import re

from compressors.model.errors import InputError
from compressors.model.names import shown

__all__ = ["format_duration", "parse_duration"]

_SECONDS = {"s": 1, "m": 60, "h": 3600}
_COARSER = 5 * 3600  # from here on single minutes say nothing


def parse_duration(text: str, flag: str = "duration") -> int:
    """Seconds of a duration such as ``90s``, ``30m`` or ``1.5h``.

    Raises:
        InputError: the text is not a duration or less than a second; the message names ``flag``.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)\s*([smh])", text.strip().lower(), re.ASCII)
    seconds = int(float(match[1]) * _SECONDS[match[2]]) if match else 0
    if seconds < 1:
        raise InputError(
            f"{flag}: '{shown(text)}' is not a duration; write a positive number and s, m or h, such as 30m"
        )
    return seconds


def format_duration(seconds: float) -> str:
    """An estimate, such as ``40 s``, ``25 min``, ``1 h 40 min`` or ``12 h``; rounded up to ten seconds, or a minute."""
    if seconds < 55:
        return f"{max(1, -(-int(seconds) // 10)) * 10} s"
    minutes = -(-int(seconds) // 60)
    if minutes < 60:
        return f"{minutes} min"
    if seconds >= _COARSER:
        return f"{round(seconds / 3600)} h"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
