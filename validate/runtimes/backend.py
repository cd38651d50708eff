"""The interface of a runtime for validation: logits and routing over token chunks.

Letters: B chunks, T tokens of a chunk, S scored positions of a chunk, V vocabulary, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from compressors.model.errors import MoeExportError
from compressors.model.predictions.routing_record import RoutingRecord
from validate.routing.router_inputs import RouterInputs

__all__ = ["Backend", "ChooseToken", "ChunkOutput", "RoutingRecord", "RuntimeBackend", "RuntimeCrashError", "TextModel"]
__all__ += ["scored_positions"]

ChooseToken = Callable[[npt.NDArray[np.float32]], int | None]
"""Returns the next token from its logits [V], which are valid only during the call; None ends the text."""


class RuntimeCrashError(MoeExportError):
    """The runtime died, never ended, or failed after loading the file; the message says how."""


@dataclass(frozen=True)
class ChunkOutput:
    """One chunk of tokens, run from an empty cache. The logits are valid until the next chunk is asked for."""

    logits_SV: npt.NDArray[np.float32]  # at the scored positions; position i predicts token i + 1
    routing: RoutingRecord | None  # at every position; None for a dense model


class Backend(Protocol):
    """A model loaded in one runtime."""

    @property
    def runtime(self) -> str:
        """The runtime's name: ``torch``, ``llama.cpp`` or ``onnxruntime``."""

    @property
    def version(self) -> str:
        """The runtime's version."""

    def run(self, tokens_BT: npt.NDArray[np.int64]) -> Iterator[ChunkOutput]:
        """Runs every row as a sequence of its own and yields its output, in order."""


class TextModel(Protocol):
    """A model that scores and continues single texts, as tasks need it."""

    def last_logits(self, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        """Yields for each text, from an empty cache, the logits of its last ``count`` positions: [count, V].

        They are valid until the next text is asked for.
        """

    def generate(self, prompt_ids: Sequence[int], n_tokens: int, choose: ChooseToken) -> list[int]:
        """Generates at most ``n_tokens`` tokens until ``choose`` ends the text; an end-of-text token does not."""


class RuntimeBackend(Backend, TextModel, Protocol):
    """A backend that can also generate text with its KV cache."""

    @property
    def vocab_size(self) -> int:
        """The number of logits of one position."""

    @property
    def bos_token(self) -> int | None:
        """The token that the model needs before a text; None if it needs none."""

    def generate_together(
        self, prompts: Sequence[Sequence[int]], n_tokens: int, choose: Sequence[ChooseToken]
    ) -> list[list[int]]:
        """Generates ``n_tokens`` tokens after each prompt with a choice of its own, which ends no text."""

    def route(self, tokens_BT: npt.NDArray[np.int64], inputs: RouterInputs) -> RoutingRecord:
        """Returns the routers' choices when they are given ``inputs``, which were recorded on the same chunks."""


def scored_positions(n_tokens: int) -> slice:
    """Positions whose prediction is scored in a chunk: the second half, as in llama-perplexity.

    Positions n/2 ... n-2 predict tokens n/2+1 ... n-1 (``tools/perplexity/perplexity.cpp`` of llama.cpp): 255
    predictions for 512 tokens.
    """
    return slice(n_tokens // 2, n_tokens - 1)
