"""Values that nobody expects, and documents of JSON or YAML with some of them inside."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

__all__ = ["NAMES", "NUMBERS", "VALUES", "damaged_document", "damaged_json", "encoded"]

NAMES = (
    *("", " ", "x", "\x00", "a\nb", "\x1b[31mred", "\u2028", "\u202ereversed", "\U0001f600", "y" * 5000, "a/../b"),
    *("../../etc/passwd", "/etc/passwd", "/dev/zero", ".", "..", "%s%n", "{layer}", "[bold]x[/bold]", "\x7f", "\ufeff"),
)
"""As keys, names of tensors, file names and texts."""

NUMBERS = (
    *(0, 1, -1, 2, 3, 5, 7, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e308, 1e-6, 1e6),
)

VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], [0], [-1], [1, 2], ["x"], [{}], {"type": "x"}, {"a": {"a": {}}}),
    *([1] * 1000, [True], {"rope_type": "yarn"}, "1", "nan", "null", "float32", "é"),
    *NUMBERS,
    *NAMES,
)

_AS_WRITTEN = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 5000, "-" + "9" * 5000, "1" + "0" * 400),
    *("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, '{"a": 1, "a": 2}'),
    *("tru", "'single'", "0x10", "01", "1.", '"\\ud800"', '"\\u0000"', '"\\x"', '"' + "z" * 70_000 + '"', "// x"),
)
"""JSON text, some of it no JSON."""

_MARK = "\ue000as written {}\ue000"


def damaged_json(rng: random.Random, document: Any) -> bytes:
    """A document of JSON with up to three awkward places, in some encoding."""
    damaged = damaged_document(rng, document)
    if rng.random() < 0.15:
        place = rng.randrange(len(_AS_WRITTEN))
        damaged = _changed(rng, damaged, lambda _: _MARK.format(place))
        text = json.dumps(damaged, ensure_ascii=False)
        text = text.replace(json.dumps(_MARK.format(place), ensure_ascii=False), _AS_WRITTEN[place], 1)
    else:
        text = json.dumps(damaged, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
    return encoded(rng, text)


def damaged_document(rng: random.Random, document: Any) -> Any:
    """The document, copied, with one to three things changed, removed, doubled, renamed or exchanged."""
    damaged = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        damaged = _changed(rng, damaged, rng.choice(_CHANGES)(rng))
    return damaged


def encoded(rng: random.Random, text: str) -> bytes:
    """The text as UTF-8 nine times of ten, otherwise in another encoding, cut off, or followed by something."""
    data = text.encode("utf-8", errors="surrogatepass")
    if rng.random() < 0.9:
        return data
    place = rng.randrange(len(data) + 1)
    return rng.choice(
        (
            text.encode("utf-16", errors="surrogatepass"),
            b"\xef\xbb\xbf" + data,
            text.encode("latin-1", errors="replace") + b"\xe9",
            data[:place],
            data[:place] + b"\xff" + data[place + 1 :],
            data[:place] + b"\x00" + data[place:],
            data + b"}",
            data + data,
            *(b"", b" ", b"null", b"[]", b"{}", b'"x"', b"3", b"NaN"),
        )
    )


_REMOVED = object()
_Change = Callable[[Any], Any]


def _another_value(rng: random.Random) -> _Change:
    value = rng.choice(VALUES)
    return lambda _: copy.deepcopy(value)


def _another_number(rng: random.Random) -> _Change:
    value = rng.choice(NUMBERS)
    return lambda old: value if isinstance(old, (int, float)) else None


def _removal(rng: random.Random) -> _Change:
    return lambda _: _REMOVED


def _wrapping(rng: random.Random) -> _Change:
    return rng.choice(
        (lambda old: [old], lambda old: {"x": old}, lambda old: [old, old], lambda old: str(old), lambda old: {})
    )


_CHANGES = (_another_value, _another_value, _another_value, _another_number, _removal, _wrapping)


def _changed(rng: random.Random, node: Any, change: _Change) -> Any:
    """Goes down the document at random, near keys as likely as a long list's items, and changes what it meets."""
    children = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    if not children or rng.random() < 0.15:
        new = change(node)
        return None if new is _REMOVED else new
    key = rng.choice(children)
    if isinstance(node, dict) and rng.random() < 0.08:  # another name for it
        node[rng.choice(NAMES)] = node.pop(key)
        return node
    if rng.random() < 0.6 or not isinstance(node[key], (dict, list)):
        new = change(node[key])
        if new is _REMOVED:
            del node[key]
        else:
            node[key] = new
    else:
        node[key] = _changed(rng, node[key], change)
    return node
