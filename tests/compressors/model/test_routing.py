"""The rule of routing, in numpy and torch, against stock transformers: tiny random models of every family it has."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING

from compressors.model.description.feed_forward import Routed
from compressors.model.description.routing import GroupScore, Routing, Score
from compressors.model.predictions.routing_record import selection_margins
from compressors.model.running.routers import RoutedCall, rerouting, watching
from tests.compressors.model.tiny_families import tiny_model

_SAME = 1e-6


@dataclass(frozen=True)
class _Case:
    """A family, as its file describes its routing, and settings of its tiny model.

    ``modules`` are those of :class:`Routed` that are not where most families have them.
    """

    model_type: str
    routing: Routing
    settings: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    n_layers: int = 2  # with experts

    def routed(self) -> Routed:
        return Routed(n_experts=8, top_k=3, width=16, routing=self.routing, **self.modules)  # type: ignore[arg-type]


_RAW = Routing(normalizes=False)
_OF_CHOSEN = Routing(Score.LOGITS)
_SIGMOID = Routing(Score.SIGMOID, has_selection_bias=True, epsilon=1e-20)
_IN_GATE = {"selection_bias": "mlp.gate.e_score_correction_bias"}
_GROUPED = {"n_group": 4, "topk_group": 2}
_GROUPED_RULE = replace(_SIGMOID, n_groups=4, n_chosen_groups=2)
_GRANITE = {"router_module": "block_sparse_moe.router", "experts_module": "block_sparse_moe.experts"}
_LFM2 = {"router_module": "feed_forward.gate", "experts_module": "feed_forward.experts"}
_JAMBA = {"router_module": "feed_forward.router", "experts_module": "feed_forward.experts"}
_NEMOTRON = {
    "router_module": "mixer.gate",
    "experts_module": "mixer.experts",
    "selection_bias": "mixer.gate.e_score_correction_bias",
}
_AFMOE = {"router_module": "mlp.router.gate", "selection_bias": "mlp.expert_bias"}
_GEMMA4 = {
    "router_module": "router.proj",
    "experts_module": "experts",
    "expert_scale": "router.per_expert_scale",
}
_SCALED = {"routed_scaling_factor": 2.5}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
_WHOLE = {"full_attention": _ROPE, "sliding_attention": _ROPE}


def _scaled(routing: Routing, scale: float = 2.5) -> Routing:
    return replace(routing, scale=scale)


_CASES = (
    _Case("qwen2_moe", _RAW, {"norm_topk_prob": False}),
    _Case("qwen2_moe", Routing(), {"norm_topk_prob": True}),
    _Case("qwen3_moe", Routing(), {"norm_topk_prob": True}),
    _Case("qwen3_next", Routing(), {"norm_topk_prob": True}),
    _Case("qwen3_next", _RAW, {"norm_topk_prob": False}),
    _Case("qwen3_5_moe_text", Routing()),
    _Case("olmoe", _RAW),
    _Case("olmoe", Routing(), {"norm_topk_prob": True}),
    _Case("flex_olmo", _RAW),
    _Case("mellum", Routing(), {"norm_topk_prob": True}),
    _Case("mixtral", Routing()),
    _Case("minimax", Routing()),
    _Case("gpt_oss", _OF_CHOSEN, modules={"router_module": "mlp.router"}),
    _Case("granitemoe", _OF_CHOSEN, modules=_GRANITE),
    _Case("granitemoeshared", _OF_CHOSEN, modules=_GRANITE),
    _Case("granitemoehybrid", _OF_CHOSEN, {"layer_types": ["mamba", "attention"]}, _GRANITE),
    _Case("granitemoe_swa", _OF_CHOSEN, modules=_GRANITE),
    _Case("glm4_moe", _scaled(_SIGMOID), _SCALED, _IN_GATE),
    _Case("glm4_moe", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE),
    _Case("glm4_moe", Routing(Score.SIGMOID, True, normalizes=False), {"norm_topk_prob": False}, _IN_GATE),
    _Case("glm4_moe_lite", _scaled(_SIGMOID), _SCALED, _IN_GATE, n_layers=1),
    _Case("glm_moe_dsa", _scaled(_SIGMOID), _SCALED, _IN_GATE),
    _Case("deepseek_v2", _RAW, {"topk_method": "greedy", "norm_topk_prob": True}),
    _Case(
        "deepseek_v2",
        Routing(n_groups=4, n_chosen_groups=2, group_score=GroupScore.BEST, normalizes=False, scale=2.5),
        _SCALED | _GROUPED | {"topk_method": "group_limited_greedy"},
    ),
    _Case("deepseek_v3", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE),
    _Case("deepseek_v3", _scaled(_SIGMOID), _SCALED | {"n_group": 1, "topk_group": 1}, _IN_GATE),
    _Case("deepseek_v32", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE),
    _Case("dots1", _scaled(_GROUPED_RULE), _SCALED | _GROUPED | {"norm_topk_prob": True}, _IN_GATE),
    _Case("exaone_moe", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE),
    _Case("solar_open", _scaled(_SIGMOID), _SCALED, _IN_GATE),
    _Case("nemotron_h", _scaled(_SIGMOID), _SCALED, _NEMOTRON, n_layers=1),
    _Case(
        "lfm2_moe",
        Routing(Score.SIGMOID, has_selection_bias=True, epsilon=1e-6, scale=2.5),
        _SCALED | {"layer_types": ["conv", "full_attention"], "use_expert_bias": True},
        _LFM2 | {"selection_bias": "feed_forward.expert_bias"},
    ),
    _Case(
        "lfm2_moe",
        Routing(Score.SIGMOID, normalizes=False),
        {"layer_types": ["conv", "full_attention"], "use_expert_bias": False, "norm_topk_prob": False},
        _LFM2,
    ),
    _Case("minimax_m2", Routing(Score.SIGMOID, True), modules={"selection_bias": "mlp.e_score_correction_bias"}),
    _Case("afmoe", _scaled(_SIGMOID), {"route_scale": 2.5}, _AFMOE),
    _Case(
        "ernie4_5_moe",
        Routing(has_selection_bias=True, least_sum=0.6),
        {"moe_norm_min": 0.6, "moe_layer_start_index": 0},
        {"selection_bias": "mlp.gate.moe_statics.e_score_correction_bias"},
    ),
    _Case("hunyuan_v1_moe", Routing(), modules={"router_module": "mlp.gate.wg"}),
    _Case("jamba", _RAW, modules=_JAMBA, n_layers=1),
    _Case("gemma4_text", Routing(has_expert_scale=True), {"enable_moe_block": True}, _GEMMA4),
    _Case(
        "hy_v3",
        _scaled(_SIGMOID),
        {"router_scaling_factor": 2.5},
        {"selection_bias": "mlp.e_score_correction_bias"},
        n_layers=1,
    ),
    _Case("hy_v4", _scaled(_SIGMOID), _SCALED | {"n_group": 1, "topk_group": 1}, _IN_GATE, n_layers=1),
    _Case("kimi_linear", _scaled(_SIGMOID), _SCALED | {"num_experts_per_token": 3}, _IN_GATE, n_layers=1),
    _Case("bailing_hybrid", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE),
    _Case("axk1", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE, n_layers=1),
    _Case("axk2", _scaled(_GROUPED_RULE), _SCALED | _GROUPED, _IN_GATE, n_layers=1),
    _Case("dots3_note_text", _scaled(_SIGMOID), _SCALED | {"n_group": 1, "topk_group": 1}, _IN_GATE, n_layers=1),
    _Case(
        "mimo_v2_flash",
        _scaled(_GROUPED_RULE),
        _SCALED | _GROUPED | {"num_attention_heads": 8, "rope_parameters": _WHOLE},
        _IN_GATE,
        n_layers=1,
    ),
    _Case("minimax_m3_vl_text", Routing(Score.SIGMOID, True), modules=_IN_GATE),
    _Case(
        "mistral_large4_text",
        _scaled(replace(_GROUPED_RULE, score=Score.SOFTMAX, has_selection_bias=False)),
        _SCALED | _GROUPED,
    ),
    _Case("cohere2_moe", Routing(Score.SIGMOID), {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}),
    _Case("cohere2_moe", _OF_CHOSEN, {"expert_selection_fn": "softmax"}),
    _Case("flint", Routing(Score.SIGMOID), {"mlp_only_layers": []}),
    _Case("beam", _GROUPED_RULE, _GROUPED | {"mlp_layer_types": ["sparse", "sparse"]}, _IN_GATE),
    _Case("qwen3_vl_moe_text", Routing()),
    _Case("qwen4_exp_text", Routing(), {"norm_topk_prob": True}),
    _Case("aria_text", _OF_CHOSEN, modules={"router_module": "mlp.router"}),
    _Case("openai_privacy_filter", _scaled(_OF_CHOSEN, 1 / 3), modules={"router_module": "mlp.router"}),
)

_OTHERS = {
    "phimoe": "sparsemixer: each weight is a softmax over the experts close to the largest, of those not chosen before",
    "kolibri1": "the selection bias is added to logits, while a sigmoid of these without it gives the weights",
    "laguna": "a soft cap on logits",
    "muse_spark": "a factor of logits",
    "deepseek_v4": "scores are the square root of a softplus; some layers choose by token number",
    "inkling": "shared experts are routed with the others, and share their normalisation",
    "inkling2": "scores are the square root of a softplus",
    "zaya": "the router is a network, with a state of its own; one expert is a skip",
    "dbrx": "weights are divided by a norm, not by their sum",
    "longcat_flash": "some of the experts that are chosen do nothing",
    "llama4": "all experts are called with inputs that were multiplied by their weights",
    "jetmoe": "attention has experts, too, and experts are called otherwise",
    "nllb_moe": "experts have a capacity",
    "switch_transformers": "experts have a capacity",
    "deepseek_ocr2": "deepseek_v2's router in a model of images",
    "unlimited_ocr": "deepseek_v2's router in a model of images",
    "diffusion_gemma": "gemma4's router in a model of images",
    "ernie4_5_vl_moe": "ernie4_5_moe's router in a model of images, once for text and once for images",
    "glm4v_moe": "glm4_moe's router in a model of images",
    "glm5_next": "glm4_moe's router in a model of images",
    "mistral4": "mistral_large4's router in a model of images",
    "qwen3_omni_moe": "qwen3_moe's router in a model of speech",
    "step3p7": "minimax_m3_vl's router in a model of images",
}
"""Families whose rule is another, or whose router is tested with another family, by transformers' package."""

_IDS = [f"{case.model_type}-{number}" for number, case in enumerate(_CASES)]


@pytest.fixture(scope="module", params=_CASES, ids=_IDS)
def case(request: pytest.FixtureRequest) -> _Case:
    found: _Case = request.param
    return found


@pytest.fixture(scope="module")
def model(case: _Case) -> nn.Module:
    return tiny_model(case.model_type, **case.settings)


@pytest.fixture(scope="module")
def calls(model: nn.Module, case: _Case) -> list[RoutedCall]:
    """One call for each layer with experts."""
    return _calls(model, case.routed())


def _layers(model: nn.Module, routed: Routed) -> list[nn.Module]:
    """The decoder layers that have experts."""
    end = f".{routed.experts_module}"
    names = [name.removesuffix(end) for name, _ in model.named_modules() if name.endswith(end)]
    return [model.get_submodule(name) for name in names]


def _run(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=tokens, use_cache=False)[0]
    return output


def _calls(model: nn.Module, routed: Routed) -> list[RoutedCall]:
    calls: list[RoutedCall] = []
    with ExitStack() as stack:
        for layer in _layers(model, routed):
            stack.enter_context(watching(layer, routed, calls.append))
        _run(model)
    return calls


def _numpy(values: torch.Tensor | None) -> npt.NDArray[np.float32] | None:
    return None if values is None else values.detach().numpy()


def test_the_definition_is_what_transformers_does(case: _Case, calls: list[RoutedCall]) -> None:
    assert len(calls) == case.n_layers
    for call in calls:
        logits_TE, chosen_TK = call.logits_TE.numpy(), call.chosen_TK.numpy()
        found_TK = case.routing.choose(logits_TE, 3, _numpy(call.bias_E))
        np.testing.assert_array_equal(np.sort(found_TK), np.sort(chosen_TK))
        weights_TK = case.routing.weights(logits_TE, chosen_TK, _numpy(call.scale_E))
        np.testing.assert_allclose(weights_TK, call.weights_TK.numpy(), rtol=_SAME, atol=_SAME)


def test_the_torch_form_is_what_transformers_does(case: _Case, calls: list[RoutedCall]) -> None:
    for call in calls:
        found_TK = case.routing.torch_choose(call.logits_TE, 3, call.bias_E)
        assert torch.equal(found_TK.sort().values, call.chosen_TK.sort().values)
        weights_TK = case.routing.torch_weights(call.logits_TE, call.chosen_TK, call.scale_E)
        torch.testing.assert_close(weights_TK, call.weights_TK, rtol=_SAME, atol=_SAME)


def test_a_choice_of_our_own_gives_the_same_model(case: _Case, model: nn.Module, calls: list[RoutedCall]) -> None:
    """Choosing again by the rule changes nothing, so weights follow from choices as in transformers."""
    routed, expected = case.routed(), _run(model)
    with ExitStack() as stack:
        for layer, call in zip(_layers(model, routed), calls, strict=True):
            choose = partial(case.routing.torch_choose, top_k=3, bias_E=call.bias_E)
            stack.enter_context(rerouting(layer, routed, choose))
        torch.testing.assert_close(_run(model), expected, rtol=1e-4, atol=1e-5)


def test_experts_are_chosen_in_the_order_of_their_selection_scores(case: _Case, calls: list[RoutedCall]) -> None:
    for call in calls:
        scores_TE = case.routing.selection_scores(call.logits_TE.numpy(), _numpy(call.bias_E))
        by_torch_TE = case.routing.torch_selection_scores(call.logits_TE, call.bias_E)
        np.testing.assert_allclose(scores_TE, by_torch_TE.numpy(), rtol=_SAME, atol=_SAME)
        largest_TK = np.argsort(-scores_TE, axis=1)[:, :3]
        np.testing.assert_array_equal(np.sort(largest_TK), np.sort(call.chosen_TK.numpy()))
        assert (selection_margins(scores_TE, 3) > 0).all()


def test_every_family_of_transformers_has_a_case_or_a_reason() -> None:
    folder = Path(transformers.__file__).parent / "models"
    defines_experts = re.compile(r"^class \w+Experts\(", re.MULTILINE)
    found = {path.parent.name for path in folder.glob("*/modeling_*.py") if defines_experts.search(path.read_text())}
    tested = {_package(case.model_type) for case in _CASES}
    assert found <= tested | set(_OTHERS)
    assert not tested & set(_OTHERS)


def _package(model_type: str) -> str:
    return CONFIG_MAPPING[model_type].__module__.split(".")[-2]


def test_no_rule_is_phimoes() -> None:
    (call, *_) = _calls(tiny_model("phimoe"), Routed(8, 2, 48, _RAW, router_module="mlp.router"))
    for routing in (Routing(), _RAW, _OF_CHOSEN, Routing(Score.SIGMOID), Routing(Score.SIGMOID, normalizes=False)):
        weights_TK = routing.torch_weights(call.logits_TE, call.chosen_TK)
        assert (weights_TK - call.weights_TK).abs().max() > 0.05


_LOGITS_TE = np.array([[2.0, 1.0, 0.0, -1.0]], np.float32)
_ALL_TK = np.arange(4)[None]


def test_the_best_group_may_leave_out_the_best_expert() -> None:
    logits_TE = np.array([[3.0, -9.0, 2.0, 1.9]], np.float32)
    groups = Routing(Score.SIGMOID, n_groups=2, n_chosen_groups=1)
    assert groups.choose(logits_TE, 2).tolist() == [[2, 3]]
    assert replace(groups, group_score=GroupScore.BEST).choose(logits_TE, 2).tolist() == [[0, 1]]
    assert groups.selection_scores(logits_TE)[0, :2].tolist() == [-np.inf, -np.inf]


def test_a_selection_bias_is_for_the_choice_only() -> None:
    routing = Routing(Score.SIGMOID, has_selection_bias=True, normalizes=False)
    bias_E = np.array([0, 0, 0, 1], np.float32)
    chosen_TK = routing.choose(_LOGITS_TE, 2, bias_E)
    assert chosen_TK.tolist() == [[3, 0]]
    np.testing.assert_allclose(routing.weights(_LOGITS_TE, chosen_TK), 1 / (1 + np.exp([[1.0, -2.0]])), rtol=1e-6)
    with pytest.raises(AssertionError, match="selection bias"):
        routing.choose(_LOGITS_TE, 2)


@pytest.mark.parametrize(("epsilon", "least_sum", "total"), [(0.5, 0.0, 4.5), (0.0, 8.0, 8.0), (0.0, 2.0, 4.0)])
def test_sums_are_kept_from_zero(epsilon: float, least_sum: float, total: float) -> None:
    """The scores of four large logits are 1 each."""
    routing = Routing(Score.SIGMOID, epsilon=epsilon, least_sum=least_sum)
    logits_TE = np.full((1, 4), 50, np.float32)
    np.testing.assert_allclose(routing.weights(logits_TE, _ALL_TK), np.full((1, 4), 1 / total), rtol=1e-6)
    by_torch = routing.torch_weights(torch.from_numpy(logits_TE), torch.from_numpy(_ALL_TK))
    np.testing.assert_allclose(by_torch.numpy(), np.full((1, 4), 1 / total), rtol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    logits_TE = np.array([[-200.0, 200.0]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        weights_TK = Routing(Score.SIGMOID, normalizes=False).weights(logits_TE, np.array([[0, 1]]))
    assert weights_TK.tolist() == [[0.0, 1.0]]


def test_gradients_reach_logits_and_scales() -> None:
    logits_TE, scale_E = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    chosen_TK = torch.tensor([[0, 3, 5]]).expand(5, -1)
    for score in Score:
        routing = Routing(score, has_expert_scale=True, epsilon=1e-3, scale=2.0)
        weigh = partial(routing.torch_weights, chosen_TK=chosen_TK)
        inputs = (logits_TE.clone().requires_grad_(), scale_E.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda logits, scale, weigh=weigh: weigh(logits, scale_E=scale), inputs)


def test_a_rule_is_said_in_words() -> None:
    assert Routing().description == "softmax over all experts, weights normalised"
    assert _OF_CHOSEN.description == "softmax over the chosen experts"
    assert _scaled(_GROUPED_RULE).description == (
        "sigmoid, weights normalised, a bias for the choice, the best 2 of 4 groups by the sum of the best two of each, "
        "weights times 2.5"
    )
    assert Routing(has_expert_scale=True).description.endswith("weights times a scale of each expert")
