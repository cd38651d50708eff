"""YAML that a person wrote: plain values are read, and everything else is one sentence with its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compressors.model.errors import InputError
from exporter.planning.yaml_file import read_yaml


def _read(tmp_path: Path, text: str | bytes) -> object:
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return read_yaml(path, "a recipe")


def test_plain_values_are_read(tmp_path: Path) -> None:
    read = _read(tmp_path, "a: 1\nb: [x, 2.5, null]\nc:\n  d: true  # said\n")
    assert read == {"a": 1, "b": ["x", 2.5, None], "c": {"d": True}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [", "line 2, column 5"),
        ("a: *b", "found undefined alias|aliases are not read; write the value out (line 1, column 4)"),
        ("a: &x [1]\nb: [*x, *x]", "aliases are not read; write the value out (line 2, column 5)"),
        ("a: 1\nb: 2\na: 3", "a is there twice; keep one (line 1, column 1)"),
        ("a: 2001-99-99", "a value is not of the type that it seems to have: month must be in 1..12"),
        ("a: !!int x", "a value is not of the type that it seems to have"),
        ("a: !!bool maybe", "a value is not of the type that it seems to have"),
        ("a: !!timestamp x", "a value is not of the type that it seems to have"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
        ("? [a]\n: b", "found unhashable key (line 1, column 3)"),
        ("[" * 20_000, "it is nested too deeply"),
        (b"a: \xff", "byte 3 is no UTF-8"),
        ("a: \x07", "special characters are not allowed"),
        ("x" * 1_000_001, "it has 1,000,001 bytes"),
    ],
)
def test_everything_else_is_named_in_one_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(InputError) as raised:
        _read(tmp_path, text)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'x.yaml'} cannot be read as a recipe: ")
    assert any(part in message for part in said.split("|"))
    assert message.isprintable()
    assert len(message) < 400


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe is a named pipe"):
        read_yaml(tmp_path / "pipe", "a recipe")
