"""Tests a runtime's routers on equal inputs: is a router itself wrong, or only its input?

In a free run an error anywhere in a layer moves the hidden states, and with them the choices of all later routers. Here
every router gets the hidden states of the student in torch, and its choices are compared with the student's: a
difference now comes from the router's weights, the runtime's arithmetic, or its top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from compressors.model.description.spec import ModelSpec
from compressors.model.files.array_file import ArrayFile
from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.running.routers import RoutedCall, watching
from validate.routing.agreement import RoutingAgreement, routing_agreement, same_sets
from validate.routing.router_inputs import RouterInputs
from validate.routing.ties import Ties, find_ties

__all__ = ["RouterAlone", "RouterInputRecorder", "router_alone"]


class RouterInputRecorder:
    """Give :meth:`observe` to a ``TokenGroup`` of all chunks, and :meth:`finish` their routing when it has run.

    A layer's states go to disk as they come; nothing of them stays in memory.

    Args:
        folder: the folder for the files, which is created.
        spec: the model.
        chunks: the indices of the chunks that are kept, ascending.
        chunk_tokens: tokens of each chunk.
    """

    def __init__(self, folder: Path, spec: ModelSpec, chunks: npt.NDArray[np.int64], chunk_tokens: int) -> None:
        folder.mkdir(parents=True)
        self._files = RouterInputs(folder)
        self._spec = spec
        self._tokens = (chunks[:, None] * chunk_tokens + np.arange(chunk_tokens)).reshape(-1)  # indices of kept tokens
        kept = ArrayFile.create(self._files.chunks_path, chunks.shape, np.int64)
        kept.write(0, chunks)

    @contextmanager
    def observe(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Watches one layer's router while it runs."""
        routed = self._spec.layers[index].routed
        if routed is None:
            yield
            return
        size = (len(self._tokens), self._spec.hidden_size)
        states = ArrayFile.create(self._files.states_path(index), size, np.float32)
        n_seen = 0

        def see(call: RoutedCall) -> None:
            nonlocal n_seen
            states_TD = call.router_input_TD
            first, last = np.searchsorted(self._tokens, [n_seen, n_seen + len(states_TD)])
            wanted = torch.from_numpy(self._tokens[first:last] - n_seen)
            states.write(int(first), states_TD[wanted.to(states_TD.device)].float().cpu().numpy())
            n_seen += len(states_TD)

        with watching(layer, routed, see):
            yield

    def finish(self, routing: RoutingRecord) -> None:
        """Keeps the model's own routing of the kept chunks; ``routing`` is that of all chunks."""
        routing.tokens(self._tokens).save(self._files.routing_path)


@dataclass(frozen=True)
class RouterAlone:
    """A runtime's routers compared with torch's on equal inputs."""

    n_chunks: int
    agreement: RoutingAgreement
    margin_error: float
    """The largest difference between both margins of a token with the same experts: the noise of the runtime's
    arithmetic, in router logits. A choice with a smaller margin may fall either way."""
    ties: Ties | None

    def figures(self) -> dict[str, Any]:
        """The figures as plain data for JSON: those of a routing agreement, and those about equal inputs."""
        ties = None if self.ties is None else asdict(self.ties)
        own = {"chunks": self.n_chunks, "margin_error": self.margin_error, "ties": ties}
        return self.agreement.figures() | own


def router_alone(inputs: RouterInputs, found: RoutingRecord) -> RouterAlone:
    """Compares the choices of a runtime's routers with those that torch made from the same states.

    Args:
        inputs: the inputs of both.
        found: the choices of the runtime's routers.
    """
    reference, n_chunks = inputs.routing(), len(inputs.chunks())
    assert reference.margins_LT is not None and found.margins_LT is not None, "both sides record margins"
    comparable_LT = same_sets(reference, found) & np.isfinite(reference.margins_LT)
    errors = np.abs(found.margins_LT[comparable_LT] - reference.margins_LT[comparable_LT])
    return RouterAlone(
        n_chunks,
        routing_agreement(reference, found, n_chunks=n_chunks),
        float(errors.max(initial=0.0)),
        find_ties(reference, found),
    )
