"""The vocabularies of a checkpoint's tokenizer, or of a file with its own; and whether two of them are the same.

Models are compared token by token, so a token must be the same text in both. They may differ in padding: a head is
often made larger than the vocabulary so that its size is a round number, and some converters drop these rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt

from compressors.model.errors import InputError
from validate.runtimes import time_limit
from validate.runtimes.backend import Backend, ChunkOutput
from validate.runtimes.llama_cpp_session import logged_error, start_runtime

if TYPE_CHECKING:  # a process that only tokenizes needs no torch
    import torch

    from validate.metrics.positions import ReferenceLogProbs

__all__ = ["FirstTokens", "FirstTokensOf", "GgufVocabulary", "TokenizerVocabulary", "Vocabulary"]
__all__ += ["check_padding", "check_same_tokens"]


class Vocabulary(Protocol):
    """The texts of tokens."""

    @property
    def where(self) -> str:
        """The file of the vocabulary, for messages."""

    def text(self, token: int) -> str | None:
        """The text of a token as the tokenizer writes it; None if it has no such token."""


class TokenizerVocabulary:
    """The vocabulary of a folder with a Hugging Face tokenizer.

    Raises:
        InputError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        from compressors.model.files.tokenizer_files import load_tokenizer  # a process without such a folder needs none

        self.where = str(folder)
        with time_limit.working():
            self._tokenizer: Any = load_tokenizer(folder)

    def text(self, token: int) -> str | None:
        """See :class:`Vocabulary`."""
        text: str | None = self._tokenizer.convert_ids_to_tokens(token) if token < len(self._tokenizer) else None
        return text


class GgufVocabulary:
    """The vocabulary of a GGUF file, as llama.cpp reads it; no weight is loaded.

    It encodes as the tokenizers of transformers do, so :func:`compressors.calibration.splits.tokenize_heldout` takes
    it.

    Raises:
        InputError: the file is missing, or llama.cpp cannot read its vocabulary.
    """

    def __init__(self, path: Path) -> None:
        self._model: int | None = None
        self.where = str(path)
        if not path.is_file():
            raise InputError(f"{path} does not exist: give a GGUF file")
        start_runtime()
        params = api.llama_model_default_params()
        params.vocab_only = True
        with time_limit.working():
            self._model = api.llama_model_load_from_file(str(path).encode(), params)
        vocabulary = api.llama_model_get_vocab(self._model) if self._model is not None else None
        if vocabulary is None or not api.llama_vocab_n_tokens(vocabulary):
            raise InputError(f"{path}: llama.cpp cannot read its vocabulary{logged_error()}; convert the model again")
        self._vocabulary = vocabulary
        adds_bos = api.llama_vocab_get_add_bos(vocabulary)
        self.bos_token_id = int(api.llama_vocab_bos(vocabulary)) if adds_bos else None

    def __del__(self) -> None:
        if self._model is not None:
            api.llama_model_free(self._model)

    def __len__(self) -> int:
        return int(api.llama_vocab_n_tokens(self._vocabulary))

    def text(self, token: int) -> str | None:
        """See :class:`Vocabulary`; tokens that the file marks as unused are padding.

        llama.cpp also calls control tokens unused that have this word in their text, as some of Gemma's.
        """
        if token >= len(self) or api.llama_vocab_get_attr(self._vocabulary, token) == api.LLAMA_TOKEN_ATTR_UNUSED:
            return None
        text: bytes = api.llama_vocab_get_text(self._vocabulary, token)
        return text.decode("utf-8", errors="replace")

    def attributes(self, token: int) -> int:
        """The kind of the token: ``enum llama_token_attr`` of ``llama.h``."""
        return int(api.llama_vocab_get_attr(self._vocabulary, token))

    @property
    def begin_token(self) -> int:
        """The token that begins a text; -1 if there is none."""
        return int(api.llama_vocab_bos(self._vocabulary))

    @property
    def end_token(self) -> int:
        """The main end token (eos); -1 if there is none."""
        return int(api.llama_vocab_eos(self._vocabulary))

    @property
    def adds_begin(self) -> bool:
        """True if llama.cpp puts :attr:`begin_token` before a text."""
        return bool(api.llama_vocab_get_add_bos(self._vocabulary))

    @property
    def adds_end(self) -> bool:
        """True if llama.cpp puts :attr:`end_token` behind a text."""
        return bool(api.llama_vocab_get_add_eos(self._vocabulary))

    @property
    def end_tokens(self) -> frozenset[int]:
        """All tokens at which llama.cpp ends a text: those that the file names, and those known by their text."""
        tokens = range(len(self))
        return frozenset(compress(tokens, map(partial(api.llama_vocab_is_eog, self._vocabulary), tokens)))

    @property
    def marks(self) -> frozenset[str]:
        """The texts of the tokens that llama.cpp takes for special and looks for before it cuts a text."""
        kinds = api.LLAMA_TOKEN_ATTR_CONTROL | api.LLAMA_TOKEN_ATTR_USER_DEFINED | api.LLAMA_TOKEN_ATTR_UNKNOWN
        attributes = map(partial(api.llama_vocab_get_attr, self._vocabulary), range(len(self)))
        found = (token for token, attribute in enumerate(attributes) if attribute & kinds)
        return frozenset(text for token in found if (text := self.text(token)) is not None)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Returns the tokens of a text, after BOS if the model needs it; ``parse_special`` recognises special ones.

        Raises:
            InputError: llama.cpp cannot tokenise it.
        """
        data = text.encode("utf-8")
        room = len(data) + 8
        while True:
            tokens = (api.llama_token * room)()
            with time_limit.working():
                count = api.llama_tokenize(
                    self._vocabulary, data, len(data), tokens, room, add_special_tokens, parse_special
                )
            if count >= 0:
                return list(tokens[:count])
            if -count <= room:
                raise InputError(f"{self.where}: llama.cpp cannot tokenise the text ({count})")
            room = -count  # spaces and unknown characters may become several tokens each


def check_same_tokens(first: Vocabulary, second: Vocabulary, tokens_BT: npt.NDArray[np.int64]) -> None:
    """Checks that the tokens of a text are the same texts in both vocabularies.

    Raises:
        InputError: a token differs; the message names it.
    """
    for token in np.unique(tokens_BT).tolist():
        one, other = first.text(token), second.text(token)
        if one != other:
            raise InputError(
                f"token {token} is {one!r} in {first.where} and {other!r} in {second.where}: models of different "
                "vocabularies cannot be compared"
            )


def check_padding(larger: Vocabulary | None, first: int, size: int) -> None:
    """Checks that the tokens from ``first`` to ``size`` are padding, which no tokenizer makes from any text.

    Raises:
        InputError: one of them is in the vocabulary; the message names it.
    """
    texts = ((token, None if larger is None else larger.text(token)) for token in range(first, size))
    used = next(((token, text) for token, text in texts if text is not None), None)
    if larger is not None and used is not None:
        raise InputError(
            f"{larger.where} has {size:,} tokens and the other model {first:,}; token {used[0]} is {used[1]!r}, which "
            "is not padding: models of different vocabularies cannot be compared"
        )


class FirstTokens:
    """A backend without its last logits, those of padding; implements :class:`validate.runtimes.backend.Backend`."""

    def __init__(self, backend: Backend, n_tokens: int) -> None:
        self._backend = backend
        self._n_tokens = n_tokens

    @property
    def runtime(self) -> str:
        """See :class:`validate.runtimes.backend.Backend`."""
        return self._backend.runtime

    @property
    def version(self) -> str:
        """See :class:`validate.runtimes.backend.Backend`."""
        return self._backend.version

    def run(self, tokens_BT: npt.NDArray[np.int64]) -> Iterator[ChunkOutput]:
        """See :class:`validate.runtimes.backend.Backend`."""
        for output in self._backend.run(tokens_BT):
            yield ChunkOutput(np.ascontiguousarray(output.logits_SV[:, : self._n_tokens]), output.routing)


class FirstTokensOf:
    """A reference with its padding removed; implements :class:`validate.metrics.positions.ReferenceLogProbs`.

    The padding's probability is given to the other tokens in proportion.
    """

    def __init__(self, log_probs: ReferenceLogProbs, n_tokens: int) -> None:
        self._log_probs = log_probs
        self._n_tokens = n_tokens

    def __len__(self) -> int:
        return len(self._log_probs)

    def decoded(self, start: int, stop: int) -> torch.Tensor:
        """See :class:`validate.metrics.positions.ReferenceLogProbs`."""
        return self._log_probs.decoded(start, stop)[:, : self._n_tokens].log_softmax(-1).contiguous()
