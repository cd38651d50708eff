"""The reference: stock transformers arithmetic in float32, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.predictions.head_inputs import HeadInputs
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.recorder import RoutingRecorder
from compressors.model.running.streaming import LayerObserver, StreamedModel, TokenGroup
from compressors.model.sources.student import Student
from validate.runtimes.backend import ChooseToken, ChunkOutput, scored_positions

__all__ = ["TorchBackend"]


class TorchBackend:
    """A student in torch; implements :class:`validate.runtimes.backend.Backend`.

    A dense student's one expert is always chosen, so it has no routing. With ``kept``, which has room for them, the
    predictions at the scored positions of all chunks are kept too.
    """

    runtime = "torch"

    def __init__(
        self,
        student: Student,
        progress: Callable[[int], None] | None = None,
        limit: MemoryLimit | None = None,
        observers: Sequence[LayerObserver] = (),
        kept: HeadInputs | None = None,
    ) -> None:
        self._student = student
        self._progress = progress
        self._limit = limit
        self._observers = observers
        self._kept = kept

    @property
    def version(self) -> str:
        """torch's version."""
        return torch.__version__

    @torch.no_grad()
    def run(self, tokens_BT: npt.NDArray[np.int64]) -> Iterator[ChunkOutput]:
        """Streams all chunks through the layers, then yields them one by one."""
        model = StreamedModel(self._student, limit=self._limit)
        recorder = RoutingRecorder(self._student.spec)
        is_dense = not self._student.spec.written.n_experts
        group = TokenGroup(torch.from_numpy(tokens_BT), [*self._observers, *([] if is_dense else [recorder.observe])])
        (states,) = model.stream([group], self._progress)
        routing = None if is_dense else recorder.routing()
        n_tokens = tokens_BT.shape[1]
        scored = scored_positions(n_tokens)
        with model.head(torch.float32) as head:
            for chunk in range(len(states)):
                tokens = slice(chunk * n_tokens, (chunk + 1) * n_tokens)
                (hidden_TD,) = states.read(slice(chunk, chunk + 1))
                if self._kept is not None:
                    start = chunk * (scored.stop - scored.start)
                    self._kept.write(start, model.head_inputs(hidden_TD[scored]))
                yield ChunkOutput(
                    logits_SV=head(hidden_TD[scored]).numpy(),
                    routing=None if routing is None else routing.tokens(tokens),
                )

    @torch.no_grad()
    def last_logits(self, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        """Yields for each text the logits of its last ``count`` positions: [count, V].

        All texts go through the layers together; the padding of shorter ones comes after them, where it has no effect.
        """
        n_longest = max(map(len, texts))
        padded_BT = torch.tensor([[*text, *[0] * (n_longest - len(text))] for text in texts])
        model = StreamedModel(self._student, limit=self._limit)
        (states,) = model.stream([TokenGroup(padded_BT)], self._progress)
        with model.head(torch.float32) as head:
            for index, (text, count) in enumerate(zip(texts, counts, strict=True)):
                (hidden_TD,) = states.read(slice(index, index + 1))
                yield head(hidden_TD[len(text) - count : len(text)]).numpy()

    def generate(self, prompt_ids: Sequence[int], n_tokens: int, choose: ChooseToken) -> list[int]:
        """Generates at most ``n_tokens`` tokens after the prompt; each one runs the whole text through the layers."""
        tokens: list[int] = []
        while len(tokens) < n_tokens:
            (logits_1V,) = self.last_logits([[*prompt_ids, *tokens]], [1])
            token = choose(logits_1V[0])
            if token is None:
                break
            tokens.append(token)
        return tokens
