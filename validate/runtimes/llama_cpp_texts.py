"""Continues many texts together in llama.cpp, each from what the cache still holds of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile

import llama_cpp.llama_cpp as api

from validate.runtimes.backend import ChooseToken
from validate.runtimes.llama_cpp_session import LoadedModel, Row, Session

__all__ = ["LlamaCppTexts"]

_TOKENS_AT_ONCE = 512


class LlamaCppTexts:
    """A context of a GGUF file in llama.cpp whose cache holds several texts.

    Args:
        model: the loaded file.
        n_texts: the number of texts.
        n_tokens: the most tokens of a text.
        threads: threads of llama.cpp.
        kv_type: a key of :data:`~compressors.model.files.gguf.kv_types.KV_TYPES`.
        flash_attention: a value of ``llama_flash_attn_type``.

    Raises:
        InputError: the context cannot be set up.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        n_texts: int,
        n_tokens: int,
        threads: int,
        kv_type: str = "f16",
        flash_attention: int = api.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    ) -> None:
        self._session = Session(
            model,
            n_ctx=n_tokens,
            n_batch=_TOKENS_AT_ONCE,
            kv_type=kv_type,
            flash_attention=flash_attention,
            threads=threads,
            n_texts=n_texts,
        )
        self._cached: dict[int, list[int]] = {text: [] for text in range(n_texts)}

    def extend(
        self, texts: Mapping[int, Sequence[int]], most: Mapping[int, int], choose: Mapping[int, ChooseToken]
    ) -> dict[int, list[int]]:
        """Continues texts by a few tokens, all of them together.

        Args:
            texts: the tokens of each text, by its number.
            most: how many tokens to add to each; at least 1.
            choose: the choice of the next token of each; none of them may end its text.

        Returns:
            The new tokens of each text.

        Raises:
            RuntimeCrashError: llama.cpp could not evaluate the tokens.
        """
        new: dict[int, list[int]] = {text: [] for text in texts}
        alike = self._grouped(texts)
        rows = [row for text in alike for row in self._missing_rows(text, texts[text])]
        while rows:
            for start in range(0, len(rows), _TOKENS_AT_ONCE):
                part = rows[start : start + _TOKENS_AT_ONCE]
                self._session.decode_rows(part)
                for index, row in enumerate(part):
                    self._cached[row.text].append(row.token)
                    for text in alike[row.text] if row.wants_logits else ():
                        token = choose[text](self._session.row_logits(index))
                        assert token is not None
                        new[text].append(token)
            self._copy(alike)
            alike = {text: [text] for text in texts}
            rows = [
                Row(new[text][-1], len(self._cached[text]), text, wants_logits=True)
                for text in texts
                if len(new[text]) < most[text]
            ]
        return new

    def _grouped(self, texts: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """Each text that is run, with those that get its tokens: itself, and equal ones if none of them has begun."""
        alike: dict[int, list[int]] = {}
        first: dict[tuple[int, ...], int] = {}
        for text, tokens in texts.items():
            run = text if self._cached[text] else first.setdefault(tuple(tokens), text)
            alike.setdefault(run, []).append(text)
        return alike

    def _copy(self, alike: Mapping[int, Sequence[int]]) -> None:
        """Gives texts that were not run what the cache holds of the equal one that was."""
        for source, texts in alike.items():
            for text in texts:
                if text != source:
                    self._session.copy(source, text)
                    self._cached[text] = list(self._cached[source])

    def _missing_rows(self, text: int, tokens: Sequence[int]) -> Iterator[Row]:
        """The tokens of a text that its cache lacks, at least the last one; tokens that it has too many are cut."""
        pairs = zip(self._cached[text], tokens[:-1], strict=False)
        n_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if n_common < len(self._cached[text]):
            n_common = self._session.cut(text, n_common)
        self._cached[text] = list(tokens[:n_common])
        for position in range(n_common, len(tokens)):
            yield Row(tokens[position], position, text, wants_logits=position == len(tokens) - 1)
