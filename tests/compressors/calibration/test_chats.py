"""Chats become calibration text through the model's own chat template, and texts are mixed by weight."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from compressors.calibration import token_streams
from compressors.calibration.documents import read_parts
from compressors.calibration.mixture import WeightedText, parse_mixture
from compressors.calibration.separation import shared_text
from compressors.calibration.splits import BlockCounts, TokenizedSplit, read_splits, tokenize, tokenize_heldout
from compressors.model.errors import InputError

_LENGTH = 32
_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('there are no robots') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
)


@pytest.fixture
def model(fine_folder: Path, tmp_path: Path) -> Path:
    """A tokenizer with a chat template."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(fine_folder / name, folder / name)
    settings = json.loads((fine_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": _TEMPLATE}), encoding="utf-8")
    return folder


def _unlike_others(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:24]


def _chat(number: int, **further: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": f'What is {number}?\nSay "it" plainly.'}
    answered = {"role": "assistant", "content": f"It is {_unlike_others(number)} in größter Kürze."}
    return {"messages": [asked, answered], **further}


def _write(path: Path, chats: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return path


def _heldout(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.txt"
    path.write_text("Something else is written here, and nobody else says it in this way. " * 4, encoding="utf-8")
    return path


def test_chats_are_tokenised_as_transformers_templates_them(model: Path, tmp_path: Path) -> None:
    chats = [_chat(number) for number in range(20)]
    file = _write(tmp_path / "chats.jsonl", chats)
    calibration, selection, _ = tokenize(read_splits(file, _heldout(tmp_path)), model, _LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for split, own in ((calibration, chats[:18]), (selection, chats[18:])):
        expected = [t for chat in own for t in tokenizer.apply_chat_template(chat["messages"])["input_ids"]]
        tokens = split.blocks[0][1].ravel().tolist()
        assert tokens == expected[: len(tokens)] and len(expected) - len(tokens) < _LENGTH
    assert tokens.count(tokenizer.eos_token_id) >= 2, "the template's special tokens are tokens"


def test_a_message_may_come_in_parts_or_call_a_tool(model: Path, tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]}
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    plain = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": ""}]
    same = [_write(tmp_path / f"{i}.jsonl", [{"messages": m}] * 9) for i, m in enumerate(([parts, called], plain))]
    first, second = (tokenize_heldout(file, model, _LENGTH)[1].blocks[0][1].tolist() for file in same)
    assert first == second


def test_a_long_file_of_chats_is_tokenised_by_whole_chats(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_streams, "_WHOLE_BYTES", 1000)
    file = _write(tmp_path / "chats.jsonl", [_chat(number) for number in range(1000)])
    splits = read_splits(file, _heldout(tmp_path))
    calibration, _, _ = tokenize(splits, model, 64, BlockCounts(6, 1, 1))
    begin = AutoTokenizer.from_pretrained(model).encode("<|im_start|>user\nWhat is ")
    blocks_BT = calibration.blocks[0][1]
    assert 6 <= len(blocks_BT) < 20
    assert all(block[: len(begin)].tolist() == begin for block in blocks_BT), "each begins with a chat"
    assert len({tuple(block) for block in blocks_BT.tolist()}) == len(blocks_BT)


_DAMAGED = [
    (b"{", "it is not JSON"),
    (b"[1]", "it is not an object"),
    (b'{"text": "a"}', 'it has no "messages"'),
    (b'{"messages": []}', 'it has no "messages"'),
    (b'{"messages": [{"content": "a"}]}', 'message 1 is not an object with a "role"'),
    (b'{"messages": [{"role": "user", "content": 1}]}', 'message 1 has no "content" that is a text'),
    (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "message 1 has a part that is not text"),
    (b'{"messages": [{"role": "user", "content": "a"}], "tools": 3}', 'its "tools" are not a list'),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', "is not UTF-8"),
    (b"[" * 100_000, "too many brackets"),
    (b'{"messages": ' + b"9" * 5000 + b"}", "thousands of digits"),
]


@pytest.mark.parametrize(("line", "why"), _DAMAGED, ids=[why for _, why in _DAMAGED])
def test_a_damaged_line_is_refused_by_its_number(line: bytes, why: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "chats.jsonl", [_chat(number) for number in range(5)])
    file.write_bytes(file.read_bytes() + b"\n\r\n" + line + b"\n")
    with pytest.raises(InputError, match=f"chats.jsonl, line 8 .*{why}|chats.jsonl, line 8 .*no chat.*{why}"):
        read_splits(file)


def test_a_line_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressors.calibration.chats._MOST_BYTES", 1000)
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b'{"messages": "' + b"a" * 2000)
    with pytest.raises(InputError, match="line 1 is longer than"):
        read_splits(file)


def test_a_template_that_refuses_a_chat_is_quoted_with_the_line(model: Path, tmp_path: Path) -> None:
    chats = [_chat(number) for number in range(30)]
    chats[12]["messages"][0]["role"] = "robot"
    file = _write(tmp_path / "chats.jsonl", chats)
    with pytest.raises(InputError, match=r"chats.jsonl, line 13: .*refuses this chat \(there are no robots\)"):
        tokenize(read_splits(file, _heldout(tmp_path)), model, _LENGTH)


def test_a_model_without_a_template_takes_no_chats(fine_folder: Path, tmp_path: Path) -> None:
    file = _write(tmp_path / "chats.jsonl", [_chat(number) for number in range(30)])
    with pytest.raises(InputError, match=r"the model has no chat template .*give plain text"):
        tokenize(read_splits(file, _heldout(tmp_path)), fine_folder, _LENGTH)


def test_text_that_a_chat_shares_with_another_file_is_found(tmp_path: Path) -> None:
    """Escapes of JSON and the roles do not hide it; instructions that all chats share are no such text."""
    shared = "".join(f'He said "{number}" on day {number * 31} \u2014 and\nwent. ' for number in range(100))
    heldout = tmp_path / "heldout.txt"
    heldout.write_text(shared, encoding="utf-8")
    for role, is_found in (("assistant", True), ("system", False)):
        chats = [_chat(number) for number in range(9)]
        chats[3]["messages"][1] |= {"role": role, "content": shared}
        found = shared_text(read_parts(heldout), read_parts(_write(tmp_path / f"{role}.jsonl", chats)))
        assert (found is not None) == is_found, role


def test_texts_are_mixed_by_weight(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    paragraphs = (f"Paragraph {number} tells of {_unlike_others(-number)} ships." for number in range(300))
    text.write_text("\n\n".join(paragraphs), encoding="utf-8")
    chats = _write(tmp_path / "chats.jsonl", [_chat(number) for number in range(300)])
    mixture = parse_mixture([f"{text}:2", str(chats)])
    calibration, selection, _ = tokenize(read_splits(mixture, _heldout(tmp_path)), model, _LENGTH)
    for split, n_blocks in ((calibration, 30), (selection, 12)):
        assert Counter(split.spread(n_blocks).domains_B) == {"prose": 2 * n_blocks // 3, "chats": n_blocks // 3}
    assert calibration.spread(6).domains_B == ("prose", "prose", "chats", "prose", "prose", "chats")
    assert calibration.described_mixture(30) == "blocks: 20 of prose, 10 of chats"


def test_a_text_with_less_than_its_weight_asks_for_is_named() -> None:
    import numpy as np

    blocks = tuple((name, np.zeros((count, _LENGTH), np.int64)) for name, count in (("a", 2), ("b", 90)))
    split = TokenizedSplit("calibration", blocks, (1.0, 1.0))
    assert split.described_mixture(20) == "blocks: 2 of a (all; by weight 10), 18 of b"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.txt", [("a.txt", 1.0)]),
        ("a.txt:7", [("a.txt", 1.0)]),
        (Path("a.txt"), [("a.txt", 1.0)]),
        (["a.txt:2", "b.jsonl:.5"], [("a.txt", 2.0), ("b.jsonl", 0.5)]),
        (["notes:2:1", "C:\\texts"], [("notes:2", 1.0), ("C:\\texts", 1.0)]),
        (["a:b", "c:1e3"], [("a:b", 1.0), ("c:1e3", 1.0)]),
    ],
)
def test_a_number_behind_the_last_colon_is_the_weight(given: Any, expected: list[tuple[str, float]]) -> None:
    assert parse_mixture(given) == tuple(WeightedText(Path(path), weight) for path, weight in expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [(["a:0", "b"], "weight of a:0 must be a number above 0"), (["a", "./a:3"], "a is given twice")],
)
def test_a_wrong_mixture_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"--calibration: .*{message}"):
        parse_mixture(given)


def test_files_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    texts = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.txt").write_text("\n\n".join(f"{folder} {n}" for n in range(9)), encoding="utf-8")
        texts.append(WeightedText(tmp_path / folder / "train.txt"))
    assert [part.domain for part in read_splits(texts).calibration.parts] == ["one/train.txt", "two/train.txt"]
