"""Numbers of replaced experts and of their bases: those that remove a share of the experts, and their distribution."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import Kind
from compressors.model.errors import InputError

__all__ = [
    "FEWEST_ON_A_BASE",
    "Replacement",
    "adapter_values",
    "bases_by_layer",
    "default_rank",
    "placed",
    "replacement_for",
    "spread",
]

FEWEST_ON_A_BASE = 2
"""An expert that has a base for itself is better kept."""

_PUBLISHED_RANK = 16  # LightMoE's (arXiv 2603.12645)
_RANK_DIVISOR = 16
"""Adapters of rank 16 are a hundredth of a large expert and a fifth of a toy's, which get a rank of a sixteenth of
their narrower side: a sixteenth to an eighth of each matrix."""

_EXPERTS_ON_A_BASE = 16
"""Before any training, divergence from the trained models, where 30 % and 50 % go: with four on a base 0.054 and 0.152
(fine), 0.057 and 0.159 (coarse); with eight 0.047 and 0.129, 0.057 and 0.161; with sixteen 0.046 and 0.127, and as with
eight. Of fewer bases fewer experts have to go."""


@dataclass(frozen=True)
class Replacement:
    """The numbers of a replacement, in all layers together."""

    n_replaced: int
    n_bases: int
    rank: int


def default_rank(spec: ModelSpec) -> int:
    """The rank of adapters for a model: the published 16, less for narrow experts."""
    return max(1, min(_PUBLISHED_RANK, min(spec.hidden_size, spec.expert_width) // _RANK_DIVISOR))


def replacement_for(share: float, spec: ModelSpec, rank: int | None = None) -> Replacement:
    """The fewest replaced experts that remove a share of the experts' matrices: values, in all layers.

    There is a base for each sixteen of them, and at least one for each layer.

    Args:
        share: the part of the values that goes, above 0.
        spec: the model.
        rank: the adapters' rank; None: :func:`default_rank`.

    Raises:
        InputError: not so much can be removed; the message names the most.
    """
    rank = default_rank(spec) if rank is None else rank
    layers = [layer for layer in spec.layers if layer.routed is not None]
    n_experts, whole = sum(layer.n_experts for layer in layers), _values(layers[0])
    kept_of_each = adapter_values(layers[0], rank) / whole
    removed = 0.0
    for n_replaced in range(FEWEST_ON_A_BASE * len(layers), n_experts + 1):
        n_bases = max(len(layers), n_replaced // _EXPERTS_ON_A_BASE)
        removed = (n_replaced * (1 - kept_of_each) - n_bases) / n_experts
        if removed >= share:
            return Replacement(n_replaced, n_bases, rank)
    raise InputError(
        f"{share:.0%} of the experts cannot be removed by replacing them: adapters of rank {rank} and a base for each "
        f"{_EXPERTS_ON_A_BASE} leave at most {math.floor(removed * 100)} % to remove"
    )


def bases_by_layer(counts: Sequence[int], n_bases: int) -> list[int]:
    """The number of bases of each layer, in proportion to its replaced experts; at least two stand on each.

    Args:
        counts: the replaced experts of each layer: none, or at least two.
        n_bases: the bases of all layers together.

    Raises:
        InputError: the bases are fewer than the layers that need one, or more than half of the experts.
    """
    fewest = [min(1, count) for count in counts]
    most = [count // FEWEST_ON_A_BASE for count in counts]
    if not sum(fewest) <= n_bases <= sum(most):
        raise InputError(
            f"{n_bases} bases cannot stand under {sum(counts)} experts in {sum(fewest)} layers: give a number from "
            f"{sum(fewest)} to {sum(most)}"
        )
    bases = list(fewest)
    fullest = [(-counts[layer] / bases[layer], layer) for layer in range(len(counts)) if bases[layer] < most[layer]]
    heapq.heapify(fullest)
    for _ in range(n_bases - sum(fewest)):
        _, layer = heapq.heappop(fullest)
        bases[layer] += 1
        if bases[layer] < most[layer]:
            heapq.heappush(fullest, (-counts[layer] / bases[layer], layer))
    return bases


def spread(numbers: Replacement, n_experts: Sequence[int]) -> list[SharedBases | None]:
    """Distributes replaced experts evenly over layers: a description for sizes, before statistics have decided.

    Args:
        numbers: of all layers together.
        n_experts: the experts of each layer.

    Raises:
        InputError: the numbers are not possible.
    """
    total, n_layers = numbers.n_replaced, min(len(n_experts), numbers.n_replaced // FEWEST_ON_A_BASE, numbers.n_bases)
    if not FEWEST_ON_A_BASE <= total <= sum(n_experts):
        raise InputError(
            f"{total} of {sum(n_experts)} experts cannot be replaced: give a number from {FEWEST_ON_A_BASE} to "
            f"{sum(n_experts)}"
        )
    if total > sum(n_experts[:n_layers]):
        n_layers = len(n_experts)
    counts = [total // n_layers + (layer < total % n_layers) for layer in range(n_layers)]
    bases = bases_by_layer(counts, numbers.n_bases)
    found: list[SharedBases | None] = [
        SharedBases(_places(layer, count, n, of_layer), n, numbers.rank)
        for layer, (count, n, of_layer) in enumerate(zip(counts, bases, n_experts, strict=False))
    ]
    return found + [None] * (len(n_experts) - n_layers)


def placed(
    counts: Sequence[int], bases: Sequence[int], rank: int, n_experts: Sequence[int]
) -> list[SharedBases | None]:
    """A description of layers that replace these numbers of experts: for sizes, before statistics have decided which.

    Args:
        counts: the replaced experts of each layer.
        bases: the bases of each layer.
        rank: the adapters' rank.
        n_experts: the experts of each layer.

    Raises:
        InputError: there is not a number for each layer, or a base would have fewer than two experts.
    """
    if not len(counts) == len(bases) == len(n_experts):
        raise InputError(f"{len(counts)} and {len(bases)} numbers for {len(n_experts)} layers; give one for each")
    found: list[SharedBases | None] = []
    for layer, (count, n_bases, of_layer) in enumerate(zip(counts, bases, n_experts, strict=True)):
        if not (count == n_bases == 0 or FEWEST_ON_A_BASE <= FEWEST_ON_A_BASE * n_bases <= count <= of_layer):
            raise InputError(
                f"{count} of {of_layer} experts of a layer cannot stand on {n_bases} bases: give at least "
                f"{FEWEST_ON_A_BASE} experts for each base, or none and no base"
            )
        found.append(SharedBases(_places(layer, count, n_bases, of_layer), n_bases, rank) if count else None)
    return found


def _places(layer: int, n_replaced: int, n_bases: int, n_experts: int) -> tuple[int | None, ...]:
    """A base for each replaced expert, in any order. No two layers are alike, as in a student: a graph stores each."""
    base_of = [*(place % n_bases for place in range(n_replaced)), *[None] * (n_experts - n_replaced)]
    random.Random(layer).shuffle(base_of)
    return tuple(base_of)


def _values(layer: LayerSpec) -> int:
    """The values of an expert's matrices."""
    return sum(math.prod(shape) for shape in _shapes(layer))


def adapter_values(layer: LayerSpec, rank: int) -> int:
    """The values of an expert's adapters of a rank."""
    return sum(rank * sum(shape) for shape in _shapes(layer))


def _shapes(layer: LayerSpec) -> list[tuple[int, ...]]:
    return [layer.dimensions(tensor) for tensor in layer.expert_tensors if tensor.kind is Kind.MATRIX]
