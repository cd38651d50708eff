"""One pass of a model over held-out text: its predictions, its distance from a reference, and its routing.

The protocol is llama-perplexity's (``tools/perplexity/perplexity.cpp`` of llama.cpp): chunks of n tokens from an empty
cache, the second half of each scored. One number is kept for each scored position, never logits;
:mod:`validate.metrics.statistics` and :mod:`validate.metrics.bootstrap` turn them into figures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from compressors.model.errors import InputError
from compressors.model.predictions.log_probs import LogProbSink
from compressors.model.predictions.routing_record import RoutingRecord
from validate.metrics.positions import ReferenceLogProbs, Scores
from validate.runtimes import time_limit
from validate.runtimes.backend import Backend, scored_positions

if TYPE_CHECKING:
    import torch

__all__ = ["AgainstReference", "Evaluation", "evaluate"]

_VALUES_AT_ONCE = 1 << 20  # logits that are compared together: 4 MB in float32, a few times over


@dataclass(frozen=True)
class AgainstReference:
    """A model compared with one reference, at the scored positions (N)."""

    kl_divergence_N: npt.NDArray[np.float32]  # KL(reference || this model), nats
    same_top_N: npt.NDArray[np.bool_]  # True if both find the same token most probable
    negative_log_likelihood_N: npt.NDArray[np.float32]  # the reference's own, of the same tokens
    right_N: npt.NDArray[np.bool_]  # True if the reference finds the next token most probable


@dataclass(frozen=True)
class Evaluation:
    """Per-position results at the scored positions (N), and routing at all positions, None for a dense model."""

    n_chunks: int
    negative_log_likelihood_N: npt.NDArray[np.float32]
    against: Mapping[str, AgainstReference]  # by the reference's name
    routing: RoutingRecord | None
    right_N: npt.NDArray[np.bool_]  # True if the model finds the next token most probable

    def beside_itself(self, name: str) -> Evaluation:
        """The same with the model as its own reference of this name: no divergence, the same tokens."""
        of_itself = AgainstReference(
            np.zeros_like(self.negative_log_likelihood_N),
            np.ones_like(self.right_N),
            self.negative_log_likelihood_N,
            self.right_N,
        )
        return replace(self, against={**self.against, name: of_itself})

    def save(self, path: Path) -> None:
        """Writes everything into one safetensors file."""
        tensors: dict[str, npt.NDArray[np.generic]] = {
            "n_chunks": np.array(self.n_chunks),
            "negative_log_likelihood": self.negative_log_likelihood_N,
            "right": self.right_N,
        }
        if self.routing is not None:
            tensors["routing.experts"] = self.routing.experts_LTK
            tensors["routing.weights"] = self.routing.weights_LTK
            if self.routing.margins_LT is not None:
                tensors["routing.margins"] = self.routing.margins_LT
        for reference, values in self.against.items():
            tensors |= {f"against.{reference}.{name}": array for name, array in vars(values).items()}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """The inverse of :meth:`save`.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"the measurements in {path} cannot be read ({error})") from None
        against: dict[str, dict[str, npt.NDArray[Any]]] = defaultdict(dict)
        for key, array in tensors.items():
            if key.startswith("against."):
                _, reference, name = key.split(".")
                against[reference][name] = array
        return cls(
            int(tensors["n_chunks"]),
            tensors["negative_log_likelihood"],
            {reference: AgainstReference(**arrays) for reference, arrays in against.items()},
            RoutingRecord(tensors["routing.experts"], tensors["routing.weights"], tensors.get("routing.margins"))
            if "routing.experts" in tensors
            else None,
            tensors["right"],
        )


def evaluate(
    backend: Backend,
    tokens_BT: npt.NDArray[np.int64],
    references: Mapping[str, ReferenceLogProbs],
    *,
    record: LogProbSink | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Runs all chunks through a backend.

    Args:
        backend: the loaded model.
        tokens_BT: held-out chunks.
        references: log-probabilities at the same scored positions, chunk after chunk, by name.
        record: also takes this model's own log-probabilities, so that it can be a reference.
        progress: called with 1 after each chunk.

    Raises:
        InputError: a reference has another vocabulary than the model.
    """
    import torch

    from compressors.model.running.memory import give_back_freed

    time_limit.tell("running it")
    scored = scored_positions(tokens_BT.shape[1])
    collected = _Collected(references, len(tokens_BT) * (scored.stop - scored.start))
    routing: list[RoutingRecord] = []
    for chunk, output in zip(tokens_BT, backend.run(tokens_BT), strict=True):
        targets = torch.from_numpy(chunk[scored.start + 1 : scored.stop + 1])
        # a few positions at a time: the runtime's own memory should be most of this process's
        for rows in _slices(len(targets), max(1, _VALUES_AT_ONCE // output.logits_SV.shape[1])):
            logits = torch.from_numpy(output.logits_SV[rows])
            if record is not None:
                record.write(collected.n_scored, logits)
            collected.add(logits, targets[rows])
        if output.routing is not None:
            routing.append(output.routing)
        give_back_freed()  # aligned blocks often find no room in freed ones, so the peak would grow with each chunk
        if progress is not None:
            progress(1)
    return Evaluation(
        len(tokens_BT),
        collected.likelihood_N,
        collected.against,
        RoutingRecord.concatenate(routing) if routing else None,
        collected.right_N,
    )


class _Collected:
    """Scores of the positions so far, in arrays for all positions.

    Many small arrays that stay, allocated between large ones that are freed, would fragment the memory.
    """

    def __init__(self, references: Mapping[str, ReferenceLogProbs], n_positions: int) -> None:
        self.n_scored = 0
        self._references = references
        self.likelihood_N = np.empty(n_positions, np.float32)
        self.right_N = np.empty(n_positions, np.bool_)
        self.against = {
            name: AgainstReference(
                np.empty(n_positions, np.float32),
                np.empty(n_positions, np.bool_),
                np.empty(n_positions, np.float32),
                np.empty(n_positions, np.bool_),
            )
            for name in references
        }

    def add(self, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> None:
        """Adds the next positions."""
        place = slice(self.n_scored, self.n_scored + len(logits_NV))
        scores = Scores(logits_NV, targets_N)
        self.likelihood_N[place] = scores.negative_log_likelihood()
        self.right_N[place] = scores.right()
        for name, reference in self._references.items():
            reference_NV = reference.decoded(place.start, place.stop)
            if reference_NV.shape != logits_NV.shape:
                raise InputError(
                    f"the reference has a vocabulary of {reference_NV.shape[1]:,} and the model one of "
                    f"{logits_NV.shape[1]:,}: they cannot be compared"
                )
            against = self.against[name]
            against.kl_divergence_N[place] = scores.kl_divergence(reference_NV)
            against.same_top_N[place] = scores.same_top(reference_NV)
            against.negative_log_likelihood_N[place] = scores.reference_likelihood(reference_NV)
            against.right_N[place] = scores.reference_right(reference_NV)
        self.n_scored = place.stop


def _slices(n_items: int, at_once: int) -> Iterator[slice]:
    for start in range(0, n_items, at_once):
        yield slice(start, min(start + at_once, n_items))
