"""Text is cut by document, tokenised by file, and never shared between splits."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from compressors.calibration.splits import Splits, TextSplit, TokenizedSplit, read_splits, tokenize, tokenize_heldout
from compressors.model.errors import InputError
from compressors.model.files.tokenizer_files import load_tokenizer

_LENGTH = 8


@pytest.fixture(scope="session")
def bundled(calibration_folder: Path, heldout_folder: Path) -> Splits:
    return read_splits(calibration_folder, heldout_folder)


@pytest.fixture(scope="session")
def heldout_blocks(heldout_folder: Path, fine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizedSplit:
    """The bundled held-out text, with little other text beside it to be quick."""
    other = tmp_path_factory.mktemp("other") / "other.txt"
    other.write_text("\n\n".join(f"In the year {year} nothing happened here. " * 60 for year in range(1000, 1004)))
    return tokenize(read_splits(other, heldout_folder), fine_folder)[2]


def _documents(name: str, count: int) -> str:
    """Documents in which no eight tokens occur twice."""
    digests = (hashlib.sha256(f"{name} {index}".encode()).hexdigest() for index in range(count))
    return "\n\n".join(f"{name} number {index}: {digest}" for index, digest in enumerate(digests)) + "\n"


def _write(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_the_last_tenth_of_each_calibration_file_is_set_aside(tmp_path: Path) -> None:
    calibration = _write(tmp_path / "calibration", a=_documents("apple", 20), b=_documents("pear", 9))
    heldout = _write(tmp_path / "heldout", c=_documents("plum", 3))
    splits = read_splits(calibration, heldout)
    assert [part.domain for part in splits.selection.parts] == ["a", "b"]
    assert [part.text.count("number") for part in splits.calibration.parts] == [18, 8]
    assert [part.text.count("number") for part in splits.selection.parts] == [2, 1]
    assert splits.selection.parts[0].text.startswith("apple number 18: ")
    assert splits.heldout.parts[0].text == _documents("plum", 3)


def test_one_file_alone_is_cut_80_10_10(tmp_path: Path) -> None:
    text = _documents("apple", 30)
    file = tmp_path / "all.txt"
    file.write_text(text, encoding="utf-8")
    splits = read_splits(file)
    parts = [split.parts[0].text for split in (splits.calibration, splits.selection, splits.heldout)]
    assert [part.count("number") for part in parts] == [24, 3, 3]
    assert "".join(parts) == text


def test_cutting_keeps_every_byte(bundled: Splits, calibration_folder: Path) -> None:
    for before, after in zip(bundled.calibration.parts, bundled.selection.parts, strict=True):
        assert (before.text + after.text).encode() == before.file.read_bytes()
    assert {part.file.parent for part in bundled.calibration.parts} == {calibration_folder}


def test_blank_lines_may_hold_spaces_and_carriage_returns(tmp_path: Path) -> None:
    file = tmp_path / "dos.txt"
    file.write_bytes(b"\r\n\r\n  first\r\n \t\r\n\r\n    second\r\nstill second\r\n\r\nthird\r\n\r\n")
    splits = read_splits(file)
    assert splits.calibration.parts[0].text == "\r\n\r\n  first\r\n \t\r\n\r\n"
    assert splits.selection.parts[0].text == "    second\r\nstill second\r\n\r\n"
    assert splits.heldout.parts[0].text == "third\r\n\r\n"


def test_the_hash_of_whole_files_is_that_of_their_bytes(bundled: Splits, heldout_folder: Path) -> None:
    together = b"".join(file.read_bytes() for file in sorted(heldout_folder.glob("*.txt")))
    assert bundled.heldout.sha256 == hashlib.sha256(together).hexdigest()
    assert len({bundled.calibration.sha256, bundled.selection.sha256, bundled.heldout.sha256}) == 3


def test_blocks_are_consecutive_tokens_of_each_file(
    heldout_blocks: TokenizedSplit, heldout_folder: Path, fine_folder: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(fine_folder / "tokenizer.json"))
    blocks = heldout_blocks.leading(3)
    assert blocks.domains_B == tuple(
        domain for domain in ("code", "encyclopedic", "prose", "religion", "technical") for _ in range(3)
    )
    assert blocks.tokens_BT.dtype == torch.int64
    for index, domain in enumerate(("code", "encyclopedic", "prose", "religion", "technical")):
        text = (heldout_folder / f"{domain}.txt").read_bytes().decode("utf-8")
        expected = torch.tensor(tokenizer.encode(text).ids[: 3 * 512]).view(3, 512)
        assert torch.equal(blocks.tokens_BT[3 * index : 3 * index + 3], expected)


def test_all_blocks_leave_only_the_remainders_out(heldout_blocks: TokenizedSplit) -> None:
    assert heldout_blocks.n_blocks == len(heldout_blocks.leading().domains_B) == 413


def test_spread_blocks_take_turns_and_reach_over_the_whole_file() -> None:
    split = TokenizedSplit("calibration", tuple((name, _numbered(100 * index, 10)) for index, name in enumerate("ab")))
    blocks = split.spread(5)
    assert blocks.domains_B == ("a", "b", "a", "b", "a")
    assert blocks.tokens_BT[:, 0].tolist() == [1, 102, 5, 107, 8]


def test_a_short_domain_leaves_its_turns_to_the_others() -> None:
    split = TokenizedSplit("calibration", (("a", _numbered(0, 1)), ("b", _numbered(100, 6)), ("c", _numbered(200, 0))))
    blocks = split.spread(5)
    assert blocks.domains_B == ("a", "b", "b", "b", "b")
    assert blocks.tokens_BT[:, 0].tolist() == [0, 100, 102, 103, 105]


def test_all_blocks_can_be_spread_and_no_more() -> None:
    split = TokenizedSplit("calibration", (("a", _numbered(0, 3)), ("b", _numbered(100, 2))))
    assert sorted(split.spread(5).tokens_BT[:, 0].tolist()) == [0, 1, 2, 100, 101]
    with pytest.raises(InputError, match="6 blocks of 8 tokens are asked of the calibration text, which has 5"):
        split.spread(6)


def test_the_hash_of_blocks_notices_one_token_and_the_order() -> None:
    split = TokenizedSplit("calibration", (("a", _numbered(0, 4)),))
    blocks = split.leading()
    assert blocks.sha256 == split.leading(4).sha256
    changed = blocks.tokens_BT.clone()
    changed[2, 3] += 1
    swapped = blocks.tokens_BT[[1, 0, 2, 3]]
    hashes = {type(blocks)(tokens, blocks.domains_B).sha256 for tokens in (blocks.tokens_BT, changed, swapped)}
    assert len(hashes) == 3


def test_bos_replaces_the_first_token_where_the_tokenizer_adds_it(
    tmp_path: Path, fine_folder: Path, toy_checkpoint: Callable[..., Path]
) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|endoftext|>"}))
    file = tmp_path / "all.txt"
    file.write_text(_documents("apple", 30))
    splits = read_splits(file)
    with_bos = tokenize(splits, folder, _LENGTH)[0].leading().tokens_BT
    without = tokenize(splits, fine_folder, _LENGTH)[0].leading().tokens_BT
    assert (with_bos[:, 0] == 0).all() and (without[:, 0] != 0).all()
    # One BOS before the whole text, then a BOS in place of every block's first token.
    expected = torch.cat([torch.zeros(1, dtype=torch.int64), without.flatten()])[: without.numel()].view_as(without)
    expected[:, 0] = 0
    assert torch.equal(with_bos[: len(without)], expected)


@pytest.mark.parametrize("copies_from", ["calibration", "selection"])
@pytest.mark.parametrize("shift", ["", "Some other words come first. "])
def test_text_in_two_splits_is_refused_at_any_offset(
    copies_from: str, shift: str, tmp_path: Path, fine_folder: Path
) -> None:
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(_documents("apple", 20))
    leaked: TextSplit = getattr(read_splits(calibration, calibration), copies_from)
    heldout = tmp_path / "heldout.txt"
    heldout.write_text(shift + leaked.parts[0].text)
    with pytest.raises(InputError, match=rf"the {copies_from} text .* the held-out text .*heldout\.txt"):
        tokenize(read_splits(calibration, heldout), fine_folder, _LENGTH)


def test_text_in_no_two_splits_is_accepted(tmp_path: Path, fine_folder: Path) -> None:
    calibration, heldout = tmp_path / "calibration.txt", tmp_path / "heldout.txt"
    calibration.write_text(_documents("apple", 20))
    heldout.write_text(_documents("pear", 3))
    splits = tokenize(read_splits(calibration, heldout), fine_folder, _LENGTH)
    assert [split.name for split in splits] == ["calibration", "selection", "held-out"]
    assert all(split.n_blocks > 0 for split in splits)


def test_a_few_blocks_in_common_are_left_out(tmp_path: Path, fine_folder: Path) -> None:
    """A licence text in many files is no reason to refuse them, but nothing may be in two splits."""
    licence = " ".join(hashlib.sha256(f"permission {number}".encode()).hexdigest() for number in range(2))
    apples = _documents("apple", 1000)
    middle = apples.index("\n\n", len(apples) // 3)
    calibration, heldout = tmp_path / "calibration.txt", tmp_path / "heldout.txt"
    calibration.write_text(f"{apples[:middle]}\n\n{licence}{apples[middle:]}")
    heldout.write_text(f"{_documents('pear', 20)}\n\nfirst: {licence}")
    kept, selection, measured = tokenize(read_splits(calibration, heldout), fine_folder, _LENGTH)
    everything = tokenize_heldout(calibration, fine_folder, _LENGTH)[1].n_blocks
    assert 0 < everything - kept.n_blocks - selection.n_blocks < everything // 100
    tokens_T = measured.leading().tokens_BT.flatten().tolist()
    windows = {tuple(tokens_T[start : start + _LENGTH]) for start in range(len(tokens_T) - _LENGTH + 1)}
    assert not windows & {tuple(block_T) for block_T in kept.leading().tokens_BT.tolist()}


def test_the_bundled_splits_share_nothing(bundled: Splits, fine_folder: Path) -> None:
    calibration, selection, heldout = tokenize(bundled, fine_folder)
    assert (calibration.n_blocks, selection.n_blocks, heldout.n_blocks) == (2009, 161, 413)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n \n", "is empty"),
        (b"caf\xe9 in Latin-1", r"not UTF-8 text \(byte 3\)"),
        (b"one\n\ntwo", r"has 2 document\(s\), but 3 are needed"),
    ],
)
def test_bad_text_is_refused_by_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_splits(file)
    assert str(file) in str(caught.value)


def test_a_folder_without_text_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \*\.txt file"):
        read_splits(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_splits(tmp_path / "missing.txt")


def test_too_short_a_text_says_how_many_tokens_there_are(tmp_path: Path, fine_folder: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("one\n\ntwo\n\nthree")
    n_tokens = len(Tokenizer.from_file(str(fine_folder / "tokenizer.json")).encode("one\n\n").ids)
    with pytest.raises(InputError, match=rf"short\.txt gives {n_tokens} tokens .* and 512 are needed"):
        tokenize(read_splits(file), fine_folder)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path, fine_folder: Path) -> None:
    shutil.copy(fine_folder / "config.json", tmp_path)
    file = tmp_path / "text.txt"
    file.write_text(_documents("apple", 5))
    with pytest.raises(InputError, match="has no usable tokenizer"):
        tokenize(read_splits(file), tmp_path, _LENGTH)


def test_a_tokenizer_that_draws_its_tokens_is_refused(tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=1)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for dropout in (0.25, 0.0, None):
        tokenizer["model"]["dropout"] = dropout
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        if dropout:
            with pytest.raises(InputError, match=r"tokenizer\.json: model\.dropout is 0\.25 .* set it to null"):
                load_tokenizer(folder)
        else:
            assert load_tokenizer(folder).encode("the end")


def _numbered(first: int, n_blocks: int) -> torch.Tensor:
    """int64 [B, T] whose rows are filled with first, first + 1, ..."""
    return torch.arange(first, first + n_blocks).unsqueeze(1).expand(-1, _LENGTH).contiguous()
