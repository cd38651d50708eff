"""The condensed block equals its definition, computed here expert by expert with plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressors.model.config.reading import read_spec
from compressors.model.errors import UnsupportedError
from compressors.model.sources.student import ExpertMap, LayerMap
from compressors.shrink.condense import Condense
from compressors.shrink.dense import check_dense, dense_size
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock

TrainedBlock = Callable[..., tuple[MoeBlock, Evidence]]


@pytest.mark.parametrize(("model", "layer"), [("fine_folder", 2), ("coarse_folder", 4), ("olmoe_folder", 1)])
def test_the_best_experts_answer_every_token_with_the_gate_to_expect(
    request: pytest.FixtureRequest, trained_block: TrainedBlock, model: str, layer: int
) -> None:
    block, evidence = trained_block(request.getfixturevalue(model), layer)
    inputs_TD = evidence.sample_TD
    reap, mean_gate = [], []
    for expert in range(block.n_experts):
        gates, norms = _applied_gates_and_norms(block, expert, inputs_TD)
        reap.append((gates * norms).mean().item() if len(gates) else 0.0)
        mean_gate.append(gates.mean().item() if len(gates) else 0.0)
    best = sorted(range(block.n_experts), key=lambda expert: -reap[expert])[: block.top_k]
    some_TD = inputs_TD[::16]
    expected_TD = sum(mean_gate[expert] * _answer(block, expert, some_TD) for expert in best)
    assert isinstance(expected_TD, torch.Tensor)

    result = Condense()(block, replace(evidence, inputs_TD=None))

    assert set(result.groups[0]) == set(best)
    assert (result.block.n_experts, result.block.top_k) == (1, 1)
    assert result.block.width == block.top_k * block.width
    assert (result.block.route(some_TD).gates_TK == 1).all()
    found_TD = result.block.forward(some_TD)
    assert (found_TD - expected_TD).norm() < 1e-5 * expected_TD.norm()
    assert expected_TD.norm() > 0.1 * block.forward(some_TD).norm()


def _answer(block: MoeBlock, expert: int, inputs_TD: torch.Tensor) -> torch.Tensor:
    gate_FD, up_FD = block.gate_up_EFD[expert].float().chunk(2)
    gate_TF = inputs_TD @ gate_FD.T
    return (gate_TF * torch.sigmoid(gate_TF) * (inputs_TD @ up_FD.T)) @ block.down_EDF[expert].float().T


def _applied_gates_and_norms(
    block: MoeBlock, expert: int, inputs_TD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and output norms of the tokens that chose the expert."""
    probabilities_TE = (inputs_TD @ block.router_ED.T).softmax(-1)
    order_TE = probabilities_TE.argsort(-1, descending=True)
    tokens = (order_TE[:, : block.top_k] == expert).any(-1)
    gates = probabilities_TE[tokens, expert]
    if block.routing.normalizes:
        gates = gates / probabilities_TE[tokens].sort(-1, descending=True).values[:, : block.top_k].sum(-1)
    return gates, _answer(block, expert, inputs_TD[tokens]).norm(dim=-1)


def test_the_result_says_what_became_of_the_experts(coarse_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = trained_block(coarse_folder, 1)
    result = Condense()(block, evidence)
    assert result.changed_experts == {0}
    assert not result.router_changed
    assert torch.equal(result.block.router_ED[0], block.router_ED[result.groups[0][0]])
    spec = read_spec(coarse_folder)
    assert (result.block.n_experts, result.block.width) == (
        dense_size(spec).n_experts,
        dense_size(spec).expert_width,
    )


def _with_scores(block: MoeBlock, evidence: Evidence, gate_norms: list[float], counts: list[float]) -> CompressedBlock:
    statistics = replace(
        evidence.statistics,
        gate_norm_sum_E=torch.tensor(gate_norms, dtype=torch.float64),
        gate_sum_E=torch.tensor(counts, dtype=torch.float64) / 2,
        count_E=torch.tensor(counts, dtype=torch.float64),
    )
    return Condense()(block, Evidence(statistics, None))


def test_of_equal_experts_the_first_are_taken(coarse_folder: Path, trained_block: TrainedBlock) -> None:
    result = _with_scores(*trained_block(coarse_folder, 0), [1, 2, 4, 4, 1, 4, 0, 0], [1.0] * 8)
    assert result.groups == ((2, 3),)


def test_an_expert_that_no_token_chose_says_nothing(coarse_folder: Path, trained_block: TrainedBlock) -> None:
    """Only expert 6 was ever chosen: the second place goes to one whose neurons wait for training."""
    block, evidence = trained_block(coarse_folder, 0)
    chosen = [0.0] * 6 + [4.0, 0.0]
    result = _with_scores(block, evidence, chosen, chosen)
    assert result.groups == ((0, 6),)
    some_TD = evidence.sample_TD[:64]
    assert torch.isfinite(result.block.gate_up_EFD).all()
    torch.testing.assert_close(result.block.forward(some_TD), 0.5 * _answer(block, 6, some_TD), rtol=1e-4, atol=1e-5)


def test_a_student_s_only_expert_may_be_as_wide_as_its_group(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)
    width = spec.expert_width

    def check(groups: tuple[tuple[int, ...], ...], width: int) -> None:
        ExpertMap(spec.n_experts, (LayerMap(0, groups, width),)).check_against(spec)

    check(((5, 7, 9, 30),), 4 * width)
    check(((5, 7), (9, 30)), width)
    for groups, too_wide in ((((5, 7, 9, 30),), 4 * width + 1), (((5,),), width + 1), (((5, 7), (9, 30)), width + 1)):
        with pytest.raises(ValueError, match=rf"layer 0 has experts of width {too_wide}"):
            check(groups, too_wide)


def test_a_family_without_a_dense_counterpart_is_refused_by_name(
    fine_folder: Path, coarse_folder: Path, olmoe_folder: Path
) -> None:
    check_dense(read_spec(fine_folder))
    check_dense(read_spec(coarse_folder))
    with pytest.raises(UnsupportedError, match=r"--student dense: .* olmoe .* there is one for .*mixtral, .*qwen3_moe"):
        check_dense(read_spec(olmoe_folder))
