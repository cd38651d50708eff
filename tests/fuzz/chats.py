"""Damaged files of chats, and chats that the model's template does not expect."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressors.calibration.mixture import WeightedText
from compressors.calibration.splits import read_splits, tokenize
from tests.fuzz.places import damaged_bytes, something_else
from tests.fuzz.values import NAMES, damaged_json, encoded

__all__ = ["damage_chats", "read_chats", "write_chats"]

_BLOCK_LENGTH = 64

_TEMPLATES = (
    "{{ raise_exception('no') }}",
    "{{ messages",
    "{% for m in messages %}",
    "",
    "{{ 1 / 0 }}",
    "{{ messages[9].x.y }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ messages | tojson }}",
    "{% include 'x' %}",
    "{{ messages[0]['role'] + 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('\x1b[31m') }}",
    "x",
    "{{ tools[0].name }}",
    "{{ messages[0].content.split('a')[7] }}",
    "{% for m in messages %}{{ m.content | length + m }}{% endfor %}",
)
"""Templates that refuse chats, say nothing of them, or are none."""


def write_chats(path: Path) -> None:
    """Writes enough chats, of all forms that are read, for blocks in every split."""
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    lines = []
    for number in range(120):  # so that a tenth of them fills a block
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": "Answer."},
            {"role": "user", "content": [{"type": "text", "text": f"Where was the cat on day {number * number}?"}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "assistant", "content": f"On mat {number}, and on mat {number * number * 7} later."},
        ]
        lines.append(json.dumps({"messages": messages[number % 3 :], "tools": tools if number % 2 else None}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def damage_chats(rng: random.Random, folder: Path) -> None:
    """Damages some lines of the file, the whole file, or the model's chat template."""
    rng.choice((_lines, _lines, _lines, _bytes, _template))(rng, folder)


def read_chats(folder: Path, rng: random.Random, inputs: Path) -> None:
    """Reads and tokenises the chats, alone and beside plain text."""
    chats = WeightedText(folder / "chats.jsonl")
    beside = [WeightedText(inputs / "text" / "calibration", 2.0)] if rng.random() < 0.3 else []
    splits = read_splits([chats, *beside], inputs / "text" / "heldout" if rng.random() < 0.7 else None)
    tokenize(splits, folder, _BLOCK_LENGTH)


def _lines(rng: random.Random, folder: Path) -> None:
    path = folder / "chats.jsonl"
    lines = path.read_bytes().split(b"\n")
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.randrange(len(lines))
        lines[place] = rng.choice(_LINES)(rng, lines[place])
    path.write_bytes(b"\n".join(lines))


def _other_values(rng: random.Random, line: bytes) -> bytes:
    try:
        return damaged_json(rng, json.loads(line))
    except ValueError:  # blank, or damaged already
        return line + line


def _other_words(rng: random.Random, line: bytes) -> bytes:
    """A chat whose words are awkward, and which is one all the same."""
    messages = [{"role": rng.choice(("user", "x", *NAMES)), "content": rng.choice(NAMES)} for _ in range(3)]
    text = json.dumps({"messages": messages, "tools": rng.choice((None, [], [{}], ["x"]))})
    return text.encode("utf-8", errors="surrogatepass")


def _damaged_line(rng: random.Random, line: bytes) -> bytes:
    return damaged_bytes(rng, line or b"{}", header=40)


_LINES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _other_values,
    _other_values,
    _other_words,
    _damaged_line,
)


def _bytes(rng: random.Random, folder: Path) -> None:
    path = folder / "chats.jsonl"
    data = path.read_bytes()
    kind = rng.randrange(4)
    if kind == 0:
        something_else(rng, path)
    elif kind == 1:
        path.write_bytes(damaged_bytes(rng, data, header=2000))
    elif kind == 2:
        path.write_bytes(encoded(rng, rng.choice((data.decode(), data.decode().replace("\n", "\r\n"), "\n\n", "\n{}"))))
    else:  # too few, or all alike
        lines = data.splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: rng.choice((1, 2, 3, 9))]) * rng.choice((1, 1, 40)))


def _template(rng: random.Random, folder: Path) -> None:
    """Another template, in either of its two places."""
    settings = folder / "tokenizer_config.json"
    read = json.loads(settings.read_text(encoding="utf-8"))
    template = rng.choice(_TEMPLATES)
    kind = rng.randrange(4)
    if kind == 0:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif kind == 1:
        settings.write_text(json.dumps(read | {"chat_template": template}), encoding="utf-8")
    elif kind == 2:
        del read["chat_template"]
        settings.write_text(json.dumps(read), encoding="utf-8")
    else:  # few chats: a template of 70,000 letters writes as many for each
        settings.write_bytes(damaged_json(rng, read))
        lines = (folder / "chats.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "chats.jsonl").write_bytes(b"".join(lines[:30]))
