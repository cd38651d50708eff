"""One pass of a model over held-out text: what it predicts, how far it is from a reference, where it routes.

Perplexity follows llama-perplexity (``tools/perplexity/perplexity.cpp`` of llama.cpp): chunks of n tokens from an empty
cache, the second half of each scored, exp of the mean negative log-likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from compressors.model.errors import InputError
from compressors.model.log_probs import LogProbReader, LogProbWriter
from compressors.model.losses import kl_divergence, negative_log_likelihood
from compressors.model.routing import Routing
from validate.backend import Backend, scored_positions

__all__ = ["Divergence", "Evaluation", "divergence", "evaluate", "perplexity"]

_VALUES_AT_ONCE = 1 << 20  # logits that are compared together: 4 MB in float32, a few times over


@dataclass(frozen=True)
class Evaluation:
    """Per-position results at the scored positions (N), and routing at all positions: None of a dense model."""

    negative_log_likelihood_N: npt.NDArray[np.float32]
    kl_divergence_N: Mapping[str, npt.NDArray[np.float32]]  # by reference: KL(reference || this model), nats
    same_top_N: Mapping[str, npt.NDArray[np.bool_]]  # by reference: do both find the same token most probable?
    routing: Routing | None

    def save(self, path: Path) -> None:
        """Writes everything into one safetensors file."""
        tensors: dict[str, npt.NDArray[np.generic]] = {
            "negative_log_likelihood": self.negative_log_likelihood_N,
        }
        if self.routing is not None:
            tensors["routing.experts"] = self.routing.experts_LTK
            tensors["routing.weights"] = self.routing.weights_LTK
        for reference, values in self.kl_divergence_N.items():
            tensors[f"kl_divergence.{reference}"] = values
            tensors[f"same_top.{reference}"] = self.same_top_N[reference]
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
        references = [name.removeprefix("kl_divergence.") for name in tensors if name.startswith("kl_divergence.")]
        return cls(
            tensors["negative_log_likelihood"],
            {reference: tensors[f"kl_divergence.{reference}"] for reference in references},
            {reference: tensors[f"same_top.{reference}"] for reference in references},
            Routing(tensors["routing.experts"], tensors["routing.weights"]) if "routing.experts" in tensors else None,
        )


def evaluate(
    backend: Backend,
    tokens_BT: npt.NDArray[np.int64],
    references: Mapping[str, LogProbReader],
    *,
    record: LogProbWriter | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Runs all chunks through a backend.

    Args:
        backend: the loaded model.
        tokens_BT: held-out chunks.
        references: log-probabilities at the same scored positions, chunk after chunk, by name.
        record: also writes this model's own log-probabilities, so that it can be a reference.
        progress: called with 1 after each chunk.
    """
    scored = scored_positions(tokens_BT.shape[1])
    likelihoods: list[torch.Tensor] = []
    divergences: dict[str, list[torch.Tensor]] = {name: [] for name in references}
    same_top: dict[str, list[torch.Tensor]] = {name: [] for name in references}
    routing: list[Routing] = []
    n_scored = 0
    for chunk, output in zip(tokens_BT, backend.run(tokens_BT), strict=True):
        targets = torch.from_numpy(chunk[scored.start + 1 : scored.stop + 1])
        # a few positions at a time: the runtime's own memory should be most of this process's
        for rows in _slices(len(targets), max(1, _VALUES_AT_ONCE // output.logits_SV.shape[1])):
            logits = torch.from_numpy(output.logits_SV[rows])
            likelihoods.append(negative_log_likelihood(logits, targets[rows]))
            for name, reader in references.items():
                reference = reader.rows(n_scored, n_scored + len(logits))
                divergences[name].append(kl_divergence(reference, logits))
                same_top[name].append(reference.argmax(-1) == logits.argmax(-1))
            if record is not None:
                record.write(n_scored, logits)
            n_scored += len(logits)
        if output.routing is not None:
            routing.append(output.routing)
        if progress is not None:
            progress(1)
    return Evaluation(
        torch.cat(likelihoods).numpy(),
        {name: torch.cat(parts).numpy() for name, parts in divergences.items()},
        {name: torch.cat(parts).numpy() for name, parts in same_top.items()},
        Routing.concatenate(routing) if routing else None,
    )


def _slices(n_items: int, at_once: int) -> Iterator[slice]:
    for start in range(0, n_items, at_once):
        yield slice(start, min(start + at_once, n_items))


def perplexity(negative_log_likelihood_N: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Perplexity and its standard error, as llama-perplexity prints them."""
    values = negative_log_likelihood_N.astype(np.float64)
    mean = float(values.mean())
    error = float(np.sqrt(values.var() / max(1, len(values) - 1)))
    return float(np.exp(mean)), error * float(np.exp(mean))


@dataclass(frozen=True)
class Divergence:
    """KL divergence from a reference over the scored positions, in nats."""

    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float


def divergence(kl_divergence_N: npt.NDArray[np.float32]) -> Divergence:
    """Summarises per-position divergences."""
    values = kl_divergence_N.astype(np.float64)
    p50, p90, p95, p99, p999 = np.percentile(values, [50, 90, 95, 99, 99.9]).tolist()
    return Divergence(float(values.mean()), p50, p90, p95, p99, p999, float(values.max()))
