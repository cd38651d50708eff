"""Tokenizers that are made of SentencePiece's models, against its algorithm, and inside llama.cpp."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import import_protobuf

from compressors.model.errors import InputError
from compressors.model.files.tokenizer_files import load_tokenizer, tokens_of
from tests.difficult_texts import difficult_texts
from tests.llama_vocabulary import llama_tokens

_FIRST = ("<unk>", "<s>", "</s>")
_KINDS = {"unknown": 2, "control": 3, "user": 4, "byte": 6}

Scores = dict[str, float]


@pytest.fixture(scope="module")
def scores(heldout_text: str) -> Scores:
    """Pieces and scores as SentencePiece's trainer writes them for BPE: letters last."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=1500, limit_alphabet=120, show_progress=False)
    trained.train_from_iterator([*difficult_texts(2000, seed=1), heldout_text[:40_000]], trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda item: (len(item[0]) == 1, item[1]))
    return {piece: -float(place) for place, (piece, _) in enumerate(pieces)}


def _write(folder: Path, scores: Scores, *, unigram: bool = False, **rules: Any) -> None:
    model = import_protobuf().ModelProto()
    model.trainer_spec.model_type = 1 if unigram else 2
    model.trainer_spec.byte_fallback = not unigram
    model.normalizer_spec.remove_extra_whitespaces = False
    for name, value in rules.items():
        setattr(model.normalizer_spec, name, value)
    kinds = {"<unk>": "unknown", "<s>": "control", "</s>": "control", "<|turn|>": "user"}
    first = [*_FIRST, *(f"<0x{byte:02X}>" for byte in range(256) if not unigram)]
    for text in [*first, *scores, "<|turn|>"]:
        kind = _KINDS[kinds.get(text, "byte")] if text not in scores else 1
        model.pieces.add(piece=text, score=scores.get(text, 0.0), type=kind)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _by_scores(text: str, scores: Scores) -> list[str]:
    """SentencePiece's algorithm: the leftmost neighbours whose union has the highest score become one."""
    parts = list(text)
    while True:
        pairs = [left + right for left, right in itertools.pairwise(parts)]
        found = [(-scores[pair], place) for place, pair in enumerate(pairs) if pair in scores]
        if not found:
            break
        place = min(found)[1]
        parts[place : place + 2] = [pairs[place]]
    in_bytes = ([f"<0x{byte:02X}>" for byte in part.encode()] for part in parts)
    return [token for part, bare in zip(parts, in_bytes, strict=True) for token in ([part] if part in scores else bare)]


@pytest.mark.parametrize("prefix", [True, False])
def test_text_becomes_the_pieces_that_sentencepiece_makes(tmp_path: Path, scores: Scores, prefix: bool) -> None:
    _write(tmp_path, scores, add_dummy_prefix=prefix)
    texts = difficult_texts(1200)
    tokenizer = load_tokenizer(tmp_path)
    for text, tokens in zip(texts, tokens_of(tmp_path, texts), strict=True):
        spaced = ("▁" if prefix else "") + text.replace(" ", "▁")
        assert tokenizer.convert_ids_to_tokens(list(tokens)) == _by_scores(spaced, scores)
    assert tokenizer.encode("a</s>")[0] == 1
    assert tokenizer.decode(tokens_of(tmp_path, ["a  b"])[0]) == "a  b"


def test_llama_cpp_makes_the_same_tokens(tmp_path: Path, fine_folder: Path, scores: Scores) -> None:
    _write(tmp_path, scores)
    config = json.loads((fine_folder / "config.json").read_text(encoding="utf-8"))
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "vocab_size": 2000}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    texts = [*difficult_texts(1200), "a<|turn|>"]
    assert llama_tokens(tmp_path, texts) == [[1, *tokens] for tokens in tokens_of(tmp_path, texts)]


@pytest.mark.parametrize(
    ("settings", "around"),
    [
        ({"add_bos_token": None, "add_eos_token": None}, ([1], [])),
        ({"add_bos_token": False, "add_eos_token": True}, ([], [2])),
        ({"tokenizer_class": "ErnieTokenizer", "add_eos_token": 0}, ([], [])),
    ],
)
def test_begin_and_end_tokens_are_put_as_the_settings_say(
    tmp_path: Path, scores: Scores, settings: dict[str, Any], around: tuple[list[int], list[int]]
) -> None:
    _write(tmp_path, scores)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [*around[0], *tokenizer.encode("a", add_special_tokens=False), *around[1]]


def test_unigram_models_keep_their_probabilities(tmp_path: Path, scores: Scores) -> None:
    _write(tmp_path, {piece: score / 100 for piece, score in scores.items()}, unigram=True)
    model = json.loads(load_tokenizer(tmp_path).backend_tokenizer.to_str())["model"]
    assert model["type"] == "Unigram"
    assert model["vocab"][3] == [next(iter(scores)), 0.0]
    assert tokens_of(tmp_path, ["the the"])[0]


@pytest.mark.parametrize("data", [b"\x0a\x03abc", b"", b"\xff" * 50])
def test_what_is_no_model_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(InputError, match=r"tokenizer\.model is no model of SentencePiece \(.*\); download it again"):
        load_tokenizer(tmp_path)
