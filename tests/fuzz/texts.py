"""Damaged recipes, texts, logits files, and flags of the command line."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.places import damaged_bytes, something_else
from tests.fuzz.values import NAMES, VALUES, damaged_document, encoded

__all__ = ["awkward_flags", "damage_logits", "damage_recipe", "damage_text"]

_YAML = (
    *("!!python/object/apply:os.system [exit]", "!!int x", "!!float x", "!!timestamp x", "2001-99-99", "!!binary x"),
    *("!!bool maybe", "{[1]: 2}", "? {a: b}\n: c", "*nowhere", "&a [*a]", "1:99:99", "0b2", "0o9", ".nan", ".inf"),
    *("-.inf", "9" * 5000, "[" * 5000, "{a: " * 5000, "~", "yes", "!!set {a, b}", "!!omap [a: 1]", "<<: 3", "!x y"),
    *("|\n  x", "'", '"\\x"', '"\\ud800"', "@", "`", "%", "\t", "- - - -", "a: b: c", "---\n...\n---", "\x00", "\x1b"),
    *("!!null x", "!!str [a]", "!!map [a]", "!!seq {a: b}", "1e999", "1_000", "0x_", "1:2:3.4", "2001-01-01 25:00:00"),
)
"""YAML text, some of it no YAML."""


def damage_recipe(rng: random.Random, folder: Path) -> None:
    """Damages recipe.yaml."""
    path = folder / "recipe.yaml"
    kind = rng.random()
    if kind < 0.05:
        something_else(rng, path)
        return
    text = path.read_text(encoding="utf-8")
    if kind < 0.2:
        path.write_bytes(damaged_bytes(rng, text.encode(), header=len(text)))
    elif kind < 0.6:
        recipe = damaged_document(rng, yaml.safe_load(text))
        dumped = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=rng.random() < 0.5)
        path.write_bytes(encoded(rng, dumped))
    else:
        lines = text.splitlines()
        place = rng.randrange(len(lines))
        name, _, _ = lines[place].partition(":")
        lines[place] = f"{name}: {rng.choice(_YAML)}"
        if rng.random() < 0.2:
            lines[place] += "\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
            lines.insert(0, "a0: &a0 [x]")
        path.write_bytes(encoded(rng, "\n".join(lines)))


def damage_text(rng: random.Random, folder: Path) -> None:
    """Damages a text, or the folder of texts."""
    path = rng.choice(sorted(folder.glob("*/*.txt")))
    kind = rng.randrange(8)
    if kind == 0:
        something_else(rng, path)
    elif kind == 1:
        path.write_bytes(damaged_bytes(rng, path.read_bytes(), header=1000))
    elif kind == 2:
        path.write_bytes(encoded(rng, rng.choice((*NAMES, "one", "one\n\ntwo", "\n\n\n", "\r\n" * 50))))
    elif kind == 3:
        path.write_text("word " * 3000 + "\n\n" + "word " * 3000, encoding="utf-8")
    elif kind == 4:
        (path.parent / rng.choice(("a.txt", "\udcff.txt", "\x1b.txt", "\n.txt"))).write_text("x", encoding="utf-8")
    elif kind == 5:
        other = folder / "heldout" / "words.txt"
        path.write_bytes(other.read_bytes().replace(b"\n", b"\r\n"))
    elif kind == 6:
        path.unlink()
        (path.parent / "x.txt").mkdir()
    else:
        os.chmod(path, 0)


def damage_logits(rng: random.Random, folder: Path) -> None:
    """Damages the file ``logits`` of llama-perplexity."""
    path = folder / "logits"
    data = path.read_bytes()
    kind = rng.random()
    if kind < 0.1:
        something_else(rng, path)
    elif kind < 0.5:
        path.write_bytes(damaged_bytes(rng, data, header=20))
    else:
        sizes = list(struct.unpack_from("<3i", data, 8))
        sizes[rng.randrange(3)] = rng.choice((0, 1, 2, 3, -1, 2**31 - 1, -(2**31), 513, 65536, 10**6))
        path.write_bytes(data[:8] + struct.pack("<3i", *sizes) + data[20:])


_TEXTS = (
    *(
        "20GB",
        "0",
        "-1",
        "1e3GB",
        "1..2GB",
        ".GB",
        "9" * 5000,
        "9" * 17 + "TB",
        "٣GB",
        "1 GB",
        "1gib",
        "nan",
        "inf",
        "1XB",
    ),
    *("30m", "0s", "1.5h", "999999999h", "9" * 9 + ".9h", "1d", "kld=0.1", "kld=", "=1", "kld=nan", "kld=1,kld=2", ","),
    *(
        "top1=1e999",
        "perplexity_change=-1",
        "gguf",
        "gguf,onnx",
        "gguf,,",
        "Q4_K",
        "q4_k",
        "cpu",
        "cuda",
        "auto",
        "none",
    ),
    *("reap", "block-drop", "dense", "moe", "router", "adapters", "f16", "q8_0", "total", "file", *NAMES),
)
_PATHS = (
    "",
    ".",
    "/",
    "/dev/null",
    "/dev/zero",
    "/proc/self/x",
    "x" * 300,
    "a\nb",
    "\udcff",
    "/dev/null/x",
    "~",
    "a" * 5000,
)
_INTEGERS = (0, 1, -1, 2, 10**6, 2**31, 2**32, 2**63, 2**64, 10**30)


def awkward_flags(rng: random.Random, text: Path) -> dict[str, Any]:
    """Values for :class:`exporter.planning.job.Flags`, of the types that the command line hands over; some are odd."""
    odd: dict[str, Any] = {
        **{name: rng.choice(_TEXTS) for name in ("budget", "budget_kind", "kv_type", "formats", "student", "method")},
        **{name: rng.choice(_TEXTS) for name in ("quant", "recover", "recover_time", "memory", "device", "model")},
        **{name: rng.choice(_INTEGERS) for name in ("context", "experts", "threads", "seed")},
        **{name: Path(rng.choice(_PATHS)) for name in ("calibration", "text", "recipe", "out", "work_dir")},
        "require": tuple(rng.choice(_TEXTS) for _ in range(rng.randrange(3))),
    }
    chosen = rng.sample(sorted(odd), rng.choice((1, 1, 2, 4)))
    usual: dict[str, Any] = {"budget": "1MB", "out": text / "out"}
    return usual | {name: odd[name] for name in chosen}


def awkward_words(rng: random.Random) -> list[str]:
    """Texts that stand where a number, a size, a duration or a threshold should."""
    return [rng.choice((*_TEXTS, *(str(value) for value in VALUES))) for _ in range(5)]
