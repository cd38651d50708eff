"""The structures that a search considers: all experts, narrower ones, fewer, replaced ones, fewer layers, two at once.

Bits go first: down to the floor of the format, about 14 % of the size in 16 bits, a file of all experts beats every
smaller structure. So structures are few, and the search considers them where fewer bits are not enough
(docs/quantization.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.shrink.dense import check_dense
from compressors.shrink.registry import LIGHT_MOE, METHODS, expert_counts
from compressors.shrink.replace import replacement_for
from exporter.planning.plan import Search
from exporter.planning.recipe import CompressChoice
from exporter.planning.resulting_spec import layers_with_experts

__all__ = ["MOST_STRUCTURES", "expected_loss", "replacements", "replacing", "structures_for", "whole", "with_experts"]

MOST_STRUCTURES = 2
"""The most structures smaller than the original that are built for an artifact."""

_METHOD = "reap"
_EIGHTHS = range(7, 0, -1)  # eighths of the experts, or of their width, that may be left
_WIDTH_MULTIPLE = 64  # narrower rows have no type below 4 bits that every llama.cpp of 2026 reads
_LOSS_OF_HALF_REPLACED = 0.3  # nats after training
_SEARCHED_STEP = 1 / 8  # of shares of the experts that replacing removes
_LEAST_LAYERS = 8  # the fewest layers of which one in eight may go


def whole(spec: ModelSpec) -> CompressChoice:
    """The model as it is."""
    return CompressChoice(experts=spec.n_experts)


def structures_for(search: Search, spec: ModelSpec) -> Sequence[CompressChoice]:
    """The structures that a search may choose from, the original first if it may be chosen."""
    if search.student == "dense":
        check_dense(spec)
        return [whole(spec).model_copy(update={"student": "dense"})]
    if search.experts is not None:
        return [with_experts(search.method, search.experts, spec)]
    if search.removed_share is not None:
        return [replacing(search.removed_share, spec, apart=not search.materialize)]
    if search.method == LIGHT_MOE.name:
        return list(replacements(spec, _SEARCHED_STEP, apart=not search.materialize))
    smaller = candidates_of(search.method, spec)
    return [whole(spec), *sorted(smaller, key=lambda choice: expected_loss(choice, spec))]


def candidates_of(method: str, spec: ModelSpec) -> Iterator[CompressChoice]:
    """The structures below the original that a method leads to; ``auto`` stands for all that are known to be good."""
    n_layers = len(layers_with_experts(spec))
    if method == "auto":
        yield from (
            *_narrower(spec),
            *_fewer(_METHOD, spec),
            *_shorter(spec),
            *_both(spec),
            *_replaced(spec),
        )
    elif method == "slim":
        yield from _narrower(spec)
    elif method == "block-drop":
        yield from (CompressChoice(experts=spec.n_experts, drop_blocks=n) for n in range(1, n_layers))
    elif method == "layer-drop":
        yield from (CompressChoice(experts=spec.n_experts, drop_moe_layers=n) for n in range(1, n_layers))
    else:
        yield from _fewer(method, spec)


def with_experts(method: str, n_experts: int, spec: ModelSpec) -> CompressChoice:
    """The structure with ``n_experts`` experts, by a method; ``auto`` takes REAP."""
    if n_experts == spec.n_experts:
        return whole(spec)
    chosen = _METHOD if method == "auto" else method
    return CompressChoice(experts=n_experts, method=chosen, sequential=METHODS[chosen].is_sequential)


def replacing(share: float, spec: ModelSpec, *, apart: bool = True) -> CompressChoice:
    """The structure in which replaced experts remove a share of all experts' values.

    Raises:
        InputError: not so much can be removed.
    """
    numbers = replacement_for(share, spec)
    return CompressChoice(
        experts=spec.n_experts,
        edit=LIGHT_MOE.name,
        edit_size=numbers.rank,
        replaced=numbers.n_replaced,
        bases=numbers.n_bases,
        apart=apart,
    )


def replacements(spec: ModelSpec, step: float, *, apart: bool = True) -> Iterator[CompressChoice]:
    """Replaced experts for shares of all experts that rise by a step, as far as bases and adapters leave any to remove.

    Raises:
        InputError: not even the first share can be removed.
    """
    yield replacing(step, spec, apart=apart)
    for number in range(2, math.ceil(1 / step)):
        try:
            yield replacing(number * step, spec, apart=apart)
        except InputError:
            return


def _replaced(spec: ModelSpec) -> Iterator[CompressChoice]:
    """Replaced experts for two shares of all, where bases and adapters leave so much to remove."""
    for share in (0.25, 0.5):
        try:
            yield replacing(share, spec)
        except InputError:
            return


def expected_loss(choice: CompressChoice, spec: ModelSpec) -> float:
    """The divergence, nats, that a structure is expected to have after training, before its weights are quantized.

    It is a guess from two trained models (docs/quantization.md): half of the width 0.075, half of the experts 0.3, a
    layer in eight 0.15, and losses add up; the search measures instead.
    """
    narrower = _taken(spec.expert_width, choice.width)
    fewer = _taken(spec.n_experts, choice.experts)
    shorter = _taken(spec.n_layers, spec.n_layers - choice.drop_blocks - choice.drop_moe_layers)
    replaced = _replaced_share(choice, spec) / (1 - _replaced_share(choice, spec))
    lost = 0.075 * narrower * narrower + 0.3 * fewer * math.sqrt(fewer) + 1.2 * shorter
    return lost + _LOSS_OF_HALF_REPLACED * replaced


def _replaced_share(choice: CompressChoice, spec: ModelSpec) -> float:
    """The share of the experts' values that replaced ones leave out, whether or not a file saves them."""
    return (choice.n_replaced - choice.n_bases) / sum(layer.n_experts for layer in spec.layers)


def _taken(total: int, left: int | tuple[int, ...] | None) -> float:
    """The ratio of the part taken away to the part left, with the mean over layers where they differ."""
    mean: float = total if left is None else sum(left) / len(left) if isinstance(left, tuple) else left
    return total / max(mean, 1) - 1


def _narrower(spec: ModelSpec) -> Iterator[CompressChoice]:
    for width in _parts(spec.expert_width, _WIDTH_MULTIPLE):
        yield CompressChoice(experts=spec.n_experts, width=width)


def _fewer(method: str, spec: ModelSpec) -> Iterator[CompressChoice]:
    possible = expert_counts(_METHOD if method == "auto" else method, spec)
    fewest = min(possible)
    counts = [n_experts for n_experts in _parts(spec.n_experts, -possible.step) if n_experts > fewest]
    for n_experts in [*counts, *([fewest] if fewest < spec.n_experts else [])]:
        yield with_experts(method, n_experts, spec)


def _shorter(spec: ModelSpec) -> Iterator[CompressChoice]:
    if spec.n_layers >= _LEAST_LAYERS:
        yield CompressChoice(experts=spec.n_experts, drop_blocks=spec.n_layers // _LEAST_LAYERS)


def _both(spec: ModelSpec) -> Iterator[CompressChoice]:
    """Fewer experts of half the width or less, for the smallest files."""
    for width in _parts(spec.expert_width, _WIDTH_MULTIPLE):
        if 2 * width <= spec.expert_width:
            for fewer in _fewer(_METHOD, spec):
                yield fewer.model_copy(update={"width": width})


def _parts(total: int, multiple: int) -> Iterator[int]:
    """Shares of a number that are whole multiples, without repetition."""
    shares = (total * eighths // 8 // multiple * multiple for eighths in _EIGHTHS)
    yield from dict.fromkeys(part for part in shares if 0 < part < total)
