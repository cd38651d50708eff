"""Tokenizers that merge letters, and unigram ones, as Gemma, ERNIE and others have them, against llama.cpp."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from compressors.model.config.reading import read_spec
from compressors.model.errors import UnsupportedError
from exporter.validation.vocabulary_check import vocabulary_deviations
from exporter.writing.gguf.vocabulary.metadata import vocabulary_metadata
from tests.difficult_texts import difficult_texts
from tests.llama_vocabulary import llama_tokens

_ROWS = 4096
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
_SPACES = normalizers.Replace(" ", "▁")
_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def pieces(heldout_text: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, with runs of spaces and of line ends among the tokens."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = _SPACES
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|▁*[^▁\n]+|▁+"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=2600, special_tokens=[*_GEMMA, *_BYTES], limit_alphabet=160, show_progress=False
    )
    trained.train_from_iterator([*difficult_texts(3000, seed=1), heldout_text[:60_000]], trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def _all_splits(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a token together, in the order of the tokens, as SentencePiece's converters write them."""
    words = sorted(
        (word for word in vocabulary if len(word) > 1 and word not in (*_GEMMA, *_BYTES)), key=vocabulary.__getitem__
    )
    cuts = ((word[:cut], word[cut:]) for word in words for cut in range(1, len(word)))
    return [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]


@pytest.fixture
def make(fine_folder: Path, tmp_path: Path) -> Make:
    """Makes a folder with a tokenizer, its parts and special tokens."""

    def write(model: Any, special: Sequence[str] = _GEMMA, begin: str = "<bos>", **parts: Any) -> Path:
        tokenizer = Tokenizer(model)
        tokenizer.decoder = _DECODER
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        tokenizer.add_special_tokens(list(special))
        number = tokenizer.token_to_id(begin)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, number)]
        )
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        named = {"bos_token": begin, "eos_token": special[1], "unk_token": "<unk>", "pad_token": special[0]}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        config = json.loads((fine_folder / "config.json").read_text(encoding="utf-8"))
        config |= {"bos_token_id": number, "eos_token_id": tokenizer.token_to_id(special[1]), "pad_token_id": 0}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return tmp_path

    return write


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> models.Model:
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _fields(folder: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(folder / "vocabulary.gguf").fields
    return {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}


def _different(folder: Path, texts: Sequence[str]) -> list[str]:
    wanted = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(list(texts))
    compared = zip(texts, wanted, llama_tokens(folder, texts), strict=True)
    return [text for text, encoding, tokens in compared if encoding.ids != tokens]


def test_gemma_is_cut_by_its_merges(
    make: Make, pieces: tuple[dict[str, int], list[tuple[str, str]]], heldout_text: str
) -> None:
    """The converter's file of the real vocabulary has the same keys, kinds of tokens and scores."""
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    special = [*_GEMMA, "<|tool_call>", "<turn|>"]
    folder = make(_bpe(*pieces), special, normalizer=_SPACES, pre_tokenizer=split)
    assert _different(folder, [*difficult_texts(2500), heldout_text[100_000:130_000], "a<turn|>\n<|tool_call>b "]) == []
    fields = _fields(folder)
    assert fields["model"] == "gemma4"
    assert "pre" not in fields
    assert (fields["add_bos_token"], fields["add_space_prefix"], fields["bos_token_id"]) == (True, False, 2)
    kinds = dict(zip(fields["tokens"], fields["token_type"], strict=True))
    assert kinds["<|tool_call>"] == gguf.TokenType.USER_DEFINED
    assert kinds["<unk>"] == kinds["<turn|>"] == gguf.TokenType.CONTROL
    assert fields["token_type"].count(gguf.TokenType.BYTE) == 256
    assert set(fields["scores"]) == {-1000.0}


@pytest.mark.parametrize(("complete", "model"), [(True, "llama"), (False, "gpt2")])
def test_merges_become_scores_only_where_scores_say_the_same(
    make: Make, pieces: tuple[dict[str, int], list[tuple[str, str]]], complete: bool, model: str
) -> None:
    """ERNIE's come from SentencePiece, which knows scores alone; merges that were trained as such do not fit them."""
    vocabulary, merges = pieces
    special = ["<unk>", "</s>", "<s>"]
    words = vocabulary | {"</s>": len(vocabulary), "<s>": len(vocabulary) + 1}
    splits = _all_splits(vocabulary) if complete else merges
    folder = make(_bpe(words, splits), special, "<s>", normalizer=_SPACES)
    assert _different(folder, difficult_texts(2500)) == []
    fields = _fields(folder)
    assert (fields["model"], fields["add_space_prefix"]) == (model, False)
    assert ("scores" in fields, "merges" in fields) == (complete, not complete)


def test_merges_that_llama_cpp_cannot_do_are_refused(
    make: Make, pieces: tuple[dict[str, int], list[tuple[str, str]]]
) -> None:
    vocabulary, merges = pieces
    across = _bpe(vocabulary | {".\n": len(vocabulary)}, [*merges, (".", "\n")])
    with pytest.raises(UnsupportedError, match=r"its token '\.\\n' goes beyond a line end"):
        vocabulary_metadata(make(across, normalizer=_SPACES), _ROWS)
    short = {text: number for text, number in vocabulary.items() if text != "<0xF0>"}
    with pytest.raises(UnsupportedError, match="no token for some bytes"):
        vocabulary_metadata(make(_bpe(short, merges), normalizer=_SPACES), _ROWS)
    with pytest.raises(UnsupportedError, match=r"no equivalent for the pre-tokenizer step \{'type': 'Digits'"):
        vocabulary_metadata(
            make(_bpe(vocabulary, merges), normalizer=_SPACES, pre_tokenizer=pre_tokenizers.Digits()), _ROWS
        )


@pytest.fixture(scope="module")
def probable(heldout_text: str) -> Tokenizer:
    """A unigram model as trained by the library."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(heldout_text[:60_000].splitlines(), trainer)
    return tokenizer


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_unigram_models_are_cut_alike(make: Make, probable: Tokenizer, heldout_text: str, scheme: str) -> None:
    pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    folder = make(probable.model, ["<pad>", "</s>", "<unk>"], "<pad>", pre_tokenizer=pre_tokenizer)
    equally_probable = "000"  # two ways to cut it
    texts = [text for text in difficult_texts(1500) if not text.startswith(" ") and equally_probable not in text]
    assert _different(folder, [*texts, heldout_text[100_000:120_000]]) == []
    fields = _fields(folder)
    assert (fields["model"], fields["add_space_prefix"]) == ("t5", scheme == "always")
    assert fields["token_type"][fields["tokens"].index("<unk>")] == gguf.TokenType.UNKNOWN
    deviations = list(vocabulary_deviations(folder, read_spec(folder), "toy"))
    assert any("text that begins with a space" in said for said in deviations) == (scheme == "always")


def _charsmap(letter: str, replacement: str) -> str:
    """SentencePiece's table that replaces one letter of three bytes: a trie in an array, and the replacement."""
    first, second, third = letter.encode()
    trie = np.zeros(0x400, np.uint32)
    trie[0] = 0x100 << 10
    trie[0x100 ^ first] = (0x100 ^ first ^ 0x200) << 10 | first
    trie[0x200 ^ second] = (0x200 ^ second ^ 0x300) << 10 | second
    trie[0x300 ^ third] = (0x300 ^ third ^ 0x3FF) << 10 | 1 << 8 | third
    trie[0x3FF] = 1 << 31
    data = trie.astype("<u4").tobytes()
    return base64.b64encode(len(data).to_bytes(4, "little") + data + replacement.encode() + b"\0").decode("ascii")


def test_unigram_models_keep_their_table_of_characters(make: Make, probable: Tokenizer) -> None:
    table = normalizers.Precompiled(base64.b64decode(_charsmap("Ｈ", "H")))  # noqa: RUF001
    assert table.normalize_str("Ｈouse") == "House"  # noqa: RUF001
    pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    folder = make(probable.model, ["<pad>", "</s>", "<unk>"], "<pad>", normalizer=table, pre_tokenizer=pre_tokenizer)
    texts = ["Ｈouse", "the Ｈouse", "Ｈ Ｈ", "日Ｈ", "House"]  # noqa: RUF001
    assert _different(folder, texts) == []
    assert len(set(map(tuple, llama_tokens(folder, ["Ｈouse", "House"])))) == 1  # noqa: RUF001


def test_unigram_models_that_merge_spaces(make: Make, probable: Tokenizer) -> None:
    folder = make(
        probable.model,
        ["<pad>", "</s>", "<unk>"],
        "<pad>",
        normalizer=normalizers.Sequence([normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), " ")]),
        pre_tokenizer=pre_tokenizers.Metaspace(),
    )
    assert _different(folder, ["a  b   c d", "several    spaces    between", " in front and behind "]) == []
    assert _fields(folder)["remove_extra_whitespaces"] is True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalizer": normalizers.Lowercase()}, r"no equivalent for the normalizer \{'type': 'Lowercase'\}"),
        ({"normalizer": normalizers.Strip()}, r"no equivalent for the normalizer \{'type': 'Strip', "),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, r"pre-tokenizer step \{'type': 'Whitespace'\}"),
    ],
)
def test_steps_that_unigram_models_lack_in_llama_cpp_are_refused(
    make: Make, probable: Tokenizer, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedError, match=said):
        vocabulary_metadata(make(probable.model, ["<pad>", "</s>", "<unk>"], "<pad>", **change), _ROWS)
    folder = make(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, byte_fallback=True), ["<unk>", "a"], "a")
    with pytest.raises(UnsupportedError, match="writes unknown letters as bytes"):
        vocabulary_metadata(folder, _ROWS)
