"""Damage that needs no knowledge of a format: bytes cut off or changed, and something else in a file's place."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

__all__ = ["damaged_bytes", "edit", "remove", "something_else"]

Part = TypeVar("Part")


def edit(rng: random.Random, part: Part, edits: Sequence[Callable[[random.Random, Part], None]]) -> None:
    """Takes one or two edits; the second does nothing where the first left nothing that it could change."""
    rng.choice(edits)(rng, part)
    if rng.random() < 0.35:
        with suppress(AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error):
            rng.choice(edits)(rng, part)


def damaged_bytes(rng: random.Random, data: bytes, header: int) -> bytes:
    """The bytes cut off, or with some of them changed, moved or doubled; more often within the first ``header``."""
    end = header if rng.random() < 0.8 else len(data)
    place = rng.randrange(max(1, min(end, len(data))))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + data[place + rng.choice((1, 4, 8, 100)) :]
    if kind == 2:
        return data[:place] + rng.randbytes(rng.choice((1, 4, 8, 100))) + data[place:]
    if kind == 3:
        return data + rng.randbytes(rng.choice((1, 100)))
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 32))):
        place = rng.randrange(max(1, min(end, len(data))))
        changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def something_else(rng: random.Random, path: Path) -> None:
    """Puts a folder, a pipe, a link or nothing where a file was."""
    path.unlink()
    kind = rng.randrange(8)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path.name)  # to itself
    elif kind == 3:
        path.symlink_to("nowhere")
    elif kind == 4:
        path.symlink_to("/dev/zero")
    elif kind == 5:
        path.symlink_to("/dev/null")
    elif kind == 6:
        path.write_bytes(b"")
    # else: nothing


def remove(path: Path) -> None:
    """Removes a file or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
