"""Makes texts from other people's files safe to quote in messages."""

from __future__ import annotations

import re

__all__ = ["one_line", "shown"]

_LONGEST_MESSAGE = 1000
_MESSAGE_END = 300  # characters of a long message's end that are kept: what to do stands there
_LONGEST = 80
_END = 16  # characters of a long text's end that are kept: numbers and suffixes tell most names apart


def shown(value: object) -> str:
    """Returns a name, or any other value from a file, as it may stand in a message of one line.

    Control characters, line ends, terminal escapes, marks that change the direction of writing and lone surrogates
    are escaped as in Python's source; the middle of a long text is left out, so that at most 80 characters remain.
    """
    text = value if isinstance(value, str) else repr(value)
    if len(text) > _LONGEST:  # before escaping too: the part that is left out need not be escaped
        text = f"{text[: _LONGEST - _END - 3]}...{text[-_END:]}"
    escaped = _printable(text)
    return escaped if len(escaped) <= _LONGEST else f"{escaped[: _LONGEST - _END - 3]}...{escaped[-_END:]}"


def one_line(message: str) -> str:
    """Returns a message as one line of at most 1,000 characters that no terminal takes for a command.

    Messages quote libraries, paths and flags too: line ends become spaces, other characters that cannot be printed are
    escaped, and the middle of a long message is left out.
    """
    text = _printable(re.sub(r"\s*[\r\n]\s*", " ", message.strip()))
    if len(text) <= _LONGEST_MESSAGE:
        return text
    return f"{text[: _LONGEST_MESSAGE - _MESSAGE_END - 5]} ... {text[-_MESSAGE_END:]}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
