"""The one place that looks at texts from somebody else's file before a message quotes them."""

from __future__ import annotations

__all__ = ["shown"]

_LONGEST = 80
_END = 16  # characters of a long text's end that are kept: numbers and suffixes tell most names apart


def shown(value: object) -> str:
    """Returns a name, or any other value from a file, as it may stand in a message of one line.

    Control characters, line ends, terminal escapes, marks that change the direction of writing and lone surrogates
    are escaped as in Python's source; of a long text the middle is left out, so that at most 80 characters remain.
    """
    text = value if isinstance(value, str) else repr(value)
    if len(text) > _LONGEST:  # before escaping too: what is left out need not be escaped
        text = f"{text[: _LONGEST - _END - 3]}...{text[-_END:]}"
    escaped = "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)
    return escaped if len(escaped) <= _LONGEST else f"{escaped[: _LONGEST - _END - 3]}...{escaped[-_END:]}"


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
