"""The structures of a student that a search looks at: all experts, narrower ones, fewer, fewer layers, and two at once.

Bits go first: down to the floor of the format, about 14 % of the size in 16 bits, a file of all experts beats every
smaller structure. So structures are few, and the search looks at them where bits do not reach (docs/quantization.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compressors.model.shape import MoeShape
from exporter.compression import fewest_experts
from exporter.recipe import CompressChoice

__all__ = ["candidate_structures", "whole"]

_METHOD = "reap"
_SHARES = (0.75, 0.5, 0.25)  # of the experts, or of their width
_WIDTH_MULTIPLE = 64  # narrower rows have no type below 4 bits that every llama.cpp of 2026 reads
_LEAST_LAYERS = 8  # of which one in eight may go


def whole(shape: MoeShape) -> CompressChoice:
    """The model as it is."""
    return CompressChoice(experts=shape.n_experts)


def candidate_structures(shape: MoeShape) -> Sequence[CompressChoice]:
    """The structures below the whole model, from the one that loses least to the one that loses most."""
    found = [*_narrower(shape), *_fewer(shape), *_shorter(shape), *_both(shape)]
    return sorted(found, key=lambda choice: -_share_left(choice, shape))


def _narrower(shape: MoeShape) -> Iterator[CompressChoice]:
    for width in _parts(shape.expert_width, _WIDTH_MULTIPLE):
        yield CompressChoice(experts=shape.n_experts, width=width)


def _fewer(shape: MoeShape) -> Iterator[CompressChoice]:
    for n_experts in _parts(shape.n_experts, 1):
        if n_experts >= fewest_experts(_METHOD, shape):
            yield CompressChoice(experts=n_experts, method=_METHOD)


def _shorter(shape: MoeShape) -> Iterator[CompressChoice]:
    if shape.n_layers >= _LEAST_LAYERS:
        yield CompressChoice(experts=shape.n_experts, drop_blocks=shape.n_layers // _LEAST_LAYERS)


def _both(shape: MoeShape) -> Iterator[CompressChoice]:
    """Half the width of half or three quarters of the experts: for files that nothing else is small enough for."""
    for narrow in _narrower(shape):
        if narrow.width is not None and narrow.width * 2 <= shape.expert_width:  # type: ignore[operator]
            for fewer in _fewer(shape):
                yield narrow.model_copy(update={"experts": fewer.experts, "method": fewer.method})


def _parts(total: int, multiple: int) -> Iterator[int]:
    """Shares of a number that are whole multiples, without repetition."""
    yield from dict.fromkeys(
        part for share in _SHARES if 0 < (part := int(total * share) // multiple * multiple) < total
    )


def _share_left(choice: CompressChoice, shape: MoeShape) -> float:
    """The share of the experts' weights that is left."""
    assert isinstance(choice.experts, int) and not isinstance(choice.width, tuple), "they are made here"
    layers = 1 - choice.drop_blocks / shape.n_layers
    return layers * choice.experts / shape.n_experts * (choice.width or shape.expert_width) / shape.expert_width
