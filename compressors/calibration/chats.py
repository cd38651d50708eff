"""Chats as text: a JSON object with ``messages`` in each line of a file, written out by the model's chat template.

A chat is a document. Its special tokens are those of the template, and are read as tokens. The file's lines are checked
when its documents are counted, so a damaged one is refused before any work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compressors.model.errors import InputError
from compressors.model.names import shown

__all__ = ["CHATS", "chat_starts", "contents_of", "is_chats", "written_out"]

CHATS = ".jsonl"
"""The end of the names of files of chats."""

_MOST_BYTES = 1 << 24  # of a line, which is held whole
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_SAID = ("system", "developer")  # instructions that many chats share, and that are not text to learn from


@dataclass(frozen=True)
class _Chat:
    """One conversation."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None


def is_chats(file: Path) -> bool:
    """True if a file's name says that it holds chats."""
    return file.suffix.lower() == CHATS


def chat_starts(file: BinaryIO, name: Path, start: int = 0) -> Iterator[int]:
    """Yields the first byte of every chat from ``start`` on, at which a line begins; blank lines are skipped.

    Raises:
        InputError: a line is no chat. The lines of a whole file are checked, those behind a later start are not.
    """
    file.seek(start)
    place, number = start, 0
    while line := file.readline(_MOST_BYTES + 1):
        number += 1
        if line.strip():
            if start == 0:
                _refuse_unless_chat(line, f"{name}, line {number}")
            yield place
        place += len(line)


def contents_of(lines: str) -> str:
    """Returns what users and assistants say in the chats of some lines, for the search for shared text."""
    said = []
    for chat in _chats(lines):
        said += [message["content"] for message in chat.messages if message["role"] not in _NOT_SAID]
    return "\n".join(said)


def written_out(lines: str, file: Path, tokenizer: object) -> Iterator[str]:
    """Yields the text of each chat as the model's chat template writes it, special tokens included.

    Args:
        lines: whole lines of the file.
        file: the file, for messages.
        tokenizer: transformers' tokenizer of the model.

    Raises:
        InputError: the model has no chat template, or the template refuses a chat.
    """
    apply: Callable[..., str] | None = getattr(tokenizer, "apply_chat_template", None)
    if apply is None or not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{file} holds chats, and the model has no chat template that writes them out; give plain text, or put the "
            "model's chat_template.jinja beside its tokenizer"
        )
    for line in filter(str.strip, lines.split("\n")):
        chat = _parsed(line)
        try:
            text = apply(chat.messages, tools=chat.tools, tokenize=False)
        except Exception as error:  # templates are programs of other people, and raise anything
            reason = shown(str(error).strip().partition("\n")[0] or type(error).__name__)
            raise InputError(
                f"{file}, line {_number_of(line, file)}: the model's chat template refuses this chat ({reason}); "
                "change the line or remove it"
            ) from None
        yield text


def _number_of(line: str, file: Path) -> int | str:
    """The number of a line in a file, which is read again for it."""
    wanted = line.strip().encode("utf-8")
    with file.open("rb") as lines:
        return next((number for number, found in enumerate(lines, 1) if found.strip() == wanted), "?")


def _chats(lines: str) -> Iterator[_Chat]:
    return map(_parsed, filter(str.strip, lines.split("\n")))


def _refuse_unless_chat(line: bytes, where: str) -> None:
    if len(line) > _MOST_BYTES:
        raise InputError(f"{where} is longer than {_MOST_BYTES >> 20} MiB, so it is no chat; shorten it or remove it")
    try:
        chat = _parsed(line.decode("utf-8"))
        if _SURROGATE.search(line):
            json.dumps([chat.messages, chat.tools], ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8 text; convert the file to UTF-8") from None
    except UnicodeEncodeError:
        raise InputError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    except ValueError as error:
        raise InputError(f"{where} is no chat: {error}; mend the line or remove it") from None


def _parsed(line: str) -> _Chat:
    """A line's chat.

    Raises:
        ValueError: it is none; the text says why.
    """
    try:
        data = json.loads(line.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("it is not JSON that can be read (too many brackets)") from None
    except ValueError:  # of int(), which takes 4,300 digits
        raise ValueError("it is not JSON that can be read (a number of thousands of digits)") from None
    if not isinstance(data, dict):
        raise ValueError('it is not an object such as {"messages": [...]}')
    messages, tools = data.get("messages"), data.get("tools")
    if not isinstance(messages, list) or not messages:
        raise ValueError('it has no "messages", a list of objects with "role" and "content"')
    if tools is not None and not isinstance(tools, list):
        raise ValueError('its "tools" are not a list')
    return _Chat([_message(message, number) for number, message in enumerate(messages, 1)], tools or None)


def _message(message: Any, number: int) -> dict[str, Any]:
    """A message with its content as one text.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f'message {number} is not an object with a "role"')
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = _joined(content, number)
    if not isinstance(content, str):
        raise ValueError(f'message {number} has no "content" that is a text')
    return {**message, "content": content}


def _joined(parts: list[Any], number: int) -> str:
    """The text of a content in parts; pictures and sounds have none."""
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"message {number} has a part that is not text")
    return "".join(map(str, texts))
