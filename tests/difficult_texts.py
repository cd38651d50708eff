"""Short texts on which tokenizers differ in practice, put together at random from parts that go wrong."""

from __future__ import annotations

import random

__all__ = ["difficult_texts"]

_PARTS: dict[str, str] = {
    "numbers": "7 42 2024 12345 1234567 1,000.50 3.14e-10 0xFF $19 100% v2.0.1",
    "words": "the House fooBar HTTPServer a I naïve café Straße Ænima coöp",
    "contractions": "don't WE'LL it's I'M they've 's 'T o'clock y'all 'tis d'oh",
    "code": "x+=1; f(a,b) -> :: // /* #! <a> [0] {} __init__ a_b == ... a/b",
    "signs": "! ?! … — “q” ‘q’ (x) € £5 °C ± × ™ @me #tag & ~ ^ ` |",
    "Chinese and Japanese": "中文 没有空格。 日本語 カタカナ ひらがな ， 「引用」 々 ｱｲｳ ２０２４",
    "Hangul": "한국어 텍스트 가 안녕하세요 ㄱㄴ 한글",
    "other scripts": "Привет ЁЖ Ελλάδα שלום مرحبا ٣٤٥ ไทย ภาษาไทย ລາວ ខ្មែរ မြန်မာ",
    "marks": "cafe\u0301 A\u030a हिन्दी में தமிழ் n\u0303o \u0e33 ǅ ﬁ ½ ² Ⅷ",
    "emoji": "😀 👩\u200d👩\u200d👧 👍🏽 🇩🇪 ❤\ufe0f ✓ → \u200b \ufeff",
}
"""Parts of texts by their kind, with spaces between them."""

_SPACES = (" ", "  ", "   ", "        ", "\t", "\t\t", " \t ", "\u00a0", "\u3000", "\u2003", "\u2028")
_LINES = ("\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", " \n", "\n ", "  \n\n  ", "\n\t", "\r")
_BY_KIND = {**{kind: tuple(parts.split(" ")) for kind, parts in _PARTS.items()}, "spaces": _SPACES, "lines": _LINES}
_ASCII = ("numbers", "words", "contractions", "spaces", "lines", "code")


def difficult_texts(count: int, seed: int = 0) -> list[str]:
    """Returns different texts of two to nine parts each; a third of them is nearly all ASCII."""
    source = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        kinds = list(_BY_KIND if source.random() < 0.67 else _ASCII)
        parts = [source.choice(_BY_KIND[source.choice(kinds)]) for _ in range(source.randint(2, 9))]
        between = source.choice(("", "", " "))
        found[between.join(parts)] = None
    return list(found)
