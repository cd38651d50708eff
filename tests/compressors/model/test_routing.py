"""The rule of routing, in numpy and torch, against stock transformers: tiny random models of every family it has."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

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
from tests.compressors.model.moe_families import CASES, OTHERS, MoeCase, layers_with_experts
from tests.compressors.model.tiny_families import tiny_model

_SAME = 1e-6


_IDS = [f"{case.model_type}-{number}" for number, case in enumerate(CASES)]


@pytest.fixture(scope="module", params=CASES, ids=_IDS)
def case(request: pytest.FixtureRequest) -> MoeCase:
    found: MoeCase = request.param
    return found


@pytest.fixture(scope="module")
def model(case: MoeCase) -> nn.Module:
    return tiny_model(case.model_type, **case.settings)


@pytest.fixture(scope="module")
def calls(model: nn.Module, case: MoeCase) -> list[RoutedCall]:
    """One call for each layer with experts."""
    return _calls(model, case.routed())


def _run(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=tokens, use_cache=False)[0]
    return output


def _calls(model: nn.Module, routed: Routed) -> list[RoutedCall]:
    calls: list[RoutedCall] = []
    with ExitStack() as stack:
        for layer in layers_with_experts(model, routed):
            stack.enter_context(watching(layer, routed, calls.append))
        _run(model)
    return calls


def _numpy(values: torch.Tensor | None) -> npt.NDArray[np.float32] | None:
    return None if values is None else values.detach().numpy()


def test_the_definition_is_what_transformers_does(case: MoeCase, calls: list[RoutedCall]) -> None:
    assert len(calls) == case.n_layers
    for call in calls:
        logits_TE, chosen_TK = call.logits_TE.numpy(), call.chosen_TK.numpy()
        found_TK = case.routing.choose(logits_TE, 3, _numpy(call.bias_E))
        np.testing.assert_array_equal(np.sort(found_TK), np.sort(chosen_TK))
        weights_TK = case.routing.weights(logits_TE, chosen_TK, _numpy(call.scale_E))
        np.testing.assert_allclose(weights_TK, call.weights_TK.numpy(), rtol=_SAME, atol=_SAME)


def test_the_torch_form_is_what_transformers_does(case: MoeCase, calls: list[RoutedCall]) -> None:
    for call in calls:
        found_TK = case.routing.torch_choose(call.logits_TE, 3, call.bias_E)
        assert torch.equal(found_TK.sort().values, call.chosen_TK.sort().values)
        weights_TK = case.routing.torch_weights(call.logits_TE, call.chosen_TK, call.scale_E)
        torch.testing.assert_close(weights_TK, call.weights_TK, rtol=_SAME, atol=_SAME)


def test_a_choice_of_our_own_gives_the_same_model(case: MoeCase, model: nn.Module, calls: list[RoutedCall]) -> None:
    """Choosing again by the rule changes nothing, so weights follow from choices as in transformers."""
    routed, expected = case.routed(), _run(model)
    with ExitStack() as stack:
        for layer, call in zip(layers_with_experts(model, routed), calls, strict=True):
            choose = partial(case.routing.torch_choose, top_k=3, bias_E=call.bias_E)
            stack.enter_context(rerouting(layer, routed, choose))
        torch.testing.assert_close(_run(model), expected, rtol=1e-4, atol=1e-5)


def test_experts_are_chosen_in_the_order_of_their_selection_scores(case: MoeCase, calls: list[RoutedCall]) -> None:
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
    tested = {_package(case.model_type) for case in CASES}
    assert found <= tested | set(OTHERS)
    assert not tested & set(OTHERS)


def _package(model_type: str) -> str:
    return CONFIG_MAPPING[model_type].__module__.split(".")[-2]


def test_no_rule_is_phimoes() -> None:
    (call, *_) = _calls(
        tiny_model("phimoe"), Routed(8, 2, 48, Routing(), router_module="mlp.router", experts_module="mlp.experts")
    )
    for routing in (
        Routing(),
        Routing(normalizes=False),
        Routing(Score.LOGITS),
        Routing(Score.SIGMOID),
        Routing(Score.SIGMOID, normalizes=False),
    ):
        weights_TK = routing.torch_weights(call.logits_TE, call.chosen_TK)
        assert (weights_TK - call.weights_TK).abs().max() > 0.05


_LOGITS_TE = np.array([[2.0, 1.0, 0.0, -1.0]], np.float32)
_ALL_TK = np.arange(4)[None]


def test_the_best_group_may_leave_out_the_best_expert() -> None:
    logits_TE = np.array([[3.0, -9.0, 2.0, 1.9]], np.float32)
    groups = Routing(Score.SIGMOID, n_groups=2, group_score=GroupScore.BEST_TWO)
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
    assert Routing(Score.LOGITS).description == "softmax over the chosen experts"
    grouped = Routing(
        Score.SIGMOID,
        has_selection_bias=True,
        n_groups=4,
        n_chosen_groups=2,
        group_score=GroupScore.BEST_TWO,
        scale=2.5,
    )
    assert grouped.description == (
        "sigmoid, weights normalised, a bias for the choice, the best 2 of 4 groups by the sum of the best two "
        "of each, weights times 2.5"
    )
    assert Routing(has_expert_scale=True).description.endswith("weights times a scale of each expert")
