"""Tests whether two tokenizers cut text into the same tokens, on a page of texts that go wrong in practice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["AWKWARD_TEXTS", "Difference", "Encode", "texts_around", "tokenization_differences"]

Encode = Callable[[str], Sequence[int]]
"""Returns token ids of a text in which special tokens are recognised; nothing is put before or behind it."""

AWKWARD_TEXTS: tuple[str, ...] = (
    "Hello, world!",
    " begins with a space",
    "  two spaces,   three,    four",
    "ends with spaces   ",
    "\ttab\t\ttabs\nline\n\nlines\r\nwindows\r\n\r\n",
    "   \n  \n\t\n",
    "I'm, you're, she'll, we've, they'd; I'M, YOU'RE, SHE'LL",
    "1234567890 3.14159 1,000,000 2026-11-26 0xDEADBEEF ½ ²³ ٣٤٥",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]->c; }  // done",
    "def f(x):\n    return x ** 2\n\n\nclass A:\n\tpass\n",
    "https://example.com/a_b-c?d=e&f=%20#g user@example.com #tag @name",
    "naïve café — “quoted” ‘single’ … €£¥ ™",
    "cafe\u0301 n\u0303 A\u030a \u1e9b\u0323 ﬁ ﬂ Å",
    "Ünïcödé STRASSE straße İstanbul ıi ǅ",
    "Привет, мир! Ελληνικά. עברית שלום العربية مرحبا",
    "中文没有空格。日本語のテキスト、カタカナ。한국어 텍스트",
    "हिन्दी में पाठ ไทยภาษา தமிழ் ខ្មែរ",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
    "zero\u200bwidth\u200djoiner\ufeffbom\u00a0nbsp\u2003em\u3000ideographic\u2028line",
    "[\n        42,\n    1000 \u3000 wide\u3000\u00a0 \u2003spaces",
    "\x00\x01\x1f\x7f\u0085",
    "\U00010348 \U0001d54f \ud7ff \ue000 \ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!????????",
    "▁lower one eighth block ▁▁ Ġ Ċ <0x0A> [PAD0]",
    "<s>[INST] Hi [/INST] Hello</s> <unk> <pad> <|endoftext|>",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
)
"""Texts with chat turns, digits, spaces, code, other scripts, emoji, control characters, and special tokens inside."""


def texts_around(tokens: Iterable[str]) -> Iterator[str]:
    """Yields texts with each of a vocabulary's special tokens: at both ends, beside letters, spaces and line ends."""
    for token in tokens:
        yield token
        yield f"{token}user"
        yield f"a{token}b"
        yield f"the {token} house"
        yield f"{token}\n\n{token} {token}{token}  "


@dataclass(frozen=True)
class Difference:
    """A text that two tokenizers cut differently."""

    text: str
    expected: tuple[int, ...]
    found: tuple[int, ...]


def tokenization_differences(expected: Encode, found: Encode, texts: Iterable[str]) -> Iterator[Difference]:
    """Yields the texts whose tokens differ, with both lists of token ids, in the order of ``texts``."""
    for text in texts:
        tokens, others = tuple(expected(text)), tuple(found(text))
        if tokens != others:
            yield Difference(text, tokens, others)
