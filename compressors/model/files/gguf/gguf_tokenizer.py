"""The tokenizer of a GGUF file as the files that ``AutoTokenizer`` reads.

llama.cpp keeps two kinds in these architectures: byte-level BPE (``gpt2``), whose splitting expression it knows by
name, and SentencePiece-style BPE (``llama``), which merges the pair whose union has the highest score
(``src/llama-vocab.cpp``). No file says how its text was normalised before: as in llama.cpp, nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gguf.constants import Keys, TokenType

from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.files.gguf.pre_tokenizers import PRE_TOKENIZERS
from compressors.model.names import shown

__all__ = ["generation_config", "tokenizer_config", "tokenizer_json"]

_ALIASES = {
    "bailingmoe": ("bailingmoe2", "llada-moe"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
    "gpt-2": ("olmo", "mpt", "phi-2", "jina-es", "jina-de", "gigachat", "a.x-4.0", "mellum", "modern-bert", "trillion"),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "glm4", "glm5"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "hunyuan", "solar-open"),
    "smaug-bpe": ("dbrx",),
    "starcoder": ("refact", "command-r", "smollm", "codeshell", "exaone"),
}
"""Other names of llama.cpp for the same expressions and the same use of merges, by the name that we write."""

_ADD_BEGIN = frozenset({"llama-bpe", *_ALIASES["llama-bpe"], "tekken"} - {"glm4", "glm5"})
"""Names with which llama.cpp puts a begin token before a text where the file does not say."""

_MARKS = ("bos", "eos", "unk", "sep", "pad", "mask")
_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""Tokens that end a text in llama.cpp, by their keys, in the order in which we write them."""

_ADDED = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
"""Kinds of tokens that are taken out of a text before it is cut, and whether they are special."""


def tokenizer_json(file: GgufFile) -> dict[str, Any]:
    """The content of ``tokenizer.json``.

    Raises:
        InputError: the file has no tokenizer, or a damaged one.
        UnsupportedError: it is of another kind, or its pre-tokenizer is not known.
    """
    kind, tokens, types = file.metadata.get(Keys.Tokenizer.MODEL), _tokens(file), _types(file)
    if kind == "gpt2":
        parts = _byte_level(file, tokens, types)
    elif kind == "llama":
        parts = _sentencepiece(file, tokens, types)
    else:
        raise UnsupportedError(
            f"{file.path}: its tokenizer is of the kind {shown(kind)}; only gpt2 and llama can be turned into a "
            "tokenizer.json: give the original checkpoint"
        )
    added = [
        _added(number, text, is_special=_ADDED[TokenType(token_type)])
        for number, (text, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type in _ADDED
    ]
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return {**whole, **parts, "post_processor": _post_processor(file, tokens)}


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``: special tokens, and the chat template."""
    tokens = _tokens(file)
    marks = {f"{mark}_token": tokens[number] for mark in _MARKS if (number := _special(file, mark)) is not None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **marks}
    template, named = file.metadata.get(Keys.Tokenizer.CHAT_TEMPLATE), file.array(Keys.Tokenizer.CHAT_TEMPLATES) or ()
    if not named:
        return config if template is None else {**config, "chat_template": template}
    texts = {"default": template, **{name: file.metadata.get(f"tokenizer.chat_template.{name}") for name in named}}
    templates = [{"name": name, "template": text} for name, text in texts.items() if text is not None]
    return {**config, "chat_template": templates}


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The content of ``generation_config.json``: the tokens that begin, end and pad texts."""
    found = {f"{mark}_token_id": _special(file, mark) for mark in ("bos", "pad")}
    ends = list(dict.fromkeys(number for mark in _ENDS if (number := _special(file, mark)) is not None))
    return {key: value for key, value in {**found, "eos_token_id": ends or None}.items() if value is not None}


def _tokens(file: GgufFile) -> tuple[str, ...]:
    found = file.array(Keys.Tokenizer.LIST)
    if not found or not isinstance(found[0], str):
        raise InputError(f"{file.path} has no tokens ({Keys.Tokenizer.LIST}): give the original checkpoint")
    return found


def _types(file: GgufFile) -> Sequence[int]:
    tokens, types = _tokens(file), file.array(Keys.Tokenizer.TOKEN_TYPE)
    if types is None or len(types) != len(tokens):
        raise InputError(
            f"{file.path}: {Keys.Tokenizer.TOKEN_TYPE} must give the kinds of all {len(tokens)} tokens; write it again"
        )
    return types


def _special(file: GgufFile, mark: str) -> int | None:
    """The id of a special token; None if the file names none."""
    number = file.metadata.get(getattr(Keys.Tokenizer, f"{mark.upper()}_ID"))
    n_tokens = file.array_lengths.get(Keys.Tokenizer.LIST, 0)
    return number if type(number) is int and 0 <= number < n_tokens else None


def _vocabulary(file: GgufFile, tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """The ids by text; a row without a token has none."""
    found: dict[str, int] = {}
    for number, (text, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type == TokenType.UNUSED:
            continue
        if text in found:
            raise InputError(f"{file.path}: its tokens {found[text]} and {number} are both {shown(text)}")
        found[text] = number
    return found


def _model(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], **other: object) -> dict[str, Any]:
    usual = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    affixes = {"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    return {**usual, **affixes, **other, "vocab": vocabulary, "merges": [list(pair) for pair in merges]}


def _byte_level(file: GgufFile, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    name, merges = file.metadata.get(Keys.Tokenizer.PRE), file.array(Keys.Tokenizer.MERGES)
    if merges is None or not all(isinstance(merge, str) and " " in merge[1:] for merge in merges):
        raise InputError(f"{file.path}: {Keys.Tokenizer.MERGES} must be pairs of texts; write it again")
    known = next((ours for ours, others in _ALIASES.items() if name in others), name)
    rules = {rule.name: rule for rule in PRE_TOKENIZERS}
    if known not in rules:
        raise UnsupportedError(
            f"{file.path}: llama.cpp's pre-tokenizer {shown(name)} is not known here; give the original checkpoint"
        )
    rule = rules[str(known)]
    splits = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in rule.expressions
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pairs = [(merge[:cut], merge[cut + 1 :]) for merge in merges for cut in [merge.index(" ", 1)]]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": _model(_vocabulary(file, tokens, types), pairs, ignore_merges=rule.ignores_merges),
    }


def _sentencepiece(file: GgufFile, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    scores = file.array(Keys.Tokenizer.SCORES)
    if scores is None or len(scores) != len(tokens):
        raise InputError(
            f"{file.path}: {Keys.Tokenizer.SCORES} must give the scores of all {len(tokens)} tokens; write it again"
        )
    unknown = next((text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    vocabulary = _vocabulary(file, tokens, types)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepends = bool(file.metadata.get(Keys.Tokenizer.ADD_PREFIX, True))
    steps = [{"type": "Prepend", "prepend": "▁"}] if prepends else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepends else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    merges = _merges(vocabulary, scores)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*steps, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, the piece with the highest score first, as transformers lists them."""
    by_score = sorted(vocabulary, key=lambda text: -scores[vocabulary[text]])  # equal ones stay in order
    return [
        (text[:cut], text[cut:])
        for text in by_score
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]


def _added(number: int, text: str, *, is_special: bool) -> dict[str, Any]:
    as_it_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **as_it_is, "special": is_special}


def _post_processor(file: GgufFile, tokens: Sequence[str]) -> dict[str, Any] | None:
    """Puts begin and end token around a text where llama.cpp does; None where it puts none."""
    is_sentencepiece = file.metadata.get(Keys.Tokenizer.MODEL) == "llama"
    adds_begin = is_sentencepiece or file.metadata.get(Keys.Tokenizer.PRE) in _ADD_BEGIN
    begin = _special(file, "bos") if file.metadata.get(Keys.Tokenizer.ADD_BOS, adds_begin) else None
    end = _special(file, "eos") if file.metadata.get(Keys.Tokenizer.ADD_EOS, False) else None
    if begin is None and end is None:
        return None

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": sequence, "type_id": type_id}}
        before, behind = (
            [] if number is None else [{"SpecialToken": {"id": tokens[number], "type_id": type_id}}]
            for number in (begin, end)
        )
        return [*before, text, *behind]

    special = {
        tokens[number]: {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]}
        for number in (begin, end)
        if number is not None
    }
    pair = [*around("A", 0), *around("B", 1)]
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special}
