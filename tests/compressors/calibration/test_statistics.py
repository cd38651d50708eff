"""One-pass statistics and REAP against brute force by definition, on trained weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.calibration.statistics import (
    Importance,
    LayerStatistics,
    StatisticsCollector,
    StoredStatistics,
    importance,
    importance_of_kept,
    save_statistics,
)
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.shrink.prune import highest


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[: 8 * 64].reshape(8, 64))


def _collect(folder: Path, blocks_BT: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[LayerStatistics]:
    model = StreamedModel(Student.teacher(open_source(folder)))
    collector = StatisticsCollector(model.spec)
    model.stream([TokenGroup(blocks_BT, [collector.observe], dtype)])
    return [collector.take(layer) for layer in range(model.spec.n_layers)]


@torch.no_grad()
def _reap_by_definition(folder: Path, blocks_BT: torch.Tensor) -> list[torch.Tensor]:
    """S_j = mean over the tokens whose top-k holds j of g_j ||f_j||: token by token, expert by expert."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _m, args, index=index: inputs.update({index: args[0].flatten(0, 1)}))
    model(blocks_BT)
    scores = []
    for index, layer in enumerate(model.model.layers):
        experts, gate = layer.mlp.experts, layer.mlp.gate
        total, count = torch.zeros(experts.num_experts), torch.zeros(experts.num_experts)
        for hidden in inputs[index]:
            probabilities = torch.softmax(gate.weight @ hidden, dim=0)
            chosen = probabilities.argsort(descending=True)[: gate.top_k]
            for expert in chosen.tolist():
                gate_row, up_row = (experts.gate_up_proj[expert] @ hidden).chunk(2)
                output = experts.down_proj[expert] @ (torch.nn.functional.silu(gate_row) * up_row)
                sum_of_chosen = probabilities[chosen].sum() if getattr(gate, "norm_topk_prob", True) else 1.0
                total[expert] += probabilities[expert] / sum_of_chosen * output.norm()
                count[expert] += 1
        scores.append(total / count.clamp_min(1))
    return scores


def test_reap_equals_brute_force(family_folder: Path, blocks_BT: torch.Tensor) -> None:
    layers = _collect(family_folder, blocks_BT)
    expected = _reap_by_definition(family_folder, blocks_BT)
    n_kept = len(expected[0]) // 2
    for layer, scores in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.reap_scores().float(), scores, rtol=1e-4, atol=1e-6)
        assert highest(layer.reap_scores(), n_kept) == tuple(sorted(scores.argsort(descending=True)[:n_kept].tolist()))


@torch.no_grad()
def test_second_moments_and_cosines_equal_their_definition(fine_folder: Path, blocks_BT: torch.Tensor) -> None:
    statistics = _collect(fine_folder, blocks_BT)[2]
    model = AutoModelForCausalLM.from_pretrained(fine_folder, dtype=torch.float32).eval()
    layer = model.model.layers[2]
    seen: dict[str, torch.Tensor] = {}
    layer.self_attn.q_proj.register_forward_pre_hook(lambda _m, args: seen.update(attention=args[0].flatten(0, 1)))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.update(heads=args[0].flatten(0, 1)))
    layer.mlp.register_forward_pre_hook(lambda _m, args: seen.update(moe=args[0].flatten(0, 1)))
    layer.mlp.gate.register_forward_hook(lambda _m, _a, out: seen.update(logits=out[0], chosen=out[2]))
    layer.register_forward_pre_hook(lambda _m, args: seen.update(before=args[0].flatten(0, 1)))
    layer.register_forward_hook(lambda _m, _a, out: seen.update(after=out.flatten(0, 1)))
    model(blocks_BT)
    n_tokens = blocks_BT.numel()
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(statistics.input_squares[Role.QUERY].float(), seen["attention"].square().sum(0), **close)
    heads = statistics.input_squares[Role.ATTENTION_OUTPUT].float()
    torch.testing.assert_close(heads, seen["heads"].square().sum(0), **close)
    assert statistics.input_squares.keys() == {Role.QUERY, Role.ATTENTION_OUTPUT}  # key and value share the query's
    gram = seen["logits"].T @ seen["logits"]
    torch.testing.assert_close(statistics.router_logit_gram_EE.float(), gram, rtol=1e-4, atol=1e-2)
    routed = (seen["chosen"] == 7).any(-1)
    assert statistics.count_E[7] == routed.sum()
    torch.testing.assert_close(
        statistics.gate_up_input_square_ED[7].float(), seen["moe"][routed].square().sum(0), **close
    )
    cosine = torch.nn.functional.cosine_similarity(seen["before"], seen["after"], dim=-1).sum()
    assert statistics.block_cosine_sum.item() == pytest.approx(cosine.item(), rel=1e-5)
    assert statistics.n_tokens == n_tokens
    assert statistics.count_E.sum() == n_tokens * model.config.num_experts_per_tok


def test_statistics_survive_the_disk(fine_folder: Path, blocks_BT: torch.Tensor, tmp_path: Path) -> None:
    layers = _collect(fine_folder, blocks_BT[:1])
    for index, layer in enumerate(layers):
        save_statistics(layer, tmp_path / "statistics", index)
    stored = StoredStatistics(tmp_path / "statistics", len(layers))
    assert len(stored) == len(layers)
    for saved, loaded in zip(layers, stored, strict=True):
        assert saved.tensors.keys() == loaded.tensors.keys() >= {"count_E", "input_squares.ATTENTION_OUTPUT"}
        assert all(torch.equal(value, loaded.tensors[name]) for name, value in saved.tensors.items())


def test_damaged_and_missing_statistics_are_named(tmp_path: Path) -> None:
    (tmp_path / "layer-000.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    stored = StoredStatistics(tmp_path, 2)
    for layer in (0, 1):
        with pytest.raises(InputError, match=rf"layer-00{layer}\.safetensors"):
            stored[layer]


def test_statistics_in_bfloat16_choose_nearly_the_same_experts(family_folder: Path, blocks_BT: torch.Tensor) -> None:
    exact, rounded = _collect(family_folder, blocks_BT), _collect(family_folder, blocks_BT, torch.bfloat16)
    for first, second in zip(exact, rounded, strict=True):
        difference = (first.reap_scores() - second.reap_scores()).norm() / first.reap_scores().norm()
        assert difference < 0.05
        assert second.gate_sum_E.dtype == torch.float64


def _importance(folder: Path, layers: list[LayerStatistics], experts: ExpertMap) -> Importance:
    return importance(layers, experts, experts.spec_of(open_source(folder).spec))


def test_importance_follows_the_survivors(fine_folder: Path, blocks_BT: torch.Tensor) -> None:
    layers = _collect(fine_folder, blocks_BT)
    kept = ((3, 8, 21),) * len(layers)
    matrix = _importance(fine_folder, layers, ExpertMap.keeping(32, kept))
    whole = _importance(fine_folder, layers, ExpertMap.keeping(32, [range(32)] * len(layers)))
    for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
        assert torch.equal(matrix[role, 1], whole[role, 1][[3, 8, 21]])
    two = ExpertMap(32, (LayerMap(0, ((4,), (2,))), LayerMap(3, ((9,), (0,)))))
    expected, found = _importance(fine_folder, layers, two), importance_of_kept(whole, two)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert matrix[Role.EXPERT_GATE, 0].shape == (3, 256)
    assert matrix[Role.QUERY, 5].shape == (256,)


def test_experts_with_few_tokens_lean_on_their_layer(fine_folder: Path, blocks_BT: torch.Tensor) -> None:
    """Sixteen tokens are added to each expert's own: of the layer's mean, or with all inputs alike."""
    layer = _collect(fine_folder, blocks_BT)[1]
    often, never = 21, 5
    layer.count_E[never] = layer.gate_up_input_square_ED[never] = layer.down_input_square_EF[never] = 0
    matrix = _importance(fine_folder, [layer], ExpertMap.keeping(32, [range(32)]))
    inputs_D, n_tokens = layer.gate_up_input_square_ED, layer.count_E[often]
    layer_mean_D = inputs_D.sum(0) / layer.count_E.sum()
    expected_D = (inputs_D[often] + 16 * layer_mean_D) / (n_tokens + 16)
    torch.testing.assert_close(matrix[Role.EXPERT_UP, 0][often], expected_D.float())
    torch.testing.assert_close(matrix[Role.EXPERT_GATE, 0][never], layer_mean_D.float())
    own_F = layer.down_input_square_EF[often]
    torch.testing.assert_close(
        matrix[Role.EXPERT_DOWN, 0][often], ((own_F + 16 * own_F.mean() / n_tokens) / (n_tokens + 16)).float()
    )
    assert not matrix[Role.EXPERT_DOWN, 0][never].any()


def test_an_expert_never_routed_to_scores_zero(fine_folder: Path) -> None:
    spec: ModelSpec = open_source(fine_folder).spec
    assert LayerStatistics.zeros(spec.layers[0]).reap_scores().tolist() == [0.0] * spec.n_experts


def test_a_layer_without_experts_tells_about_its_matrices_and_its_states(
    fine_folder: Path, blocks_BT: torch.Tensor
) -> None:
    """Its feed-forward adds nothing, so what leaves it is what its norm would have seen."""
    source = open_source(fine_folder)
    experts = ExpertMap(32, (LayerMap(0, tuple((expert,) for expert in range(32))), LayerMap(1, ())))
    student = Student(source, experts)
    collector = StatisticsCollector(student.spec)
    StreamedModel(student).stream([TokenGroup(blocks_BT[:1], [collector.observe])])
    first, second = collector.take(0), collector.take(1)
    assert second.count_E.numel() == second.router_logit_gram_EE.numel() == 0
    assert second.moe_cosine_sum.item() == pytest.approx(blocks_BT[:1].numel(), rel=1e-5)
    assert first.moe_cosine_sum.item() < 0.99 * blocks_BT[:1].numel()
    matrix = importance([first, second], experts.of_itself(), student.spec)
    in_first = {role for role, layer in matrix if layer == 0}
    in_second = {role for role, layer in matrix if layer == 1}
    assert in_second == {Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUTPUT} < in_first
