"""The first phase of SAR against torch autograd on stock transformers with every expert on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compressors.model.description.roles import Role
from compressors.model.running.expert_choice import AllExperts
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from compressors.recover.schedule import Schedule
from compressors.recover.scopes import Scope
from compressors.recover.student_aware_router import StudentAwareRouter, squared_variation, teacher_router_gradients
from compressors.recover.trained_student import TrainedStudent
from compressors.recover.training import Training


@pytest.fixture(scope="module", params=["fine", "coarse", "olmoe"])
def source(
    request: pytest.FixtureRequest, toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Source:
    return open_source(toy_checkpoint(tmp_path_factory.mktemp("toy"), n_layers=2, model=request.param))


@pytest.fixture(scope="module")
def texts_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    """More than a layer takes at once when every expert is on."""
    return torch.from_numpy(heldout_tokens[: 5 * 16].reshape(5, 16))


@pytest.mark.parametrize("balance", [0.01, 10.0], ids=["as published", "where balance rules"])
def test_gradients_equal_autograd_on_the_whole_model(source: Source, texts_BT: torch.Tensor, balance: float) -> None:
    n_experts = source.spec.n_experts
    student = Student(source, ExpertMap.keeping(n_experts, [range(n_experts // 2)] * 2))
    model = StreamedModel(student)
    (hidden,) = model.stream([TokenGroup(texts_BT)])
    trained = TrainedStudent(Student.teacher(source), Scope.routers())
    teacher = trained.streamed(None)
    teacher.choice = AllExperts(n_experts)
    total, gradients = teacher_router_gradients(teacher, texts_BT, hidden.read(slice(0, 5)), 5, balance)

    student_logits = torch.cat([logits for _, logits in model.logits_in_chunks(hidden, slice(7, 15))])
    stock = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, num_experts_per_tok=n_experts)
    seen: list[torch.Tensor] = []
    for layer in stock.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, outputs: seen.append(outputs[0]))
    logits = stock(texts_BT, use_cache=False).logits[:, 7:15].flatten(0, 1)
    expected = functional.kl_div(
        logits.log_softmax(-1), student_logits.detach().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1).mean()  # fmt: skip
    for logits_TE in seen:
        importance_E = logits_TE.softmax(-1).sum(0)
        expected = expected + balance * (importance_E.std(unbiased=False) / importance_E.mean()) ** 2
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-4)
    assert set(gradients) == {(Role.ROUTER, 0), (Role.ROUTER, 1)}
    for index, layer in enumerate(stock.model.layers):
        wanted = layer.mlp.gate.weight.grad
        assert (gradients[Role.ROUTER, index] - wanted).norm() < 1e-4 * wanted.norm()


def test_the_variation_and_its_slope_equal_the_definition() -> None:
    importance_E = torch.tensor([3.0, 1.0, 7.5, 0.2], dtype=torch.float64, requires_grad=True)
    expected = (importance_E.std(unbiased=False) / importance_E.mean()) ** 2
    expected.backward()
    value, slope_E = squared_variation(importance_E.detach())
    assert value == pytest.approx(expected.item())
    torch.testing.assert_close(slope_E, importance_E.grad)
    assert squared_variation(torch.full((4,), 2.0, dtype=torch.float64))[0] == pytest.approx(0.0)


def test_each_batch_moves_the_teacher_s_routers_by_a_step_of_adam(source: Source, texts_BT: torch.Tensor) -> None:
    n_experts = source.spec.n_experts
    student = Student(source, ExpertMap.keeping(n_experts, [range(n_experts // 2)] * 2))
    schedule = Schedule(4, 1e-4, blocks_per_step=2)
    objective = StudentAwareRouter(student, schedule, batches_per_round=2, router_learning_rate=1e-4)
    Training(student, texts_BT, objective, schedule).step()
    state = objective.state()
    assert state["router.0.step"] == 2  # one for each batch of the round
    for layer in (0, 1):
        router = Student.teacher(source).tensor(Role.ROUTER, layer).float()
        moved = (state[f"router.{layer}"] - router).abs()
        assert 1e-5 < moved.mean() < 2.1e-4
