"""Blocks of families with other routers: biases, sigmoids, groups, another function between the products."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from compressors.calibration.statistics import LayerStatistics
from compressors.model.config.reading import read_spec
from compressors.model.description.feed_forward import Routed, Shared
from compressors.model.description.glu import Glu
from compressors.model.description.routing import GroupScore, Routing, Score
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.shrink.condense import Condense
from compressors.shrink.dense import check_dense
from compressors.shrink.merge import REAM, HCSMoE, MSMoE, merge_groups
from compressors.shrink.moe_block import Evidence, MoeBlock
from compressors.shrink.prune import Prune
from compressors.shrink.registry import expert_counts, fewest_experts
from compressors.shrink.removal_error import removal_error
from compressors.shrink.slim.width import SlimWidth

_GROUPED = Routing(
    Score.SIGMOID,
    has_selection_bias=True,
    n_groups=4,
    n_chosen_groups=2,
    group_score=GroupScore.BEST_TWO,
    epsilon=1e-20,
    scale=2.5,
)


def _filled(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random values in place of a module's own."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(tensor.shape, generator=generator) / 3 for name, tensor in module.state_dict().items()}
    module.load_state_dict(state)
    return state


@pytest.fixture(scope="module")
def inputs_TD() -> torch.Tensor:
    """A few tokens."""
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def deepseek() -> tuple[MoeBlock, DeepseekV3MoE]:
    """Sixteen experts in four groups, of which two are chosen; a selection bias."""
    config = DeepseekV3Config(
        hidden_size=16, moe_intermediate_size=8, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        n_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    stock = DeepseekV3MoE(config).float().eval()
    state = _filled(stock)
    block = MoeBlock(
        state["gate.weight"],
        state["experts.gate_up_proj"],
        state["experts.down_proj"],
        4,
        _GROUPED,
        selection_bias_E=state["gate.e_score_correction_bias"],
    )
    return block, stock


@pytest.fixture(scope="module")
def gpt_oss() -> tuple[MoeBlock, GptOssMLP]:
    """Six experts with biases everywhere; gates and ups lie interleaved and transposed in transformers' module."""
    config = GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=6, num_experts_per_tok=3)
    stock = GptOssMLP(config).float().eval()
    state = _filled(stock)
    gate_up_EFD = state["experts.gate_up_proj"].transpose(1, 2)
    bias_EF = state["experts.gate_up_proj_bias"]
    block = MoeBlock(
        state["router.weight"],
        torch.cat([gate_up_EFD[:, ::2], gate_up_EFD[:, 1::2]], dim=1),
        state["experts.down_proj"].transpose(1, 2).contiguous(),
        3,
        Routing(Score.LOGITS),
        Glu(alpha=1.702, limit=7.0, offset=1.0),
        router_bias_E=state["router.bias"],
        gate_up_bias_EF=torch.cat([bias_EF[:, ::2], bias_EF[:, 1::2]], dim=1),
        down_bias_ED=state["experts.down_proj_bias"],
    )
    return block, stock


@torch.no_grad()
def test_a_deepseek_block_is_that_of_transformers_beside_the_shared_expert(
    deepseek: tuple[MoeBlock, DeepseekV3MoE], inputs_TD: torch.Tensor
) -> None:
    block, stock = deepseek
    routed_TD = stock(inputs_TD[None])[0] - stock.shared_experts(inputs_TD)
    torch.testing.assert_close(block.forward(inputs_TD), routed_TD, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_gpt_oss_block_is_that_of_transformers(gpt_oss: tuple[MoeBlock, GptOssMLP], inputs_TD: torch.Tensor) -> None:
    block, stock = gpt_oss
    torch.testing.assert_close(block.forward(inputs_TD), stock(inputs_TD[None])[0][0], rtol=1e-4, atol=1e-5)


def _evidence(block: MoeBlock, inputs_TD: torch.Tensor) -> Evidence:
    """The evidence for merging and pruning, from the routes of some tokens."""
    routes, n_experts = block.route(inputs_TD), block.n_experts
    count_E = torch.bincount(routes.chosen_TK.flatten(), minlength=n_experts).double()
    gates_E = torch.zeros(n_experts, dtype=torch.float64)
    gates_E.index_add_(0, routes.chosen_TK.flatten(), routes.gates_TK.flatten().double())
    sizes = {name: torch.zeros(n_experts, dtype=torch.float64) for name in LayerStatistics.__dataclass_fields__}
    known = {
        "count_E": count_E,
        "gate_sum_E": gates_E,
        "gate_norm_sum_E": gates_E,
        "router_logit_gram_EE": (routes.logits_TE.T @ routes.logits_TE).double(),
    }
    return Evidence(LayerStatistics(**sizes | known | {"input_squares": {}}), inputs_TD)


def test_every_group_keeps_as_many_experts(deepseek: tuple[MoeBlock, DeepseekV3MoE], inputs_TD: torch.Tensor) -> None:
    block, _ = deepseek
    count_E = torch.tensor([9, 8, 7, 6, *[0, 1, 2, 3], *[5, 1, 5, 1], *[1, 2, 2, 1]], dtype=torch.float64)
    evidence = _evidence(block, inputs_TD)
    evidence = replace(evidence, statistics=replace(evidence.statistics, count_E=count_E))
    pruned = Prune("frequency", 8)(block, evidence)
    assert [group[0] for group in pruned.groups] == [0, 1, 6, 7, 8, 10, 13, 14]
    assert pruned.block.selection_bias_E is not None and block.selection_bias_E is not None
    assert torch.equal(pruned.block.selection_bias_E, block.selection_bias_E[[0, 1, 6, 7, 8, 10, 13, 14]])
    assert pruned.block.forward(inputs_TD).isfinite().all()
    with pytest.raises(InputError, match="give a multiple of 4"):
        Prune("frequency", 6)(block, evidence)
    with pytest.raises(InputError, match=r"cannot protect the experts \[3\]"):
        Prune("frequency", 8, frozenset({1, 2, 3}))(block, evidence)
    with pytest.raises(InputError, match="must stay equal in size"):
        block.keep([0, 1, 2, 3])


@pytest.mark.parametrize("method", [MSMoE(8), REAM(8)], ids=["m-smoe", "ream"])
def test_merging_keeps_as_many_of_every_group(
    method: MSMoE | REAM, deepseek: tuple[MoeBlock, DeepseekV3MoE], inputs_TD: torch.Tensor
) -> None:
    block, _ = deepseek
    merged = method(block, _evidence(block, inputs_TD))
    assert [block.group_of(group[0]) for group in merged.groups] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(expert for group in merged.groups for expert in group) == list(range(16))


def test_clusters_that_fit_no_groups_are_refused(
    deepseek: tuple[MoeBlock, DeepseekV3MoE], inputs_TD: torch.Tensor
) -> None:
    block, _ = deepseek
    with pytest.raises(InputError, match="among 4 groups"):
        HCSMoE(7)(block, _evidence(block, inputs_TD))
    with pytest.raises(UnsupportedError, match="removal-error"):
        removal_error(block, inputs_TD)


def test_an_expert_s_removal_counts_its_tokens_next_choice_by_the_biased_scores(inputs_TD: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    block = MoeBlock(
        torch.randn(6, 16, generator=generator),
        torch.randn(6, 16, 16, generator=generator) / 3,
        torch.randn(6, 16, 8, generator=generator) / 3,
        2,
        Routing(Score.SIGMOID, has_selection_bias=True, epsilon=1e-20),
        selection_bias_E=torch.linspace(-0.4, 0.4, 6),
    )
    whole_TD = block.forward(inputs_TD)
    expected = []
    for expert in range(6):
        others = block.keep([other for other in range(6) if other != expert])
        chose_T = (block.route(inputs_TD).chosen_TK == expert).any(-1)
        expected.append((whole_TD - others.forward(inputs_TD))[chose_T].square().sum() / whole_TD.square().sum())
    torch.testing.assert_close(removal_error(block, inputs_TD).float(), torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_biases_are_averaged_like_rows(gpt_oss: tuple[MoeBlock, GptOssMLP], inputs_TD: torch.Tensor) -> None:
    block, _ = gpt_oss
    weights_E = torch.tensor([1.0, 0, 3, 0, 0, 0])
    reversed_F = torch.arange(8).flip(0)
    merged = merge_groups(
        block,
        ((0, 2), (1,), (3, 4), (5,)),
        weights_E,
        align=lambda _reference, _expert: reversed_F,
        average_router=True,
    ).block
    assert merged.router_bias_E is not None and block.router_bias_E is not None
    assert merged.gate_up_bias_EF is not None and block.gate_up_bias_EF is not None
    assert merged.down_bias_ED is not None and block.down_bias_ED is not None
    torch.testing.assert_close(merged.router_bias_E[0], block.router_bias_E[0] / 4 + block.router_bias_E[2] * 3 / 4)
    torch.testing.assert_close(merged.down_bias_ED[2], (block.down_bias_ED[3] + block.down_bias_ED[4]) / 2)
    up_F = block.gate_up_bias_EF[0, 8:] / 4 + block.gate_up_bias_EF[2, 8:].flip(0) * 3 / 4
    torch.testing.assert_close(merged.gate_up_bias_EF[0, 8:], up_F)
    assert torch.equal(merged.gate_up_bias_EF[1], block.gate_up_bias_EF[1])


def test_equal_experts_with_biases_are_merged_into_themselves(
    gpt_oss: tuple[MoeBlock, GptOssMLP], inputs_TD: torch.Tensor
) -> None:
    block, _ = gpt_oss
    alike = block.keep([0, 0, 1])
    merged = merge_groups(alike, ((0, 1), (2,)), torch.ones(3), average_router=False).block
    torch.testing.assert_close(merged.output(0, inputs_TD), block.output(0, inputs_TD))
    torch.testing.assert_close(merged.output(1, inputs_TD), block.output(1, inputs_TD))


def test_narrow_experts_keep_their_neurons_biases(gpt_oss: tuple[MoeBlock, GptOssMLP], inputs_TD: torch.Tensor) -> None:
    """A neuron whose column of the down projection is zero goes first, and then the output is what it was."""
    block, _ = gpt_oss
    down_EDF = block.down_EDF.clone()
    down_EDF[:, :, 3] = 0
    block = replace(block, down_EDF=down_EDF)
    narrow = SlimWidth(7)(block, _evidence(block, inputs_TD)).block
    assert narrow.width == 7
    torch.testing.assert_close(narrow.forward(inputs_TD), block.forward(inputs_TD), rtol=1e-3, atol=1e-4)


def test_a_dense_block_has_the_biases_of_all_its_experts(
    gpt_oss: tuple[MoeBlock, GptOssMLP], inputs_TD: torch.Tensor
) -> None:
    block, _ = gpt_oss
    evidence = _evidence(block, inputs_TD)
    dense = Condense()(block, evidence)
    gates_E = evidence.statistics.gate_sum_E / evidence.statistics.count_E
    expected_TD = sum(gates_E[expert].float() * block.output(expert, inputs_TD) for expert in dense.groups[0])
    torch.testing.assert_close(dense.block.forward(inputs_TD), expected_TD, rtol=1e-4, atol=1e-5)


def _routed(spec: ModelSpec, **changes: object) -> ModelSpec:
    """The model with changes of its routed feed-forwards."""
    layers = []
    for layer in spec.layers:
        assert isinstance(layer.feed_forward, Routed)
        layers.append(replace(layer, feed_forward=replace(layer.feed_forward, **changes)))  # type: ignore[arg-type]
    return replace(spec, layers=tuple(layers))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shared": Shared(64)}, "layer 0 has a shared expert"),
        ({"routing": Routing(Score.SIGMOID)}, "layer 0 has a router whose scores are sigmoids"),
        ({"routing": Routing(n_groups=2)}, "layer 0 has a router that chooses groups"),
        ({"routing": Routing(scale=2.0)}, "layer 0 multiplies the weights"),
    ],
)
def test_what_no_dense_student_can_stand_for_is_refused(
    fine_folder: Path, changes: dict[str, object], said: str
) -> None:
    spec = read_spec(fine_folder)
    check_dense(spec)
    with pytest.raises(UnsupportedError, match=said):
        check_dense(_routed(spec, **changes))


def test_numbers_of_experts_keep_groups_equal_and_large_enough(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)  # 32 experts, top-4
    assert expert_counts("reap", spec) == range(32, 3, -1)
    grouped = _routed(spec, routing=_GROUPED)
    assert list(expert_counts("reap", grouped)) == [32, 28, 24, 20, 16, 12, 8]  # two of each group, for their score
    assert fewest_experts("reap", _routed(spec, routing=replace(_GROUPED, n_chosen_groups=1))) == 16
    in_one_group = replace(
        _GROUPED, n_groups=1, n_chosen_groups=1
    )  # transformers' class takes its best two all the same
    assert fewest_experts("reap", _routed(spec, routing=in_one_group, top_k=1)) == 2
