"""The original's tokenizer, as transformers makes it, and the texts on which others are compared with it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.model.config.special_tokens import special_tokens
from compressors.model.files.tokenizer_files import files_state, load_tokenizer
from validate.vocabulary.tokenization import AWKWARD_TEXTS

__all__ = ["OriginalTokenizer", "original_tokenizer"]


def original_tokenizer(folder: Path, vocab_size: int) -> OriginalTokenizer:
    """A checkpoint's tokenizer, remembered with its tokens of texts as long as its files do not change.

    Raises:
        InputError: the checkpoint has no usable tokenizer.
    """
    return _remembered(folder, vocab_size, files_state(folder))


@functools.lru_cache(maxsize=2)
def _remembered(folder: Path, vocab_size: int, state: object) -> OriginalTokenizer:
    return OriginalTokenizer(folder, vocab_size)


class OriginalTokenizer:
    """The tokenizer of a checkpoint's folder.

    Args:
        folder: the checkpoint's folder.
        vocab_size: the rows of its embedding.

    Attributes:
        folder: the checkpoint's folder.
        tokenizer: transformers' object.
        special: the begin, end and padding tokens, those of configurations included.
        added: the tokens that are recognised in text, by id.
        is_byte_level: True if it is BPE over bytes, as GPT-2's.
        has_bytes: True if tokens such as ``<0x0A>`` stand for bytes.

    Raises:
        InputError: the checkpoint has no usable tokenizer.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = folder
        self.tokenizer: Any = load_tokenizer(folder)
        self.special = special_tokens(folder, vocab_size)
        self._cut: tuple[tuple[tuple[int, ...], ...], dict[str, list[int]]] | None = None
        self.added: Mapping[int, Any] = self.tokenizer.added_tokens_decoder
        self.is_byte_level = _is_byte_level(self.tokenizer.backend_tokenizer)
        self.has_bytes = bool(getattr(self.tokenizer.backend_tokenizer.model, "byte_fallback", False))

    def __len__(self) -> int:
        return len(self.tokenizer)

    def text(self, token: int) -> str | None:
        """The text of a token as the tokenizer writes it; None if it has no such token."""
        text: str | None = self.tokenizer.convert_ids_to_tokens(token) if token < len(self.tokenizer) else None
        return text

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, with special ones recognised and nothing put before or behind it."""
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return tokens

    def cut(self, chunks: Iterable[Sequence[int]]) -> dict[str, list[int]]:
        """Returns texts and their tokens: awkward ones, special tokens in text, chunks, and every token's own text."""
        wanted = tuple(map(tuple, chunks))
        if self._cut is None or self._cut[0] != wanted:
            texts = list(dict.fromkeys(self._texts(wanted)))
            tokens = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            self._cut = wanted, dict(zip(texts, tokens, strict=True))
        return self._cut[1]

    def _texts(self, chunks: Iterable[Sequence[int]]) -> list[str]:
        special = [str(token) for token in self.added.values()]
        inside = [text for token in special for text in (token, f"a{token} b", f" {token}\n")]
        held_out = [self._decoded(chunk) for chunk in chunks]
        own = (self._decoded([token]) for token in range(len(self)) if token not in self.added)
        return [*AWKWARD_TEXTS, *inside, *held_out, *(text for text in own if text and "\ufffd" not in text)]

    def around(self) -> tuple[list[int], list[int]]:
        """The tokens that it puts before and behind a text."""
        alone, whole = self.encode("a"), self.tokenizer.encode("a")
        for start in range(len(whole) - len(alone) + 1):
            if whole[start : start + len(alone)] == alone:
                return whole[:start], whole[start + len(alone) :]
        return [], []

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _is_byte_level(backend: Any) -> bool:
    return type(backend.model).__name__ == "BPE" and type(backend.decoder).__name__ == "ByteLevel"
