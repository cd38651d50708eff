"""Reading other people's JSON gives an object, or one sentence that names the place."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from compressors.model.errors import InputError
from compressors.model.files.json_file import parse_json, read_json

_DEEP = b"[" * 200 + b"]" * 200
_VERY_DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b' \n{"a": [1, -2.5e3, true, null, "\\u00e4\\n"], "b": {}}\n',
        '{"a": "ä \U0001f600"}'.encode(),
        b'{"a": "\\ud83d\\ude00"}',  # a whole surrogate pair
        b'{"model_max_length": 1000000000000000019884624838656}',
        b'{"a": 1, "a": 2}',  # the last one counts, as in transformers
        b'{"a": ' + b"[" * 90 + b"]" * 90 + b"}",
    ],
)
def test_what_is_json_is_read_as_python_reads_it(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.json").write_bytes(text)
    assert read_json(tmp_path / "x.json") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "it is empty"),
        (b"\0" * 300, "begins with zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"Entry not found", "line 1, column 1"),
        (b'{"a": 1,\n "b" 2}', "line 2, column 6"),
        (b'{"a": "\n"}', "line 1, column 8"),
        (b'{"a": "\xff"}', "line 1 is no UTF-8: byte 7 is 0xff"),
        ('{"a": 1}'.encode("utf-16"), "no UTF-8"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
        (b'{"a": "\\ud800"}', r"half of a character, in .*\\ud800"),
        (b'{"\\uDFFF": 1}', "half of a character"),
        (b'{"a": ' + _DEEP + b"}", "deeper than 100 levels"),
        (_VERY_DEEP, "deeper than 100 levels"),
        (b'{"a": ' + _VERY_DEEP + b"}", "deeper than 100 levels"),
        (b"[1]", r"no JSON object but \[1\]"),
        (b'"' + b"a" * 5000 + b'"', "no JSON object but aaa"),
        (b"null", "no JSON object but None"),
    ],
)
def test_anything_else_is_one_short_sentence(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(InputError, match=rf"x\.json is not valid JSON \(.*{said}.*download the file again$") as refused:
        read_json(tmp_path / "x.json")
    assert len(str(refused.value)) < 300 + len(str(tmp_path))
    assert str(refused.value).isprintable()


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "gone.json").symlink_to("../blobs/abc")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name, said in (
        ("pipe", "a named pipe"),
        ("folder", "a folder"),
        ("loop", "cannot be opened"),
        ("zero", "a device"),
        ("gone", r"cannot be opened .*; it is a link to \.\./blobs/abc: download the file again"),
        ("missing", "cannot be opened"),
    ):
        with pytest.raises(InputError, match=rf"{name}\.json.*{said}"):
            read_json(tmp_path / f"{name}.json")


def test_an_enormous_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").touch()
    os.truncate(tmp_path / "x.json", 10**12)
    with pytest.raises(InputError, match="it has 1,000,000,000,000 bytes"):
        read_json(tmp_path / "x.json")


def test_the_beginning_of_the_message_is_the_caller_s() -> None:
    with pytest.raises(InputError, match=r"^file 7 is odd \(Expecting value: line 1, column 1\)"):
        parse_json(b"x", "file 7 is odd")


def test_settings_may_have_no_limit_and_headers_must_be_finite(tmp_path: Path) -> None:
    """Python's writer, and so the hub, spell it like this."""
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json(path) == {"time_step_limit": [0.0, math.inf]}
    with pytest.raises(InputError, match="Infinity, which is no number of JSON"):
        parse_json(path.read_bytes(), "the header is not valid JSON")
