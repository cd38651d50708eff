"""Training by a live teacher (KA and SAR): it minimises the right loss, resumes to the bit, and helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compressors.model.description.feed_forward import Routed
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing, Score
from compressors.model.errors import UnsupportedError
from compressors.model.files.weight_file import StoredTensors
from compressors.model.predictions.losses import reverse_kl_divergence
from compressors.model.predictions.next_token import random_numbers
from compressors.model.running.expert_choice import AllExperts
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.recover.knowledge_augmentation import KnowledgeAugmentation
from compressors.recover.on_policy import OnPolicyDistillation
from compressors.recover.sampling import sample_texts
from compressors.recover.schedule import Schedule
from compressors.recover.scopes import Scope
from compressors.recover.student_aware_router import StudentAwareRouter
from compressors.recover.training import Training, train

_N_TOKENS = 24
_OBJECTIVES: list[type[KnowledgeAugmentation] | type[StudentAwareRouter]] = [KnowledgeAugmentation, StudentAwareRouter]


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[: 64 * _N_TOKENS].reshape(64, _N_TOKENS))


@pytest.fixture(scope="module")
def dense(float32_toy: Source) -> Student:
    """One expert a layer: the first four, side by side, a quarter of each."""
    teacher, overlay = Student.teacher(float32_toy), {}
    experts = ExpertMap(32, tuple(LayerMap(layer, ((0, 1, 2, 3),), 512) for layer in (0, 1)))
    for layer in (0, 1):
        for role, dim, scale in ((Role.EXPERT_GATE, 0, 1), (Role.EXPERT_UP, 0, 1), (Role.EXPERT_DOWN, 1, 0.25)):
            matrices = [teacher.expert(role, layer, expert) for expert in range(4)]
            overlay[teacher.name(role, layer, 0)] = torch.cat(matrices, dim=dim) * scale
    return Student(float32_toy, experts, overlay)


def _schedule(objective: type[OnPolicyDistillation], n_blocks: int, rate: float = 1e-3, per_step: int = 2) -> Schedule:
    updates = 2 if objective is KnowledgeAugmentation else 1
    return Schedule(n_blocks, rate, blocks_per_step=per_step, seed=11, updates_per_batch=updates)


def _log_probs(model: StreamedModel, texts_BT: torch.Tensor) -> torch.Tensor:
    (hidden,) = model.stream([TokenGroup(texts_BT)])
    logits = [part for _, part in model.logits_in_chunks(hidden, slice(_N_TOKENS // 2 - 1, _N_TOKENS - 1))]
    return functional.log_softmax(torch.cat(logits).detach(), dim=-1)


def _own_texts(student: Student, blocks_BT: torch.Tensor) -> torch.Tensor:
    """Continuations of held-out prompts, with numbers that training did not use."""
    uniform = torch.stack([random_numbers((99, text), _N_TOKENS // 2) for text in range(len(blocks_BT))])
    return sample_texts(StreamedModel(student), blocks_BT[:, : _N_TOKENS // 2], uniform)


def test_reverse_divergence_and_its_gradients_equal_a_direct_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(5, 50, generator=generator) for _ in range(2))
    logits[0, 7] = -300.0  # its probability is no longer a float32
    leaves, direct = [[tensor.clone().requires_grad_() for tensor in (logits, teacher)] for _ in range(2)]
    weights = torch.rand(5, generator=generator)
    found = reverse_kl_divergence(*leaves)
    student_log, teacher_log = (leaf.double().log_softmax(-1) for leaf in direct)
    expected = (student_log.exp() * (student_log - teacher_log)).sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), direct),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_the_first_loss_is_the_divergence_from_the_teacher_on_the_student_s_texts(
    float32_toy: Source, pruned_toy: Student, blocks_BT: torch.Tensor
) -> None:
    """Without augmentation the teacher is stock transformers with the top-k one below the number of experts."""
    settings = _schedule(KnowledgeAugmentation, 12, per_step=10)  # the second step has two blocks
    objective = KnowledgeAugmentation(pruned_toy, settings, augmentation=0.0)
    training = Training(pruned_toy, blocks_BT, objective, settings)
    found = training.step()
    first = settings.steps()[0]
    texts = training.state()["objective.texts"]
    assert torch.equal(texts[:, : _N_TOKENS // 2], blocks_BT[first, : _N_TOKENS // 2])
    uniform = torch.stack([random_numbers((0, 11, 0, place), _N_TOKENS // 2) for place in range(10)])
    assert torch.equal(texts, sample_texts(StreamedModel(pruned_toy), blocks_BT[first, : _N_TOKENS // 2], uniform))

    stock = AutoModelForCausalLM.from_pretrained(float32_toy.path, dtype=torch.float32, num_experts_per_tok=31)
    with torch.no_grad():
        logits_BTV = stock(texts, use_cache=False).logits[:, _N_TOKENS // 2 - 1 : -1]
    student_log = _log_probs(StreamedModel(pruned_toy), texts)
    expected = functional.kl_div(
        functional.log_softmax(logits_BTV.flatten(0, 1), dim=-1), student_log, log_target=True, reduction="none"
    )
    assert found == pytest.approx(expected.sum(-1).mean().item(), rel=1e-4)
    assert training.settings.n_steps == 4


@pytest.mark.parametrize("objective", _OBJECTIVES)
def test_runs_are_the_same_bits_interrupted_or_not(
    pruned_toy: Student, blocks_BT: torch.Tensor, tmp_path: Path, objective: type[KnowledgeAugmentation]
) -> None:
    """Interrupted after every step: between the updates of a batch, in a round, and between rounds, the last of
    which is shorter and has a smaller batch."""
    settings = _schedule(objective, 5)

    def training() -> Training:
        return Training(pruned_toy, blocks_BT, objective(pruned_toy, settings, batches_per_round=2), settings)

    def save(training: Training) -> None:
        save_file(training.state(), tmp_path / f"{training.n_done}.safetensors")

    expected = training()
    train(expected, after_step=save)
    final = expected.state()
    assert settings.n_steps == 3 * settings.updates_per_batch
    for n_done in range(1, settings.n_steps):
        resumed = training()
        resumed.restore(StoredTensors(tmp_path / f"{n_done}.safetensors"))
        train(resumed)
        for name, tensor in resumed.state().items():
            assert torch.equal(tensor, final[name]), (n_done, name)


@pytest.mark.parametrize("objective", _OBJECTIVES)
def test_memory_limit_changes_no_bit(
    pruned_toy: Student, blocks_BT: torch.Tensor, tmp_path: Path, objective: type[KnowledgeAugmentation]
) -> None:
    settings = _schedule(objective, 2)
    states = []
    for limit in (None, MemoryLimit(10**12, tmp_path)):
        training = Training(pruned_toy, blocks_BT, objective(pruned_toy, settings, limit=limit), settings, limit=limit)
        train(training)
        states.append(training.state())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])


@pytest.mark.parametrize(
    ("which", "scope", "objective"),
    [
        ("pruned_toy", Scope.routers(), KnowledgeAugmentation),
        ("pruned_toy", Scope.routers(), StudentAwareRouter),
        ("dense", Scope.adapters(16), KnowledgeAugmentation),
        ("dense", Scope.all_experts(), StudentAwareRouter),
    ],
)
def test_the_student_comes_nearer_where_it_goes(
    request: pytest.FixtureRequest,
    blocks_BT: torch.Tensor,
    which: str,
    scope: Scope,
    objective: type[KnowledgeAugmentation],
) -> None:
    """Reverse divergence from the teacher with all experts on, where the student went from held-out prompts."""
    student: Student = request.getfixturevalue(which)
    settings = _schedule(objective, 48, rate=2e-3, per_step=8)
    rounds = objective(student, settings, batches_per_round=3)
    taught = train(Training(student, blocks_BT, rounds, settings, scope=scope))
    teacher = StreamedModel(Student.teacher(student.source), choice=AllExperts(32))
    texts_BT = _own_texts(student, blocks_BT[48:])
    wanted = _log_probs(teacher, texts_BT)
    before, after = (_log_probs(StreamedModel(model), texts_BT) for model in (student, taught))
    divergences = [(mine.exp() * (mine - wanted)).sum(-1).mean().item() for mine in (before, after)]
    assert divergences[1] < 0.97 * divergences[0], divergences


def test_a_student_with_a_head_of_its_own_is_refused(pruned_toy: Student) -> None:
    name = pruned_toy.name(Role.TOKEN_EMBEDDING)
    changed = pruned_toy.with_overlay({name: pruned_toy.tensor(Role.TOKEN_EMBEDDING) * 1.01})
    with pytest.raises(UnsupportedError, match="no longer the teacher's in this student"):
        KnowledgeAugmentation(changed, _schedule(KnowledgeAugmentation, 4))


@pytest.mark.parametrize("objective", _OBJECTIVES)
def test_a_teacher_whose_routers_give_no_probabilities_is_refused(
    objective: type[OnPolicyDistillation], float32_toy: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = float32_toy.spec.layers
    assert isinstance(second.feed_forward, Routed)
    sigmoid = replace(second, feed_forward=replace(second.feed_forward, routing=Routing(Score.SIGMOID)))
    monkeypatch.setattr(float32_toy, "spec", replace(float32_toy.spec, layers=(first, sigmoid)))
    with pytest.raises(UnsupportedError, match="layer 1 has sigmoids"):
        objective(Student.teacher(float32_toy), _schedule(objective, 4))  # type: ignore[call-arg]
