"""Tokenizers of tiktoken's kind, made of ranks and of code that is only read, against tiktoken's own algorithm."""

from __future__ import annotations

import base64
import itertools
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from compressors.model.errors import InputError
from compressors.model.files.gguf.pre_tokenizers import PRE_TOKENIZERS
from compressors.model.files.tokenizer_files import copy_tokenizer_files, load_tokenizer, tokens_of
from compressors.model.files.vocabularies.tiktoken import find_ranks
from tests.difficult_texts import difficult_texts
from tests.llama_vocabulary import llama_tokens

_EXPRESSIONS = {rule.name: rule.expressions[0] for rule in PRE_TOKENIZERS}
_KIMI_CODE = """
import tiktoken
raise SystemExit("was run")
class TikTokenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}
    num_reserved_special_tokens = 256
    pat_str = "|".join([%s])
"""
_HUNYUAN_CODE = '''
import tiktoken, unicodedata
raise SystemExit("was run")
PAT_STR = r"""%s""" + \\
    r"""%s"""
ENDOFTEXT, STARTOFTEXT, BOSTOKEN, EOSTOKEN, PADTOKEN = (
    "<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"
)
class HYTokenizer(PreTrainedTokenizer):
    def tokenize(self, text, allowed_special="all"):
        return [self.decoder[t] for t in self.tokenizer.encode(unicodedata.normalize("NFC", text))]
'''

Ranks = dict[bytes, int]


def _train(expression: str, text: str) -> Ranks:
    """Tokens and ranks as tiktoken numbers them: first the bytes, then what merges make."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*difficult_texts(2000, seed=1), text], trainer)
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {bytes(letters[letter] for letter in token): rank for token, rank in tokens}


@pytest.fixture(scope="module", params=["kimi", "hunyuan"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def expression(kind: str) -> str:
    return _EXPRESSIONS["kimi-k2" if kind == "kimi" else "qwen2"]


@pytest.fixture(scope="module")
def ranks(expression: str, heldout_text: str) -> Ranks:
    return _train(expression, heldout_text[:40_000])


@pytest.fixture
def folder(tmp_path: Path, kind: str, expression: str, ranks: Ranks) -> Path:
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()]
    name = "tiktoken.model" if kind == "kimi" else "hy.tiktoken"
    (tmp_path / name).write_bytes(b"".join(lines))
    first, second = expression[: expression.index("|") + 1], expression[expression.index("|") + 1 :]
    if kind == "kimi":
        parts = ", ".join(f'r"""{part}"""' for part in (first.removesuffix("|"), second))
        code = _KIMI_CODE % parts
        named = {len(ranks): "[BOS]", len(ranks) + 1: "[EOS]", len(ranks) + 5: "<|im_end|>"}
        entries = {str(number): {"content": text, "special": True} for number, text in named.items()}
        settings: dict[str, Any] = {"added_tokens_decoder": entries, "bos_token": "[BOS]", "eos_token": "[EOS]"}
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}
        (tmp_path / "tokenization_moonshot.py").write_text(code, encoding="utf-8")
    else:
        settings = {"eos_token": "<|eos|>", "chat_template": "{{ messages }}"}
        settings["auto_map"] = {"AutoTokenizer": ["tencent/x--tokenization_hy.HYTokenizer", None]}
        (tmp_path / "tokenization_hy.py").write_text(_HUNYUAN_CODE % (first, second), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


def _by_ranks(word: bytes, ranks: Ranks) -> list[int]:
    """tiktoken's algorithm: a word that is a token, else the leftmost pair of the lowest rank first."""
    parts = [word] if word in ranks else [bytes([byte]) for byte in word]
    while True:
        pairs = enumerate(left + right for left, right in itertools.pairwise(parts))
        found = [(ranks[pair], place) for place, pair in pairs if pair in ranks]
        if not found:
            return [ranks[part] for part in parts]
        place = min(found)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_text_becomes_the_tokens_that_tiktoken_makes(
    folder: Path, kind: str, expression: str, ranks: Ranks, heldout_text: str
) -> None:
    texts = [*difficult_texts(1200), heldout_text[100_000:110_000]]
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    compose = Tokenizer.from_str(load_tokenizer(folder).backend_tokenizer.to_str()).normalizer
    assert (compose is not None) == (kind == "hunyuan")
    for text, tokens in zip(texts, tokens_of(folder, texts), strict=True):
        words = split.pre_tokenize_str(text if compose is None else compose.normalize_str(text))
        assert list(tokens) == [token for word, _ in words for token in _by_ranks(word.encode(), ranks)]


def test_llama_cpp_makes_the_same_tokens(folder: Path, fine_folder: Path, kind: str, ranks: Ranks) -> None:
    config = json.loads((fine_folder / "config.json").read_text(encoding="utf-8"))
    config |= {"bos_token_id": None, "eos_token_id": len(ranks) + 1, "pad_token_id": None, "vocab_size": 2500}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rule = next(rule for rule in PRE_TOKENIZERS if rule.name == ("kimi-k2" if kind == "kimi" else "qwen2"))
    texts = [
        text
        for text in difficult_texts(1200)
        if unicodedata.is_normalized("NFC", text) and not any(re.search(known.where, text) for known in rule.differs)
    ]
    assert len(texts) > 200
    assert llama_tokens(folder, texts) == [list(tokens) for tokens in tokens_of(folder, texts)]
    assert gguf.GGUFReader(folder / "vocabulary.gguf").fields["tokenizer.ggml.pre"].contents() == rule.name


def test_special_tokens_have_their_numbers(folder: Path, kind: str, ranks: Ranks) -> None:
    tokenizer = load_tokenizer(folder)
    first = len(ranks)
    if kind == "kimi":
        assert tokenizer.encode("a[BOS]b<|im_end|>") == [ranks[b"a"], first, ranks[b"b"], first + 5]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (first, first + 1, first + 6)
    else:
        assert tokenizer.encode("<|startoftext|><|extra_204|>") == [first + 1, first + 209]
        assert (tokenizer.eos_token_id, tokenizer.chat_template) == (first + 3, "{{ messages }}")


def test_copied_files_need_neither_ranks_nor_code(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("copy")
    copy_tokenizer_files(folder, place)
    assert "auto_map" not in json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert not list(place.glob("*.py"))
    texts = difficult_texts(50)
    assert tokens_of(place, texts) == tokens_of(folder, texts)
    assert load_tokenizer(place).chat_template == load_tokenizer(folder).chat_template


def _replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.glob(name):
            text = re.sub(old, new, path.read_text(encoding="utf-8"), flags=re.IGNORECASE)
            path.write_text(text, encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: [path.unlink() for path in folder.glob("*.py")], r"tokenization_\w+\.py, which is missing"),
        (_replace("*.py", "pat_str", "other"), "assigns no text to pat_str"),
        (_replace("*.py", "class", "clas s"), r"tokenization_\w+\.py cannot be read as Python \(SyntaxError\)"),
        (_replace("*_config.json", "(tencent/x--)?tokenization_", "../tokenization_"), "which is no class in a file"),
        (_replace("*_config.json", '"(chat_template|bos_token)"', '"added_tokens_decoder": [3], "x"'), "by their num"),
        (_replace("*tiktoken*", " 300\n", " 299\n"), r"its 2,000 ranks are not those from 0 on, each once"),
        (_replace("*tiktoken*", " 7\n", " seven\n"), r"line 8: it does not hold one more token and its rank"),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_named(folder: Path, change: Callable[[Path], object], said: str) -> None:
    change(folder)
    with pytest.raises(InputError, match=said):
        load_tokenizer(folder)


def test_special_tokens_that_nothing_numbers_are_refused(folder: Path, kind: str) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("added_tokens_decoder", None)
    path.write_text(json.dumps(settings), encoding="utf-8")
    _replace("*.py", re.escape("<|bos|>"), "<|begin|>")(folder)
    with pytest.raises(InputError, match=r"says which numbers the special tokens of (TikToken|HY)Tokenizer have"):
        load_tokenizer(folder)


def test_a_model_of_sentencepiece_is_no_list_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    assert find_ranks(tmp_path) is None


def test_the_letters_of_bytes_are_those_of_the_library(folder: Path) -> None:
    decoder = decoders.ByteLevel()
    tokenizer = load_tokenizer(folder)
    texts = ["é", "\x00", "\xad", "日"]
    assert [decoder.decode(tokenizer.tokenize(text)) for text in texts] == texts
