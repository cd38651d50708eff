"""Sizes in bytes as people write them: ``20GB`` is 20 * 10^9 bytes, ``18.6GiB`` counts in units of 2^30."""

from __future__ import annotations

import re
from decimal import Decimal

from compressors.model.errors import InputError
from compressors.model.names import shown

__all__ = ["format_size", "parse_size", "size_label"]

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"(?P<number>[0-9]{1,18}(?:\.[0-9]*)?|\.[0-9]+)\s*(?P<unit>[a-z]*)", re.IGNORECASE | re.ASCII)


def parse_size(text: str, flag: str = "size") -> int:
    """Bytes of a size such as ``20GB``, ``18.6 GiB`` or ``1500000``; fractions of a byte are cut off.

    Raises:
        InputError: the text is not a size, has an unknown unit, or is less than one byte; the message names ``flag``.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"{flag}: '{shown(text)}' is not a size; write a positive number and a unit, such as 20GB or 18.6GiB"
        )
    unit = match["unit"].upper() or "B"
    if unit not in _UNITS:
        raise InputError(
            f"{flag}: the unit of '{shown(text)}' is not known; write KB, MB, GB or TB (powers of 1000), "
            "KiB, MiB, GiB or TiB (powers of 1024), or B"
        )
    # Decimal, because 18.6 * 2^30 in binary floating point can miss a byte.
    n_bytes = int(Decimal(match["number"]) * _UNITS[unit])
    if n_bytes < 1:
        raise InputError(f"{flag}: '{shown(text)}' is less than one byte; write a size such as 20GB")
    return n_bytes


def format_size(n_bytes: int) -> str:
    """The size in decimal and in binary units, such as ``20.0 GB (18.6 GiB)``; below 1000 bytes just ``999 B``."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    return f"{_scaled(n_bytes, 1000, 'B')} ({_scaled(n_bytes, 1024, 'iB')})"


def size_label(n_bytes: int) -> str:
    """The size as one word that is exact, such as ``20GB``, ``8.5MB`` or ``18.625GiB``."""
    for unit, factor in sorted(_UNITS.items(), key=lambda item: -item[1]):
        if n_bytes >= factor and n_bytes * 1000 % factor == 0:
            number = Decimal(n_bytes) / factor
            return f"{number.normalize():f}{unit.replace('IB', 'iB')}"
    raise AssertionError("every size is a number of bytes")


def _scaled(n_bytes: int, base: int, suffix: str) -> str:
    value = float(n_bytes)
    for prefix in "KMGT":
        value /= base
        # 999.96 would be printed as 1000.0: the next unit says it better.
        if round(value, 1) < base or prefix == "T":
            return f"{value:.1f} {prefix}{suffix}"
    raise AssertionError("the largest unit always returns")
