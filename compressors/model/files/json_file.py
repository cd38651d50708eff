"""Reads JSON that somebody else wrote: files, and the headers of safetensors files.

Python's own reader accepts input that no other reader of these files does (NaN, unbounded numbers, half of a
surrogate pair), and raises various errors. Here every error is one sentence that names the place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError
from compressors.model.files.raw_file import RawFile, instead_of_a_file
from compressors.model.names import shown

__all__ = ["parse_json", "read_json"]

_LARGEST = 256_000_000  # bytes; tokenizer.json of 250,000 tokens has about 35 million
_DEEPEST = 100  # levels of lists and objects; tokenizer.json has about 10, safetensors' own reader stops at 127
_DIGITS_AS_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_MOST_DIGITS = 64  # tokenizer_config.json says model_max_length with 31 where there is none


def read_json(path: Path, problem: str = "is not valid JSON") -> dict[str, Any]:
    """Reads a file that holds one JSON object. If a key stands there twice, the last value counts, as elsewhere.

    Args:
        path: the file.
        problem: the words of the message about a file that does not hold a JSON object.

    Raises:
        InputError: the file is missing, is not a regular file, is too large or empty, is not UTF-8 or not JSON, or
            holds something else than an object.
    """
    file = RawFile(path)
    if file.size > _LARGEST:
        raise InputError(f"{path} {problem} (it has {file.size:,} bytes): download the file again")
    text = file.start(_LARGEST)
    if (other := instead_of_a_file(text[:200])) is not None:
        raise InputError(f"{path} {problem} ({other}): download the file again")
    return parse_json(text, f"{path} {problem}", allows_infinity=True)


def parse_json(
    text: bytes, problem: str, *, allows_infinity: bool = False, unique: Callable[[str], Exception] | None = None
) -> dict[str, Any]:
    """Parses one JSON object.

    Args:
        text: UTF-8, without a byte order mark.
        problem: the beginning of the message: the file, and that it is not JSON.
        allows_infinity: takes ``Infinity``, which settings of models have where there is no limit.
        unique: makes the error for a name that stands in an object twice; None: its last value counts.

    Raises:
        InputError: the text is not one JSON object; the message gives line and column if they are known.
    """
    try:
        if text.startswith(b"\xef\xbb\xbf"):
            raise ValueError("it begins with a byte order mark, which transformers refuses too: save it without")
        loads = partial(
            json.loads,
            text.decode("utf-8"),
            parse_constant=_infinity if allows_infinity else _constant,
            parse_float=_finite,
            parse_int=_whole_number if _has_odd_number(text) else None,
        )
        data = loads()
        n_strings = _count_strings(data)
        has_escapes = b"\\" in text
        if unique is not None and (has_escapes or text.count(b'"') != 2 * n_strings):
            data = loads(object_pairs_hook=partial(_of_unique_names, unique))
        if has_escapes and rb"\ud" in text.lower():
            _refuse_half_characters(data)
    except RecursionError:
        raise _invalid(problem, f"it is nested deeper than {_DEEPEST} levels") from None
    except json.JSONDecodeError as error:
        raise _invalid(problem, f"{error.msg}: line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise _invalid(problem, f"line {line} is no UTF-8: byte {error.start:,} is 0x{text[error.start]:02x}") from None
    except ValueError as error:
        raise _invalid(problem, str(error)) from None
    if not isinstance(data, dict):
        raise _invalid(problem, f"it holds no JSON object but {shown(data)}")
    return data


def _of_unique_names(error: Callable[[str], Exception], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise error(name)
            seen.add(name)
    return found


def _invalid(problem: str, why: str) -> InputError:
    return InputError(f"{problem} ({why}): download the file again")


def _infinity(text: str) -> float:
    return math.inf if text == "Infinity" else _constant(text)


def _constant(text: str) -> float:
    raise ValueError(f"it holds {text}, which is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _whole_number(text: str) -> int | float:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(text):,} digits")
    return int(text) if text != "-0" else -0.0  # other readers of JSON do not take it for a whole number


def _has_odd_number(text: bytes) -> bool:
    """True if a number may have too many digits, or may be a negative zero."""
    return b"-0" in text or b"0" * _MOST_DIGITS in text.translate(_DIGITS_AS_ZERO)


def _count_strings(data: Any) -> int:
    """Counts names and texts; if a name stands in an object twice, the text of the JSON has more.

    Raises:
        RecursionError: lists and objects are nested too deeply.
    """
    level, n_strings = [data], 0
    for _ in range(_DEEPEST):
        kinds = list(map(type, level))
        objects = [value for value, kind in zip(level, kinds, strict=True) if kind is dict]
        n_strings += sum(map(len, objects)) + kinds.count(str)
        lists = (value for value, kind in zip(level, kinds, strict=True) if kind is list)
        level = list(chain(chain.from_iterable(map(dict.values, objects)), chain.from_iterable(lists)))
        if not level:
            return n_strings
    raise RecursionError


def _refuse_half_characters(data: Any) -> None:
    """Refuses half of a surrogate pair, written as an escape: it can neither be printed nor encoded."""
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        around = error.object[max(error.start - 20, 0) : error.end + 20]
        raise ValueError(f"a text holds half of a character, in {shown(around)}") from None
