"""Numbers as people read them, with the same rounding in every output. ``None`` and NaN, not measured, are a dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeGuard, TypeVar

__all__ = [
    "DASH",
    "change",
    "count",
    "divergence",
    "duration",
    "exact_bytes",
    "fixed",
    "interval",
    "parameters",
    "percent",
    "perplexity",
    "plain",
    "size",
    "size_parts",
    "speed",
]

DASH = "\N{EN DASH}"

_Number = TypeVar("_Number", int, float)

_DECIMAL_UNITS = ("B", "KB", "MB", "GB", "TB")
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(n_bytes: int | None) -> str:
    """Formats bytes in both conventions, which differ by 7 % at this size: ``20.00 GB (18.63 GiB)``."""
    decimal, binary = size_parts(n_bytes)
    return decimal if decimal == binary else f"{decimal} ({binary})"


def size_parts(n_bytes: int | None) -> tuple[str, str]:
    """Formats bytes in units of powers of 1000 and of 1024."""
    if not _known(n_bytes):
        return DASH, DASH
    return _scaled(n_bytes, 1000, _DECIMAL_UNITS), _scaled(n_bytes, 1024, _BINARY_UNITS)


def exact_bytes(n_bytes: int | None) -> str:
    """Formats bytes exactly: ``9,940,128 bytes``."""
    return DASH if not _known(n_bytes) else f"{n_bytes:,} bytes"


def perplexity(value: float | None, error: float | None = None) -> str:
    """Formats a perplexity with two decimals, and its standard error if it is known."""
    if not _known(value):
        return DASH
    return f"{value:,.2f}" if not _known(error) else f"{value:,.2f} ± {error:.2f}"


def divergence(nats: float | None) -> str:
    """Formats a divergence with four decimals; a small number that would round to zero is "less than the last digit".

    A reference in 16 bits can make a divergence of zero slightly negative.
    """
    if not _known(nats):
        return DASH
    return "< 0.0001" if 0 < abs(nats) < 0.00005 else _signed(f"{nats:.4f}")


def fixed(value: float | None, digits: int, scale: float = 1.0, error: float | None = None) -> str:
    """Formats ``scale`` times a value with ``digits`` decimals, and its standard error if known: ``-0.028 ± 0.021``."""
    if not _known(value):
        return DASH
    text = _signed(f"{scale * value:.{digits}f}")
    return text if not _known(error) else f"{text} ± {scale * error:.{digits}f}"


def percent(fraction: float | None) -> str:
    """Formats a fraction of 1 with two decimals of a percent; only exactly 1 is printed as 100 %."""
    if not _known(fraction):
        return DASH
    if 0.99995 <= fraction < 1:
        return "> 99.99 %"
    return _signed(f"{100 * fraction:.2f} %")


def interval(ends: Sequence[float] | None, style: Callable[[float], str]) -> str:
    """Formats ``1.20 to 1.40``, both ends in the style of their figure, the unit once; empty if there is none."""
    return "" if ends is None else f"{style(ends[0]).removesuffix(' %')} to {style(ends[1])}"


def change(before: float | None, after: float | None) -> str:
    """Formats a relative change with its sign: ``+12.3 %``; below one percent with two decimals."""
    if not _known(before) or not _known(after) or not before:
        return DASH
    percents = 100 * (after / before - 1)
    return _signed(f"{percents:+.{1 if abs(percents) >= 1 else 2}f} %")


def count(number: int | None) -> str:
    """Formats a whole number with commas between thousands."""
    return DASH if not _known(number) else f"{number:,}"


def parameters(number: int | None) -> str:
    """Formats a number with three digits: ``21.2 million``, ``30.5 billion``."""
    if not _known(number):
        return DASH
    for unit, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,}"


def speed(tokens_per_second: float | None) -> str:
    """Formats tokens per second, with a decimal only below one hundred."""
    if not _known(tokens_per_second):
        return DASH
    return f"{tokens_per_second:,.1f}" if tokens_per_second < 100 else f"{tokens_per_second:,.0f}"


def duration(seconds: float | None) -> str:
    """Formats a duration in its two largest units: ``0.4 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if not _known(seconds):
        return DASH
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plain(value: float | None) -> str:
    """Formats a number of unknown meaning: whole numbers with separators, others with up to four decimals."""
    if not _known(value):
        return DASH
    if math.isinf(value):
        return "infinite"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:.4f}".rstrip("0") if abs(value) >= 0.001 else f"{value:.2e}"


def _signed(text: str) -> str:
    """Returns the text with a real minus sign, and without a sign if all digits are zero."""
    if not any(digit in text for digit in "123456789"):
        return text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def _known(value: _Number | None) -> TypeGuard[_Number]:
    return value is not None and not math.isnan(value)


def _scaled(n_bytes: int, base: int, units: tuple[str, ...]) -> str:
    if n_bytes < base:
        return f"{n_bytes:,} B"
    value, unit = float(n_bytes), 0
    # 999.996 would be printed as 1000.00: the next unit says it better.
    while round(value, 2) >= base and unit + 1 < len(units):
        value, unit = value / base, unit + 1
    return f"{value:.2f} {units[unit]}"
