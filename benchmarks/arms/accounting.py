"""Counts the cost of decomposed experts in each container: parameters, bytes, multiply-adds; exactly.

GGUF: dense experts. llama.cpp reads low-rank experts only as an adapter on top of dense ones, and a base cannot be
shared between the experts of one tensor. Factors save nothing there; only quantization does.

ONNX: the MoE and QMoE operators read dense experts too. A graph of primitive operators (Gather of the chosen experts'
factors, MatMul) can hold factors, in float32, or in float16 with a Cast; it gives up QMoE's 4-bit experts. So factors
are worth keeping only where they take fewer bytes than the dense experts at *their* number of bits. How fast such a
graph runs was not measured; the multiply-adds here are all that is claimed.

Letters: E experts, K of them per token, D hidden size, F expert width, r rank, M bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import ceil, floor

from compressors.model.errors import InputError
from compressors.shrink.moe_block import MoeBlock

__all__ = [
    "Container",
    "ExpertShape",
    "FactorSize",
    "d2_moe_size",
    "mobe_size",
    "rank_for_share",
    "rank_that_saves",
    "saved_bytes",
    "svd_size",
]


class Container(Enum):
    """A file format that an export writes."""

    GGUF = "gguf"
    ONNX = "onnx"


@dataclass(frozen=True)
class ExpertShape:
    """The sizes of one layer's experts."""

    n_experts: int
    hidden_size: int
    width: int
    top_k: int

    @classmethod
    def of(cls, block: MoeBlock) -> ExpertShape:
        """The sizes of a block."""
        return cls(block.n_experts, block.router_ED.shape[1], block.width, block.top_k)

    @property
    def full_rank(self) -> int:
        """The largest rank of an expert's matrices."""
        return min(self.hidden_size, self.width)

    @property
    def parameters(self) -> int:
        """Dense parameters of the layer's experts: 3 E D F."""
        return self.n_experts * self.expert_parameters

    @property
    def expert_parameters(self) -> int:
        """Dense parameters of one expert: 3 D F."""
        return 3 * self.hidden_size * self.width

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of dense experts for one token: 3 K D F."""
        return self.top_k * self.expert_parameters


@dataclass(frozen=True)
class FactorSize:
    """Costs of one layer's factored experts, each a number that is always there plus one for each unit of size.

    The size is the rank for SVD and D2-MoE, the number of bases for MoBE.
    """

    fixed_parameters: int
    parameters_per_unit: int
    fixed_multiply_adds: int
    multiply_adds_per_unit: int
    largest: int  # size beyond which there is nothing more to gain

    def parameters(self, size: int) -> int:
        """Numbers that have to be stored for the layer."""
        return self.fixed_parameters + size * self.parameters_per_unit

    def multiply_adds(self, size: int) -> int:
        """Multiply-adds for one token with the factors applied one after the other."""
        return self.fixed_multiply_adds + size * self.multiply_adds_per_unit

    def largest_within(self, parameters: int) -> int:
        """The largest size with no more parameters than that; 0 if there is none."""
        return max(0, min(self.largest, (parameters - self.fixed_parameters) // self.parameters_per_unit))


def svd_size(shape: ExpertShape) -> FactorSize:
    """:class:`~compressors.shrink.decompose.ActivationSvd`: three products of rank r per expert, 3 E r (D + F)."""
    per_expert = 3 * (shape.hidden_size + shape.width)
    return FactorSize(0, shape.n_experts * per_expert, 0, shape.top_k * per_expert, shape.full_rank)


def d2_moe_size(shape: ExpertShape) -> FactorSize:
    """:class:`~compressors.shrink.decompose.D2Moe`: one dense base and three products of rank r per expert.

    A token goes through the base once, not K times: its gate and up have the same input for all chosen experts, and
    its down is linear, so that the chosen experts' gated activations can be added up first.
    """
    low_rank = svd_size(shape)
    return FactorSize(
        shape.expert_parameters,
        low_rank.parameters_per_unit,
        shape.expert_parameters,
        low_rank.multiply_adds_per_unit,
        shape.full_rank,
    )


def mobe_size(shape: ExpertShape, rank: int | None = None) -> FactorSize:
    """:class:`~compressors.shrink.decompose.Mobe`: 2 (E F r + M r D + E M) for gate and up, E D F for down.

    The activation stands between the mix of bases and the token, so each chosen expert's bases are mixed anew, M r D
    multiply-adds each; a runtime that keeps them mixed instead stores E r D numbers and has no saving from sharing.
    """
    rank = shape.full_rank if rank is None else rank
    mixed = rank * shape.hidden_size
    own = rank * shape.width
    down = shape.hidden_size * shape.width
    return FactorSize(
        shape.n_experts * (2 * own + down),
        2 * (mixed + shape.n_experts),
        shape.top_k * (2 * (own + mixed) + down),
        shape.top_k * 2 * mixed,
        shape.n_experts,
    )


def saved_bytes(
    container: Container,
    shape: ExpertShape,
    factor_parameters: int,
    dense_bits: Fraction = Fraction(32),
    factor_bits: Fraction = Fraction(32),
) -> int:
    """Bytes that a container saves for one layer by holding factors, against dense experts at ``dense_bits`` a weight.

    0 where it has to hold, or does better to hold, the dense experts. Bits include block scales: 9/2 for Q4_0.
    """
    if container is Container.GGUF:
        return 0
    return max(0, _bytes(shape.parameters, dense_bits) - _bytes(factor_parameters, factor_bits))


def rank_that_saves(
    size: FactorSize,
    shape: ExpertShape,
    dense_bits: Fraction = Fraction(32),
    factor_bits: Fraction = Fraction(32),
) -> int:
    """The largest rank (MoBE: number of bases) whose factors take fewer bytes than dense experts; 0 if none does."""
    fewer_bytes = _bytes(shape.parameters, dense_bits) - 1
    return size.largest_within(floor(fewer_bytes * 8 / factor_bits))


def rank_for_share(share_removed: Fraction | float, size: FactorSize, shape: ExpertShape) -> int:
    """The largest rank (MoBE: number of bases) that removes at least this share of the experts' parameters.

    Raises:
        InputError: the share is not between 0 and 1, or the smallest size removes less.
    """
    if not 0 <= share_removed < 1:
        raise InputError(f"{share_removed} is no share of parameters to remove: give one from 0 to below 1")
    kept = floor(shape.parameters * (1 - Fraction(share_removed).limit_denominator(10**6)))
    found = size.largest_within(kept)
    if found == 0:
        most = 1 - size.parameters(1) / shape.parameters
        raise InputError(
            f"a share of {float(share_removed):g} cannot be removed from {shape.n_experts} experts: "
            f"these factors remove at most {most:.4f}"
        )
    return found


def _bytes(parameters: int, bits: Fraction) -> int:
    return ceil(parameters * bits / 8)
