"""Other choices of experts than the top-k: against stock transformers, and against loops by the definition."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compressors.model.config.reading import read_spec
from compressors.model.running.expert_choice import AllExperts, ExpertChoice, choosing
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from compressors.recover.knowledge_augmentation import AllButOne


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[: 5 * 24].reshape(5, 24))


def _keys(n: int) -> list[tuple[int, ...]]:
    return [(7, text) for text in range(n)]


@pytest.mark.parametrize("without", [0, 1], ids=["all experts", "all but the least probable"])
def test_logits_are_those_of_the_model_with_a_larger_top_k(
    family_folder: Path, blocks_BT: torch.Tensor, without: int
) -> None:
    """OLMoE among them, whose gates are not normalised."""
    student = Student.teacher(open_source(family_folder))
    n_experts = student.spec.n_experts
    choice: ExpertChoice = AllButOne(n_experts, 24, _keys(5), 0.0) if without else AllExperts(n_experts)
    model = StreamedModel(student, choice=choice)
    (hidden,) = model.stream([TokenGroup(blocks_BT)])
    found = torch.cat([logits for _, logits in model.logits_in_chunks(hidden, slice(0, 24))])

    stock = AutoModelForCausalLM.from_pretrained(
        family_folder, dtype=torch.float32, num_experts_per_tok=n_experts - without
    )
    with torch.no_grad():
        expected = stock(blocks_BT, use_cache=False).logits.flatten(0, 1)
    assert stock.model.layers[0].mlp.gate.top_k == n_experts - without
    assert (found - expected).norm() < 1e-4 * expected.norm()
    model.choice = None
    (hidden,) = model.stream([TokenGroup(blocks_BT)])
    plain = torch.cat([logits for _, logits in model.logits_in_chunks(hidden, slice(0, 24))])
    assert (found - plain).norm() > 1e-2 * plain.norm()


class _Router(nn.Module):
    """A router whose logits are what it is given; its own choice is of no interest."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.weight = torch.eye(n_experts)

    def forward(self, logits_TE: torch.Tensor) -> torch.Tensor:
        return logits_TE


class _Experts(nn.Module):
    """Returns what it is called with."""

    def forward(self, *call: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return call


def _route(
    folder: Path, choice: ExpertChoice, parts: list[torch.Tensor], layer: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and experts of all parts, which run one after the other."""
    described = read_spec(folder).layers[0]
    module = nn.Module()
    module.mlp = nn.Module()
    module.mlp.gate = _Router(parts[0].shape[1])
    module.mlp.experts = _Experts()

    def run(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return module.mlp.experts(module.mlp.gate(part), part, part)  # type: ignore[no-any-return]

    with choosing(choice, described, layer, module):
        routed = [run(part) for part in parts]
    assert run(parts[0])[1] is parts[0]  # afterwards the router chooses for itself again
    return torch.cat([gates for _, _, gates in routed]), torch.cat([chosen for _, chosen, _ in routed])


@pytest.mark.parametrize("model", ["coarse_folder", "olmoe_folder"])
def test_augmented_gates_equal_a_loop_by_the_definition(request: pytest.FixtureRequest, model: str) -> None:
    folder = request.getfixturevalue(model)
    spec = read_spec(folder)
    n_experts, n_tokens, augmentation = spec.n_experts, 50, 0.3
    logits_TE = torch.randn(4 * n_tokens, n_experts, generator=torch.Generator().manual_seed(0))
    choice = AllButOne(n_experts, n_tokens, _keys(4), augmentation)
    gates_TK, chosen_TK = _route(folder, choice, [logits_TE[:50], logits_TE[50:]])

    n_sampled = 0
    for text, key in enumerate(_keys(4)):
        generator = np.random.default_rng((*key, 3))
        augmented = generator.random(n_tokens) < augmentation
        noise = iter(generator.gumbel(size=(augmented.sum(), n_experts)))
        for place in range(n_tokens):
            token = text * n_tokens + place
            scores = logits_TE[token].double().numpy()
            if augmented[place]:
                n_sampled += 1
                scores = scores + next(noise)
            kept = sorted(range(n_experts), key=lambda expert, scores=scores: -scores[expert])[: n_experts - 1]
            weights = {expert: np.exp(float(logits_TE[token, expert])) for expert in kept}
            everything = kept if spec.layers[0].routed.routing.normalizes else range(n_experts)
            total = sum(np.exp(float(logits_TE[token, expert])) for expert in everything)
            found = dict(zip(chosen_TK[token].tolist(), gates_TK[token].tolist(), strict=True))
            assert found == pytest.approx({expert: weight / total for expert, weight in weights.items()}, rel=1e-5)
    assert 30 < n_sampled < 90


def test_sampling_leaves_an_expert_out_as_often_as_sampling_one_by_one_does(coarse_folder: Path) -> None:
    """Without replacement, in proportion to the gates: the exact probability, over all orders of four experts."""
    logits = torch.tensor([1.2, 0.0, -0.4, 0.7])
    gates, n_tokens = logits.softmax(0).tolist(), 2000
    expected = dict.fromkeys(range(4), 0.0)
    for order in permutations(range(4)):
        probability, rest = 1.0, 1.0
        for expert in order:
            probability, rest = probability * gates[expert] / rest, rest - gates[expert]
        expected[order[-1]] += probability
    choice = AllButOne(4, n_tokens, _keys(20), 1.0)
    _, chosen_TK = _route(coarse_folder, choice, [logits.repeat(20 * n_tokens, 1)])
    left_out = 6 - chosen_TK.sum(-1)
    found = (left_out[:, None] == torch.arange(4)).float().mean(0)
    assert found.tolist() == pytest.approx(list(expected.values()), abs=4 * (0.25 / len(left_out)) ** 0.5)


def test_the_draws_differ_between_texts_and_layers(coarse_folder: Path) -> None:
    logits = torch.zeros(200, 8)
    choices = {
        (text, layer): _route(coarse_folder, AllButOne(8, 200, [(7, text)], 1.0), [logits], layer)[1]
        for text in (0, 1)
        for layer in (0, 1)
    }
    for key, chosen in choices.items():
        same = [(chosen == other).all(-1).float().mean() for at, other in choices.items() if at != key]
        assert max(same) < 0.3


def test_gradients_reach_the_router_through_every_gate(coarse_folder: Path) -> None:
    logits_TE = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    (gates_TK, chosen_TK) = _route(coarse_folder, AllExperts(8), [logits_TE])
    weights = torch.arange(48.0).view(6, 8)
    (gradient,) = torch.autograd.grad((gates_TK * weights.gather(-1, chosen_TK)).sum(), logits_TE)
    (expected,) = torch.autograd.grad((logits_TE.softmax(-1) * weights).sum(), logits_TE)
    torch.testing.assert_close(gradient, expected)


def test_fewer_blocks_run_at_once_when_tokens_use_more_experts(
    toy_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = StreamedModel(Student.teacher(open_source(toy_checkpoint(tmp_path))))
    assert model.blocks_at_once(torch.float32) == 8
    model.choice = AllExperts(32)
    assert model.blocks_at_once(torch.float32) == 1
