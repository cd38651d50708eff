"""Each rule of llama.cpp against the expressions that stand for it, on texts that tokenizers cut differently."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from compressors.model.config.reading import read_spec
from compressors.model.errors import UnsupportedError
from compressors.model.files.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from exporter.validation.vocabulary_check import vocabulary_deviations
from exporter.writing.gguf.vocabulary.metadata import vocabulary_metadata
from exporter.writing.gguf.vocabulary.pre_tokenizers import known_pre_tokenizer
from tests.difficult_texts import difficult_texts
from tests.llama_vocabulary import llama_tokens

_ROWS = 4096
_BY_NAME = {rule.name: rule for rule in PRE_TOKENIZERS}
_ALPHABET = pre_tokenizers.ByteLevel.alphabet()
_EVERY_RULE = pytest.mark.parametrize("rule", PRE_TOKENIZERS, ids=list(_BY_NAME))


def _steps(expressions: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _train(texts: Sequence[str], pre_tokenizer: pre_tokenizers.PreTokenizer) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=_ROWS - 1, initial_alphabet=_ALPHABET, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    return data


@pytest.fixture(scope="module")
def long_words(heldout_text: str) -> dict[str, Any]:
    """A tokenizer.json whose merges know no words: nearly any cut that a pre-tokenizer makes changes the tokens."""
    pages = [heldout_text[start : start + 200] for start in range(0, 20_000, 200)]
    return _train([*difficult_texts(2000), *pages], _steps([]))


@pytest.fixture
def folder(fine_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint's small files, without tokenizer."""
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copyfile(fine_folder / name, tmp_path / name)
    return tmp_path


def _write(folder: Path, data: dict[str, Any], rule: PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.pre_tokenizer = _steps(rule.expressions)
    tokenizer.model.ignore_merges = rule.ignores_merges
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def _assert_cut_alike(folder: Path, tokenizer: Tokenizer, rule: PreTokenizer, texts: Sequence[str]) -> None:
    """Every text has the same tokens, but for those that the rule says are cut otherwise."""
    wanted = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    different = [
        text for text, one, other in zip(texts, wanted, llama_tokens(folder, texts), strict=True) if one != other
    ]
    unexplained = [text for text in different if not any(re.search(known.where, text) for known in rule.differs)]
    assert unexplained == []
    assert bool(different) == bool(rule.differs)
    assert len(different) < len(texts) / 4


@_EVERY_RULE
def test_a_vocabulary_made_with_the_expressions_is_cut_alike(
    folder: Path, heldout_text: str, rule: PreTokenizer
) -> None:
    data = _train([*difficult_texts(2000, seed=1), heldout_text[:30_000]], _steps(rule.expressions))
    tokenizer = _write(folder, data, rule)
    _assert_cut_alike(folder, tokenizer, rule, [*difficult_texts(1000), heldout_text[200_000:220_000]])
    assert gguf.GGUFReader(folder / "vocabulary.gguf").fields["tokenizer.ggml.pre"].contents() == rule.name


@pytest.mark.parametrize("name", [rule.name for rule in PRE_TOKENIZERS if not rule.apart and rule.name != "afmoe"])
def test_merges_over_all_words_are_cut_alike(folder: Path, long_words: dict[str, Any], name: str) -> None:
    rule = _BY_NAME[name]
    _assert_cut_alike(folder, _write(folder, long_words, rule), rule, difficult_texts(600))


@pytest.mark.parametrize("name", ["kimi-k2", "deepseek-llm"])
def test_merges_across_a_cut_that_llama_cpp_does_not_make_are_refused(
    folder: Path, long_words: dict[str, Any], name: str
) -> None:
    _write(folder, long_words, _BY_NAME[name])
    with pytest.raises(UnsupportedError, match=rf"put together what its pre-tokenizer separates \('.*{name}"):
        vocabulary_metadata(folder, _ROWS)


@pytest.mark.parametrize("name", ["tekken", "gpt-4o", "kimi-k2", "afmoe"])
def test_what_a_rule_cuts_otherwise_is_said_beforehand(folder: Path, heldout_text: str, name: str) -> None:
    rule = _BY_NAME[name]
    _write(folder, _train(difficult_texts(2000, seed=1), _steps(rule.expressions)), rule)
    said = " ".join(vocabulary_deviations(folder, read_spec(folder), "toy"))
    assert any(f"llama.cpp cuts text {known.words} otherwise, such as '" in said for known in rule.differs)


@pytest.mark.parametrize("ignores_merges", [True, False])
def test_merges_that_make_every_word_need_not_be_ignored(folder: Path, ignores_merges: bool) -> None:
    """gpt-oss and GLM say that they ignore merges, and llama.cpp's rule for them does not or does: it is all one."""
    for expressions, name in ((_BY_NAME["gpt-4o"].expressions, "gpt-4o"), (_BY_NAME["qwen2"].expressions, "qwen2")):
        rule = PreTokenizer("", expressions, ignores_merges)
        tokenizer = _write(folder, _train(difficult_texts(500), _steps(expressions)), rule)
        data = json.loads(tokenizer.to_str())
        assert known_pre_tokenizer(data, folder).name == name
        data["model"]["merges"] = data["model"]["merges"][:-1]  # so the last token is made by no merge
        data["model"]["ignore_merges"] = True
        with pytest.raises(
            UnsupportedError, match=r"ignore_merges is true.* 1 words are tokens that no merges make \('"
        ):
            known_pre_tokenizer(data, folder)


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AS_LLAMA_CPP_DOES = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("qwen2", {_CONTRACTIONS: _AS_LLAMA_CPP_DOES, r"\n": "\n"}),
        (
            "bailingmoe",
            {_CONTRACTIONS: "'(?i:[sdmt]|ll|ve|re)", r"\p{N}]?\p{L}": r"\p{N}]?+\p{L}", r"]+[\r": r"]++[\r"},
        ),
        ("seed-coder", {r"\r": "\r", r"\p{N}|": r"\p{N}{1}|"}),
        ("smaug-bpe", {r"\p{L}+|": r"\p{L}++|", r"[\r\n]*|": r"[\r\n]*+|"}),
    ],
)
def test_other_spellings_of_an_expression_are_recognised(
    folder: Path, long_words: dict[str, Any], name: str, others: dict[str, str]
) -> None:
    (expression,) = _BY_NAME[name].expressions
    for spelling, other in others.items():
        assert spelling in expression
        expression = expression.replace(spelling, other)
    tokenizer = _write(folder, long_words, PreTokenizer(name, (expression,)))
    _assert_cut_alike(folder, tokenizer, _BY_NAME[name], difficult_texts(300))
    assert gguf.GGUFReader(folder / "vocabulary.gguf").fields["tokenizer.ggml.pre"].contents() == name


def test_digits_and_removed_gaps_are_steps_of_their_own(folder: Path, long_words: dict[str, Any]) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    removing = pre_tokenizers.Split(Regex(_BY_NAME["gpt-4o"].expressions[0]), "removed", invert=True)
    for first, second, name in (
        (pre_tokenizers.Digits(individual_digits=True), byte_level, "starcoder"),
        (removing, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), "gpt-4o"),
    ):
        tokenizer = Tokenizer.from_str(json.dumps(long_words))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, second])
        assert known_pre_tokenizer(json.loads(tokenizer.to_str()), folder).name == name


@pytest.mark.parametrize(
    ("name", "known", "unknown"),
    [
        ("qwen2", r"\s*[\r\n]+", r"\s*[\r\n]{1,2}"),
        ("gpt-4o", r"[\r\n/]*", r"[\r\n]*"),
        ("seed-coder", r"\p{N}|", r"\p{N}{4}|"),
    ],
)
def test_an_unknown_expression_is_refused_with_the_nearest(
    folder: Path, long_words: dict[str, Any], name: str, known: str, unknown: str
) -> None:
    (expression,) = _BY_NAME[name].expressions
    assert known in expression
    other = expression.replace(known, unknown)
    _write(folder, long_words, PreTokenizer("", (other,)))
    with pytest.raises(UnsupportedError) as caught:
        vocabulary_metadata(folder, _ROWS)
    message = str(caught.value)
    assert f"the pre-tokenizer {other!r} is not known to be in llama.cpp" in message
    assert f"; the nearest that it has is {name}, with " in message
    assert message.endswith("; use --formats onnx")


def test_the_page_names_every_rule_and_its_differences() -> None:
    page = (Path(__file__).parents[4] / "docs" / "tokenizers.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for rule in PRE_TOKENIZERS:
        (row,) = [line for line in rows if f"`{rule.name}`" in line.split("|")[1]]
        assert bool(row.split("|")[3].strip()) == bool(rule.differs)
