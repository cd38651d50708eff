"""The ways in which llama.cpp cuts text into words before it merges bytes, each under its name.

llama.cpp reads no expression from a file: it has a fixed set of rules (``llm_tokenizer_bpe`` in
``src/llama-vocab.cpp``), and several names for most of them, of which the table has the one that most versions of
llama.cpp and most other readers of GGUF files know. Expressions are as ``tokenizer.json`` has them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BYTE_LEVEL_WORDS", "DIGIT", "PRE_TOKENIZERS", "QWEN2_WORDS", "KnownDifference", "PreTokenizer"]


@dataclass(frozen=True)
class KnownDifference:
    """Texts that llama.cpp cuts otherwise than the expressions say.

    Attributes:
        where: an expression of Python that finds something in each of these texts.
        words: their description, behind "text".
    """

    where: str
    words: str


@dataclass(frozen=True)
class PreTokenizer:
    """A rule of llama.cpp.

    Attributes:
        name: llama.cpp's name, for the key ``tokenizer.ggml.pre``.
        expressions: the expressions of ``tokenizer.json`` that cut text in the same way, in their order.
        ignores_merges: True if a word that is a token becomes this token without any merge.
        apart: an expression of Python for letters and digits that the expressions separate and llama.cpp does not. It
            makes no difference as long as no token has them side by side.
        differs: the texts that are cut otherwise all the same.
    """

    name: str
    expressions: tuple[str, ...]
    ignores_merges: bool = False
    apart: str | None = None
    differs: tuple[KnownDifference, ...] = ()


DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_SLASH_TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
BYTE_LEVEL_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The expression of the step ``ByteLevel`` itself, which is GPT-2's."""

QWEN2_WORDS = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_TAIL}"
"""The expression of Qwen2 and its successors up to Qwen3."""

_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_SEED = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_BAILING = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_CASED = (  # words by upper and lower case, as o200k cuts them
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASH_TAIL}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
_NO_HAN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
)
_KIMI = rf"[\p{{Han}}]+|{_NO_HAN[0]}{_CONTRACTIONS}?|{_NO_HAN[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_TAIL}"
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+".replace(r"\"", '"')
_SIGN_WORDS = rf"{_ASCII_SIGNS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_DEEPSEEK3 = rf"{_SIGN_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_SPARK = rf"{_SIGN_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_SIGNS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_GROUPED_DIGITS = (  # groups of three, counted from the end of a number
    r"\p{Nd}{1,510}(?=(?>\p{Nd}{510})*(?:\P{Nd}|$))|\G\p{Nd}{510}",
    r"\A\p{Nd}{1,2}(?=\p{Nd}{3}+\z)",
    r"\A\p{Nd}{3}|\G\p{Nd}{3}",
)
_SCRIPTS_WITHOUT_SPACES = (
    r"(?:[\u4E00-\u9FFF\u3040-\u309F\u30A0-\u30FF\u3400-\u4DBF\uf900-\uFAFF\uFF65-\uFF9F\u2F00-\u2FDF]+"
    r"|[\u0E00-\u0E7F]+|[\u0E80-\u0EFF]+|[\u1780-\u17FF]+|[\u1000-\u109F\uAA60-\uAA7F\uA9E0-\uA9FF]+"
    r"|[\uAC00-\uD7AF\u1100-\u11FF]+)"
)
_CASE_AND_MARKS = KnownDifference(
    r"[^\x00-\x7f]", "with combining marks, or with capital letters inside words, of other than Latin letters"
)
_RARE_CHINESE = KnownDifference("[\u2e80-\u2fdf\u3005\u3007\u3021-\u303b]", "with Chinese signs that are no characters")
_SPECIAL_SPACES = KnownDifference(
    "[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]", "with wide or unbroken spaces beside others"
)
_BEFORE_NUMBERS = KnownDifference(r"\s\s\d", "in which several spaces stand before a number")
_WITHOUT_SPACES = KnownDifference(r"[^\x00-\x7f]", "in Thai and other scripts without spaces, or with marks")

PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (BYTE_LEVEL_WORDS,)),
    PreTokenizer("starcoder", (DIGIT, BYTE_LEVEL_WORDS)),
    PreTokenizer("qwen2", (QWEN2_WORDS,)),
    PreTokenizer("qwen35", (_QWEN35,)),
    PreTokenizer("smaug-bpe", (_LLAMA3,)),
    PreTokenizer("llama-bpe", (_LLAMA3,), ignores_merges=True),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}+|{_TAIL}"), ignores_merges=True),
    PreTokenizer("tekken", (_TEKKEN,), ignores_merges=True, differs=(_CASE_AND_MARKS,)),
    PreTokenizer("gpt-4o", (_GPT4O,), differs=(_CASE_AND_MARKS,)),
    PreTokenizer("kimi-k2", (_KIMI,), apart="[a-z][A-Z]", differs=(_RARE_CHINESE, _CASE_AND_MARKS)),
    PreTokenizer("deepseek-v3", (r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK3)),
    PreTokenizer("spark2_5", (r"\p{N}{1,3}", _HAN_AND_KANA, _SPARK, DIGIT)),
    PreTokenizer(
        "deepseek-llm",
        (r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", rf"\s?[{_DEEPSEEK_SIGNS}]+", r"\s+$", _EAST_ASIAN, DIGIT),
        apart="[0-9]{2}",
        differs=(_SPECIAL_SPACES,),
    ),
    PreTokenizer(
        "deepseek-coder",
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, DIGIT),
        differs=(_SPECIAL_SPACES,),
    ),
    PreTokenizer(
        "afmoe",
        (*_GROUPED_DIGITS, _SCRIPTS_WITHOUT_SPACES, _DEEPSEEK3),
        differs=(_BEFORE_NUMBERS, _WITHOUT_SPACES),
    ),
    PreTokenizer("seed-coder", (_SEED,)),
    PreTokenizer("bailingmoe", (_BAILING,)),
    PreTokenizer("exaone-moe", (_EXAONE_MOE,)),
    PreTokenizer("ufakzeka", (rf"{_WORDS}|\p{{N}}|{_TAIL}",)),
)
"""All rules that are known to be equal, or nearly so, to what stands in files."""
