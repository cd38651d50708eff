"""Typed values from a JSON object of settings, and errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError, UnsupportedError
from compressors.model.names import shown

__all__ = ["Settings"]

_LARGEST_COUNT = 2**31 - 1


class Settings:
    """The settings of ``config.json``, or of an object in it.

    A method that takes a ``default`` returns it where the key is absent; without one the key is required. A value of
    the wrong type, null included, is refused, as transformers' strict configurations refuse it.

    Attributes:
        asked: the keys that code asked for; all others were not understood.
        values: the values that code goes by, under the keys that they are from: a default where a key is absent.

    Args:
        raw: the object.
        path: the file, for messages.
        name: the key of the object inside the file, for messages; empty for the file itself.
    """

    def __init__(self, raw: Mapping[str, Any], path: Path, name: str = "") -> None:
        self.raw = raw
        self.asked: set[str] = set()
        self.values: dict[str, object] = {}
        self.path = path
        self._prefix = f"{name}." if name else ""

    def __contains__(self, key: str) -> bool:
        self.asked.add(key)
        return key in self.raw

    def get(self, key: str, default: object = None) -> Any:
        """The value under a key, of whatever type."""
        self.asked.add(key)
        return self.raw.get(key, default)

    def note(self, key: str, value: object) -> None:
        """Says which value code goes by that looked at a key by :meth:`get`."""
        self.asked.add(key)
        self.values[key] = value

    def named(self, key: str) -> str:
        """File and key, for the beginning of a message: ``config.json: rope_parameters.factor``."""
        return f"{self.path}: {self._prefix}{key}"

    def refuse(self, error: UnsupportedError) -> None:
        """Raises the refusal of a value; settings that are read on trial note it."""
        raise error

    def objects(self, key: str) -> Settings:
        """The object of settings under a key; an empty one where the key is absent or null."""
        value = self.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self._wrong(key, "an object of settings")
        return Settings(value, self.path, f"{self._prefix}{key}")

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to 2^31 - 1."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_COUNT:
            raise self._wrong(key, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._value(key, default)
        if not _is_positive(value):
            raise self._wrong(key, "a positive number")
        return float(value)

    def number_or_null(self, key: str) -> float | None:
        """A positive, finite number; None where the key is absent or null."""
        return None if self.get(key) is None else self.number(key)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of ``length`` positive, finite numbers."""
        value = self._value(key, None)
        if not isinstance(value, list) or len(value) != length or not all(map(_is_positive, value)):
            raise self._wrong(key, f"a list of {length} positive numbers")
        return tuple(map(float, value))

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def _value(self, key: str, default: object) -> Any:
        value = self.raw[key] if key in self else default
        if value is None and key not in self.raw:
            raise InputError(f"{self.path} lacks {self._prefix + key!r}: the model cannot be read without it")
        self.note(key, value)
        return value

    def _wrong(self, key: str, wanted: str) -> InputError:
        return InputError(f"{self.named(key)} must be {wanted}, not {shown(self.raw.get(key))}")


def _is_positive(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 < value < 1e300 and math.isfinite(value)
