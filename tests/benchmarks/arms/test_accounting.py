"""Counts of decomposed experts: against built tensors, products that were run, and a search of every size."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arms.accounting import (
    Container,
    ExpertShape,
    FactorSize,
    d2_moe_size,
    mobe_size,
    rank_for_share,
    rank_that_saves,
    saved_bytes,
    svd_size,
)
from compressors.calibration.statistics import LayerStatistics
from compressors.model.description.routing import Routing
from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from compressors.quantize.kernels import quantize_rows
from compressors.shrink.decompose import ActivationSvd, D2Moe, Mobe, SharedBases
from compressors.shrink.decompose.d2_moe import D2MoeFactors
from compressors.shrink.decompose.factors import ExpertMatrices
from compressors.shrink.decompose.mobe import MobeFactors
from compressors.shrink.decompose.svd import SvdFactors
from compressors.shrink.moe_block import Evidence, MoeBlock

_FINE = ExpertShape(n_experts=32, hidden_size=256, width=128, top_k=4)
_COARSE = ExpertShape(n_experts=8, hidden_size=256, width=512, top_k=2)

SIZES: list[Callable[[ExpertShape], FactorSize]] = [svd_size, d2_moe_size, lambda shape: mobe_size(shape, 40)]


@pytest.fixture(scope="module", params=[(6, 64, 32, 3), (3, 64, 96, 2)], ids=["narrow", "wide"])
def small(request: pytest.FixtureRequest, fine_folder: Path) -> tuple[MoeBlock, Evidence]:
    """Blocks whose sizes all differ; what their weights are does not matter to a count."""
    n_experts, hidden_size, width, top_k = request.param
    random = torch.Generator().manual_seed(1)

    def weights(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=random) / 8

    block = MoeBlock(
        weights(n_experts, hidden_size),
        weights(n_experts, 2 * width, hidden_size),
        weights(n_experts, hidden_size, width),
        top_k,
        Routing(),
    )
    nothing_counted = LayerStatistics.zeros(open_source(fine_folder).spec.with_experts(n_experts).layers[0])
    return block, Evidence(nothing_counted, weights(50, hidden_size))


def _methods(shape: ExpertShape) -> list[tuple[ActivationSvd | D2Moe | Mobe, FactorSize, int]]:
    """Each method, its counts and its size in the counts' unit."""
    return [
        (ActivationSvd(20), svd_size(shape), 20),
        (D2Moe(20), d2_moe_size(shape), 20),
        (Mobe(3, rank=20, steps=1), mobe_size(shape, 20), 3),
        (Mobe(2, steps=1), mobe_size(shape), 2),
    ]


def _stored_tensors(factors: object) -> list[torch.Tensor]:
    match factors:
        case SvdFactors(of_inputs, down):
            return [tensor for part in (*of_inputs, down) for tensor in (part.left_EOr, part.right_ErI)]
        case D2MoeFactors(base, deltas):
            return [*base.of_inputs, base.down_DF, *_stored_tensors(deltas)]
        case MobeFactors(of_inputs, down_EDF):
            return [tensor for part in of_inputs for tensor in (part.own_EFr, part.mix_EM, part.bases_MrD)] + [down_EDF]
    raise AssertionError(factors)


def test_parameters_are_those_of_the_tensors(small: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = small
    shape = ExpertShape.of(block)
    assert shape.parameters == block.gate_up_EFD.numel() + block.down_EDF.numel()
    for method, size, units in _methods(shape):
        factors = method.decompose(block, evidence)
        built = sum(tensor.numel() for tensor in _stored_tensors(factors))
        assert size.parameters(units) == built


def _one_token(block: MoeBlock, factors: object, token_1D: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The output for one token with the factors applied one after the other, and the multiply-adds that were run."""
    routes = block.route(token_1D)
    chosen, gates = routes.chosen_TK[0].tolist(), routes.gates_TK[0]
    with FlopCounterMode(display=False) as counter:
        match factors:
            case SvdFactors():
                output = _svd_token(factors, None, chosen, gates, token_1D)
            case D2MoeFactors(base, deltas):
                output = _svd_token(deltas, base, chosen, gates, token_1D)
            case MobeFactors((gate, up), down_EDF):
                output = torch.zeros_like(token_1D)
                for expert, weight in zip(chosen, gates, strict=True):
                    hidden = silu(_mobe_token(gate, expert, token_1D)) * _mobe_token(up, expert, token_1D)
                    output += weight * (hidden @ down_EDF[expert].float().T)
    return output, counter.get_total_flops() // 2


def _svd_token(
    factors: SvdFactors, base: ExpertMatrices | None, chosen: list[int], gates: torch.Tensor, token_1D: torch.Tensor
) -> torch.Tensor:
    shared_gate, shared_up = (0.0, 0.0) if base is None else (token_1D @ matrix.T for matrix in base.of_inputs)
    of_gate, of_up = factors.of_inputs
    output, hidden_sum = torch.zeros_like(token_1D), 0.0
    for expert, weight in zip(chosen, gates, strict=True):
        gate = token_1D @ of_gate.right_ErI[expert].T @ of_gate.left_EOr[expert].T + shared_gate
        up = token_1D @ of_up.right_ErI[expert].T @ of_up.left_EOr[expert].T + shared_up
        hidden = weight * silu(gate) * up
        hidden_sum = hidden_sum + hidden
        output += hidden @ factors.down.right_ErI[expert].T @ factors.down.left_EOr[expert].T
    return output if base is None else output + hidden_sum @ base.down_DF.T


def _mobe_token(bases: SharedBases, expert: int, token_1D: torch.Tensor) -> torch.Tensor:
    mixed = (bases.mix_EM[expert : expert + 1] @ bases.bases_MrD.flatten(1)).reshape(bases.bases_MrD.shape[1:])
    return token_1D @ silu(mixed).T @ bases.own_EFr[expert].T


def test_multiply_adds_are_those_of_a_token(small: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = small
    token_1D = evidence.sample_TD[17:18]
    for method, size, units in _methods(ExpertShape.of(block)):
        factors = method.decompose(block, evidence)
        output, multiply_adds = _one_token(block, factors, token_1D)
        torch.testing.assert_close(output, method(block, evidence).block.forward(token_1D), rtol=1e-4, atol=1e-6)
        assert multiply_adds == size.multiply_adds(units)
    chosen = block.route(token_1D).chosen_TK[0].tolist()
    with FlopCounterMode(display=False) as counter:
        for expert in chosen:
            block.output(expert, token_1D)
    assert counter.get_total_flops() // 2 == ExpertShape.of(block).multiply_adds


@pytest.mark.parametrize("shape", [_FINE, _COARSE])
@pytest.mark.parametrize("size_of", SIZES)
@pytest.mark.parametrize("share", [0.25, 0.5, Fraction(1, 3), 0.1])
def test_rank_for_share_is_the_largest_that_removes_it(
    shape: ExpertShape, size_of: Callable[[ExpertShape], FactorSize], share: Fraction | float
) -> None:
    size = size_of(shape)
    exact = Fraction(str(share)) if isinstance(share, float) else share
    fitting = [
        units for units in range(1, size.largest + 1) if size.parameters(units) <= (1 - exact) * shape.parameters
    ]
    assert fitting, "every share of this test can be removed"
    assert rank_for_share(share, size, shape) == fitting[-1]


def test_a_share_that_cannot_be_removed_is_refused() -> None:
    with pytest.raises(InputError, match=r"0\.5 cannot be removed from 32 experts: .* at most 0\.3125"):
        rank_for_share(0.5, mobe_size(_FINE), _FINE)
    for share in (1.0, -0.1):
        with pytest.raises(InputError, match="0 to below 1"):
            rank_for_share(share, svd_size(_FINE), _FINE)


@pytest.mark.parametrize("shape", [_FINE, _COARSE])
@pytest.mark.parametrize("size_of", SIZES)
@pytest.mark.parametrize(("dense_bits", "factor_bits"), [(32, 32), (16, 16), (16, 32), (Fraction(9, 2), 16)])
def test_rank_that_saves_is_the_last_before_break_even(
    shape: ExpertShape,
    size_of: Callable[[ExpertShape], FactorSize],
    dense_bits: Fraction | int,
    factor_bits: Fraction | int,
) -> None:
    size, bits = size_of(shape), (Fraction(dense_bits), Fraction(factor_bits))
    saving = [
        units
        for units in range(1, size.largest + 1)
        if saved_bytes(Container.ONNX, shape, size.parameters(units), *bits) > 0
    ]
    assert rank_that_saves(size, shape, *bits) == max(saving, default=0)


def test_break_even_ranks_of_the_fixtures() -> None:
    assert rank_that_saves(svd_size(_FINE), _FINE) == 85  # D F / (D + F) = 85.3
    assert rank_that_saves(d2_moe_size(_FINE), _FINE) == 82  # less by one expert of 32
    assert rank_that_saves(mobe_size(_FINE), _FINE) == 15
    assert rank_that_saves(mobe_size(_COARSE), _COARSE) == 0  # at rank D each A is as large as the matrix
    four_bit = (Fraction(9, 2), Fraction(16))
    assert rank_that_saves(svd_size(_FINE), _FINE, *four_bit) == 23
    assert rank_that_saves(mobe_size(_FINE), _FINE, *four_bit) == 0


def test_saved_bytes_are_those_of_the_tensors(small: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = small
    shape = ExpertShape.of(block)
    factors = ActivationSvd(4).decompose(block, evidence)
    dense = [block.gate_up_EFD.flatten(0, 1).float(), block.down_EDF.flatten(0, 1).float()]
    four_bit = sum(quantize_rows(tensor, GGMLQuantizationType.Q4_0, name="experts").nbytes for tensor in dense)
    stored = _stored_tensors(factors)
    n_parameters = sum(tensor.numel() for tensor in stored)
    cases = (
        (sum(tensor.nbytes for tensor in dense), sum(tensor.nbytes for tensor in stored), (Fraction(32), Fraction(32))),
        (four_bit, sum(tensor.half().nbytes for tensor in stored), (Fraction(9, 2), Fraction(16))),
    )
    for dense_bytes, factor_bytes, bits in cases:
        assert saved_bytes(Container.ONNX, shape, n_parameters, *bits) == dense_bytes - factor_bytes > 0
        assert saved_bytes(Container.GGUF, shape, n_parameters, *bits) == 0
    full = svd_size(shape).parameters(shape.full_rank)
    assert saved_bytes(Container.ONNX, shape, full) == 0  # larger than dense: the dense experts are kept
