"""Pruning criteria against their definitions, token by token, on trained weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import compressors.shrink.removal_error
from compressors.calibration.statistics import LayerStatistics
from compressors.model.sources.opening import open_source
from compressors.shrink.criteria import CRITERIA, CRITERION_NAMES, REMOVAL_ERROR
from compressors.shrink.moe_block import Evidence, MoeBlock
from compressors.shrink.removal_error import removal_error

TrainedBlock = Callable[..., tuple[MoeBlock, Evidence]]

_LAYER = 1
_CLOSE = {"rtol": 1e-4, "atol": 1e-9}


class _Choice(NamedTuple):
    """One token's choice of one expert."""

    expert: int
    gate: float
    output_D: torch.Tensor


def _run_expert(block: MoeBlock, expert: int, input_D: torch.Tensor) -> torch.Tensor:
    gate_F, up_F = (block.gate_up_EFD[expert] @ input_D).chunk(2)
    return block.down_EDF[expert] @ (nn.functional.silu(gate_F) * up_F)


def _widened(block: MoeBlock) -> MoeBlock:
    """All experts in float32, once instead of for each token."""
    return replace(block, gate_up_EFD=block.gate_up_EFD.float(), down_EDF=block.down_EDF.float())


def _route_token(block: MoeBlock, logits_E: torch.Tensor, top_k: int) -> list[tuple[int, float]]:
    """The chosen experts and their gates, by the model's rule."""
    probabilities = torch.softmax(logits_E.double(), dim=0)
    chosen = sorted(range(len(logits_E)), key=lambda expert: -probabilities[expert].item())[:top_k]
    total = sum(probabilities[expert].item() for expert in chosen) if block.routing.normalizes else 1.0
    return [(expert, probabilities[expert].item() / total) for expert in chosen]


def _choices(block: MoeBlock, input_D: torch.Tensor) -> list[_Choice]:
    routed = _route_token(block, block.router_ED @ input_D, block.top_k)
    return [_Choice(expert, gate, _run_expert(block, expert, input_D)) for expert, gate in routed]


def _zero(block: MoeBlock) -> list[float]:
    return [0.0] * block.n_experts


@pytest.fixture(scope="module")
def defined(family_folder: Path, trained_block: TrainedBlock) -> dict[str, list[float]]:
    """Every sum and every criterion of one layer, by their definitions."""
    trained, evidence = trained_block(family_folder, _LAYER)
    block = _widened(trained)
    count, gates, norms = _zero(block), _zero(block), _zero(block)
    gate_norms, squares, largest, peaks, softmax = _zero(block), _zero(block), _zero(block), _zero(block), _zero(block)
    for input_D in evidence.sample_TD:
        for expert, gate, output_D in _choices(block, input_D):
            norm = output_D.norm().item()
            count[expert] += 1
            gates[expert] += gate
            norms[expert] += norm
            gate_norms[expert] += gate * norm
            squares[expert] += norm * norm
            largest[expert] = max(largest[expert], norm)
            peaks[expert] = max(peaks[expert], max(map(abs, output_D.tolist())))
        for expert, probability in enumerate(torch.softmax(block.router_ED @ input_D, dim=0).tolist()):
            softmax[expert] += probability

    def mean(sums: list[float]) -> list[float]:
        return [total / max(n, 1) for total, n in zip(sums, count, strict=True)]

    return {
        "count_E": count,
        "gate_sum_E": gates,
        "norm_sum_E": norms,
        "gate_norm_sum_E": gate_norms,
        "norm_square_sum_E": squares,
        "norm_max_E": largest,
        "output_max_E": peaks,
        "router_probability_sum_E": softmax,
        "frequency": count,
        "gate-frequency": gates,
        "ean": norms,
        "reap": mean(gate_norms),
        "man": mean(norms),
        "msan": mean(squares),
        "expert-drop": [total / len(evidence.sample_TD) for total in softmax],
    }


def test_criteria_equal_their_definitions(
    family_folder: Path, trained_block: TrainedBlock, defined: dict[str, list[float]]
) -> None:
    _, evidence = trained_block(family_folder, _LAYER)
    assert set(CRITERION_NAMES) == {*CRITERIA, REMOVAL_ERROR}
    for name, criterion in CRITERIA.items():
        scores_E = criterion(evidence.statistics)
        assert scores_E.dtype == torch.float64
        torch.testing.assert_close(scores_E, torch.tensor(defined[name], dtype=torch.float64), **_CLOSE)


def test_the_sums_that_criteria_read_equal_their_definitions(
    family_folder: Path, trained_block: TrainedBlock, defined: dict[str, list[float]]
) -> None:
    statistics = trained_block(family_folder, _LAYER)[1].statistics
    for name in {field.name for field in fields(statistics)} & defined.keys():
        expected = torch.tensor(defined[name], dtype=torch.float64)
        torch.testing.assert_close(getattr(statistics, name), expected, **_CLOSE)


def test_experts_that_were_never_seen_score_zero(fine_folder: Path) -> None:
    nothing = LayerStatistics.zeros(open_source(fine_folder).spec.layers[0])
    for criterion in CRITERIA.values():
        assert criterion(nothing).tolist() == [0.0] * 32


def _removal_error_by_definition(block: MoeBlock, inputs_TD: torch.Tensor) -> torch.Tensor:
    """Drops each expert in turn and runs the whole block again, one token at a time."""
    changes, outputs = _zero(block), 0.0
    for input_D in inputs_TD:
        logits_E = block.router_ED @ input_D
        everything = [_run_expert(block, expert, input_D).double() for expert in range(block.n_experts)]
        before = torch.zeros(len(input_D), dtype=torch.float64)
        chosen = _route_token(block, logits_E, block.top_k)
        for expert, gate in chosen:
            before += gate * everything[expert]
        outputs += before.square().sum().item()
        for dropped, _ in chosen:
            without_E = logits_E.clone()
            without_E[dropped] = -torch.inf
            after = torch.zeros(len(input_D), dtype=torch.float64)
            for expert, gate in _route_token(block, without_E, min(block.top_k, block.n_experts - 1)):
                after += gate * everything[expert]
            changes[dropped] += (before - after).square().sum().item()
    return torch.tensor(changes, dtype=torch.float64) / outputs


@pytest.fixture(scope="module")
def sample(family_folder: Path, trained_block: TrainedBlock) -> tuple[MoeBlock, torch.Tensor]:
    block, evidence = trained_block(family_folder, _LAYER)
    return _widened(block), evidence.sample_TD[::16]


def test_the_removal_error_equals_its_definition(sample: tuple[MoeBlock, torch.Tensor]) -> None:
    block, inputs_TD = sample
    errors_E = removal_error(block, inputs_TD)
    assert errors_E.dtype == torch.float64
    torch.testing.assert_close(errors_E, _removal_error_by_definition(block, inputs_TD), **_CLOSE)


def test_without_a_next_choice_the_others_take_over(sample: tuple[MoeBlock, torch.Tensor]) -> None:
    whole, inputs_TD = sample[0], sample[1][:64]
    block = whole.keep(range(whole.top_k))
    assert block.top_k == block.n_experts
    torch.testing.assert_close(
        removal_error(block, inputs_TD), _removal_error_by_definition(block, inputs_TD), **_CLOSE
    )


def test_an_expert_that_no_token_chose_is_not_missed(fine_folder: Path, trained_block: TrainedBlock) -> None:
    trained, evidence = trained_block(fine_folder, _LAYER)
    block, inputs_TD = _widened(trained), evidence.sample_TD[:5]
    chosen = {choice.expert for input_D in inputs_TD for choice in _choices(block, input_D)}
    errors = removal_error(block, inputs_TD).tolist()
    assert {expert for expert, error in enumerate(errors) if error > 0} == chosen
    assert len(chosen) < block.n_experts


def test_the_last_expert_is_the_whole_output(fine_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = trained_block(fine_folder, _LAYER)
    assert removal_error(block.keep([7]), evidence.sample_TD[:10]).tolist() == [1.0]


def test_a_twin_makes_an_expert_dispensable(fine_folder: Path, trained_block: TrainedBlock) -> None:
    """With top-1 routing and two copies of every expert, the next choice computes what the dropped one did."""
    block, evidence = trained_block(fine_folder, _LAYER)
    single = replace(block, top_k=1)
    twins = single.keep([expert for expert in range(32) for _ in range(2)])
    inputs_TD = evidence.sample_TD[:256]
    assert removal_error(single, inputs_TD).max() > 1e-3
    assert removal_error(twins, inputs_TD).max() < 1e-10


def test_pieces_do_not_change_the_removal_error(
    sample: tuple[MoeBlock, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, inputs_TD = sample
    at_once = removal_error(block, inputs_TD)
    monkeypatch.setattr(compressors.shrink.removal_error, "_PIECE_BYTES", 60_000)
    torch.testing.assert_close(removal_error(block, inputs_TD), at_once, rtol=1e-5, atol=0)


def test_experts_run_only_for_their_first_choices(
    sample: tuple[MoeBlock, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, inputs_TD = sample
    rows: list[int] = []
    run = MoeBlock.output

    def count(self: MoeBlock, expert: int, inputs_nD: torch.Tensor) -> torch.Tensor:
        rows.append(len(inputs_nD))
        return run(self, expert, inputs_nD)

    monkeypatch.setattr(MoeBlock, "output", count)
    removal_error(block, inputs_TD)
    assert sum(rows) == len(inputs_TD) * (block.top_k + 1)
