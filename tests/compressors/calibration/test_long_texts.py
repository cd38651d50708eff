"""A long text is tokenised only where blocks are taken; splits that share text in any form are refused."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from compressors.calibration import separation, text_file, token_streams
from compressors.calibration.documents import cut_parts, read_parts
from compressors.calibration.mixture import WeightedText
from compressors.calibration.separation import shared_text
from compressors.calibration.splits import BlockCounts, load_tokenizer, read_splits, tokenize, tokenize_heldout
from compressors.model.errors import InputError

_WANTED = BlockCounts(calibration=6, selection=2, heldout_per_file=3)


def _prose(name: str, n_documents: int) -> str:
    """Documents of a hundred words, none twice."""
    return "\n\n".join(
        " ".join(hashlib.sha256(f"{name} {document} {word}".encode()).hexdigest()[:5] for word in range(100))
        for document in range(n_documents)
    )


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 50 kB is long."""
    monkeypatch.setattr(token_streams, "_WHOLE_BYTES", 50_000)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    calibration, heldout = tmp_path / "calibration.txt", tmp_path / "heldout.txt"
    calibration.write_text(_prose("apple", 300))
    heldout.write_text(_prose("pear", 120))
    return calibration, heldout


def test_of_a_long_text_only_what_is_wanted_becomes_tokens(
    short_limits: None, texts: tuple[Path, Path], fine_folder: Path
) -> None:
    splits = read_splits(*texts)
    calibration, selection, heldout = tokenize(splits, fine_folder, wanted=_WANTED)
    assert (calibration.n_blocks, selection.n_blocks) == (6, 31)  # the selection is short
    assert 3 <= heldout.n_blocks < 30  # of 126
    tokenizer = Tokenizer.from_file(str(fine_folder / "tokenizer.json"))
    text = texts[0].read_text()
    for index, tokens_T in enumerate(calibration.spread(6).tokens_BT):
        block = tokenizer.decode(tokens_T.tolist())
        place = text.index(block)
        assert text[:place].endswith("\n\n") or place == 0, "a block begins with a document"
        assert abs(place / len(splits.calibration.parts[0].text) - index / 6) < 0.02
    whole = tokenizer.encode(texts[1].read_text()).ids
    assert heldout.leading(3).tokens_BT.flatten().tolist() == whole[: 3 * 512]


def test_a_long_text_gives_as_many_blocks_as_it_has_if_more_are_wanted(
    short_limits: None, texts: tuple[Path, Path], fine_folder: Path
) -> None:
    everything = tokenize(read_splits(*texts), fine_folder)
    wanted = tokenize(read_splits(*texts), fine_folder, wanted=BlockCounts(10_000, 10_000, 10_000))
    assert [split.n_blocks for split in wanted] == [split.n_blocks for split in everything]


class _Words:
    """A tokenizer with a token for each word; it remembers how much it was given."""

    bos_token_id = None

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = False) -> list[int]:
        self.lengths.append(len(text))
        return [len(word) for word in text.split()]


def test_a_text_without_lines_or_documents_gives_blocks_too(
    short_limits: None, tmp_path: Path, fine_folder: Path
) -> None:
    file = tmp_path / "one-line.txt"
    file.write_text(_prose("plum", 120).replace("\n\n", " "))
    _, heldout = tokenize_heldout(file, fine_folder, blocks_per_file=2)
    assert heldout.n_blocks >= 2
    streams = token_streams.spaced_streams(read_parts(file), load_tokenizer(fine_folder), None, 4, 512)
    assert [len(tokens) for _, tokens in streams] == [512] * 4


def test_places_without_text_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "gap.txt"
    file.write_text(_prose("plum", 400) + "\n\n" + 300_000 * "_" + "\n\n" + _prose("pear", 400))
    (part,) = read_parts(file)
    streams = token_streams.spaced_streams([part], _Words(), None, 8, 512)
    assert 8 <= len(streams) <= 16 and all(len(tokens) == 512 for _, tokens in streams)


def test_a_text_with_few_tokens_gives_its_first_ones(tmp_path: Path) -> None:
    file = tmp_path / "rare.txt"
    file.write_text("\n".join(1000 * "_" for _ in range(4_000)))
    (part,) = read_parts(file)
    words = _Words()
    ((_, tokens),) = token_streams.spaced_streams([part], words, None, 4, 512)
    assert 4 * 512 <= len(tokens) < 4_000 and max(words.lengths) <= 1 << 19


class _Counting:
    """A tokenizer that remembers how much it was given."""

    bos_token_id = None

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = False) -> list[int]:
        self.lengths.append(len(text))
        return [1] * (len(text) // 4)


def test_of_ten_megabytes_a_tenth_is_tokenised_and_little_at_once(tmp_path: Path) -> None:
    file = tmp_path / "large.txt"
    words = [f"{number:05}" for number in range(50_000)]
    drawn = random.Random(0).choices(words, k=1_700_000)
    file.write_text("\n\n".join(" ".join(drawn[first : first + 100]) for first in range(0, len(drawn), 100)))
    (part,) = read_parts(file)
    assert part.n_bytes > 10_000_000 and part.n_documents == 17_000
    assert max(map(len, part.pieces())) <= 1 << 19 and max(map(len, part.chunks())) <= 1 << 18
    spaced, leading = _Counting(), _Counting()
    streams = token_streams.spaced_streams([part], spaced, None, 320, 512)
    assert len(streams) == 320
    token_streams.leading_streams([part], leading, None, 50 * 512)
    assert sum(spaced.lengths) < 1_200_000 and max(spaced.lengths) < 10_000
    assert sum(leading.lengths) < 300_000


def test_documents_are_the_same_whatever_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are found again from the places that are held, and characters may lie across pieces of a file."""
    file = tmp_path / "all.txt"
    texts = [f"\u6f22{number}\n\ufeff \u3000\n" + number % 3 * "\n" + " \t\r\n" for number in range(100)]
    file.write_text("\n" + "\u3000\n\n" + "".join(texts), encoding="utf-8", newline="")
    expected = [[part.text for part in cut] for cut in cut_parts([WeightedText(file)], 3)]
    monkeypatch.setattr(text_file, "_PIECE_BYTES", 7)
    monkeypatch.setattr(text_file, "_MOST_HELD", 4)
    assert [[part.text for part in cut] for cut in cut_parts([WeightedText(file)], 3)] == expected
    assert expected[0][0] == "\n\u3000\n\n" + "".join(texts[:80]) and expected[0][2] == "".join(texts[90:])
    assert text_file.TextFile(file).n_documents == 100


@pytest.mark.parametrize("swapped", [False, True])
def test_a_long_passage_is_found_behind_others_of_the_same_beginnings(
    swapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(separation, "_MOST_PIECES", 2)
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    line = 1400 * "-"
    one.write_text(_prose("apple", 20) + line + "a" + line + _prose("plum", 7) + _prose("cherry", 200))
    other.write_text(line + "b" + line + _prose("plum", 7))
    first, second = (other, one) if swapped else (one, other)
    found = shared_text(read_parts(first), read_parts(second))
    assert found is not None and (found[0].file, found[1].file) == (first, second)
    other.write_text(line + "b" + line + _prose("pear", 7))
    assert shared_text(read_parts(first), read_parts(second)) is None


_FORMS: dict[str, Callable[[str], bytes]] = {
    "line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "decomposed accents": lambda text: unicodedata.normalize("NFD", text).encode(),
    "compatibility forms": lambda text: text.replace("fi", "\ufb01").encode(),
    "spaces at line ends": lambda text: text.replace("\n", "  \n").encode(),
    "wrapped anew": lambda text: text.replace(" ", "\n").encode(),
    "first words missing": lambda text: text[700:].replace("\n", "\r\n").encode(),
    "something in front": lambda text: (_prose("plum", 3) + text).replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("form", _FORMS)
def test_the_same_text_in_another_form_is_refused(form: str, tmp_path: Path, fine_folder: Path) -> None:
    documents = _prose("apple", 40).replace("a", "\u00e4").replace("bc", "fi").split("\n\n")
    calibration, heldout = tmp_path / "calibration.txt", tmp_path / "heldout.txt"
    copied = "\n\n".join(documents[4:12])
    calibration.write_text("\n\n".join(documents))
    heldout.write_bytes(_FORMS[form](copied))
    assert shared_text(read_parts(heldout), read_parts(calibration)) is not None, "in this order too"
    with pytest.raises(InputError, match=r"calibration text .*calibration\.txt.* and the held-out text .*heldout\.txt"):
        tokenize(read_splits(calibration, heldout), fine_folder)


def test_texts_that_share_a_licence_are_accepted(tmp_path: Path, fine_folder: Path) -> None:
    licence = _prose("licence", 1)[:250] + "\n\n"
    calibration, heldout = tmp_path / "calibration.txt", tmp_path / "heldout.txt"
    calibration.write_text(licence + _prose("apple", 60))
    heldout.write_text(licence + _prose("pear", 20))
    assert all(split.n_blocks > 0 for split in tokenize(read_splits(calibration, heldout), fine_folder))
