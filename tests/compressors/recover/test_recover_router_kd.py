"""Router KD: the loss by its equation, the schedule as published, training against stock torch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compressors.calibration.teacher import TeacherTargets, write_log_probs, write_targets
from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.files.weight_file import StoredTensors
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.predictions.losses import kl_divergence, kl_divergence_to_top
from compressors.model.running.expert_choice import AllExperts
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.recover.divergence import judge
from compressors.recover.objectives import Distillation
from compressors.recover.schedule import Schedule
from compressors.recover.training import Training, train


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[: 48 * 64].reshape(48, 64))


@pytest.fixture(scope="module")
def teacher(fine_folder: Path) -> Student:
    return Student.teacher(open_source(fine_folder))


@pytest.fixture(scope="module")
def pruned(teacher: Student) -> Student:
    return Student(teacher.source, ExpertMap.keeping(32, (tuple(range(0, 32, 2)),) * teacher.spec.n_layers))


@pytest.fixture(scope="module")
def targets(teacher: Student, blocks_BT: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> TeacherTargets:
    model = StreamedModel(teacher)
    (hidden,) = model.stream([TokenGroup(blocks_BT)])
    targets = TeacherTargets.create(tmp_path_factory.mktemp("targets"), blocks_BT.numel(), model.spec.vocab_size)
    write_targets(model, hidden, targets, range(len(blocks_BT)))
    return targets


def _write_log_probs(teacher: Student, blocks_BT: torch.Tensor, scored: slice, folder: Path) -> torch.Tensor:
    model = StreamedModel(teacher)
    (hidden,) = model.stream([TokenGroup(blocks_BT)])
    writer = LogProbWriter(folder, len(blocks_BT) * (scored.stop - scored.start), model.spec.vocab_size)
    return write_log_probs(model, blocks_BT, hidden, scored, writer, range(len(blocks_BT)))


def test_full_divergence_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 5, 40, generator=generator)
    p, q = teacher.softmax(-1).double(), student.softmax(-1).double()
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(kl_divergence(teacher.log_softmax(-1), student).double(), expected, rtol=1e-5, atol=0)


def test_divergence_to_top_is_that_of_the_merged_distributions() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, student = torch.randn(2, 5, 40, generator=generator) * 3
    best = teacher.log_softmax(-1).topk(8)

    def merged(logits: torch.Tensor) -> torch.Tensor:
        top = logits.softmax(-1).double().gather(-1, best.indices)
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)

    p, q = merged(teacher), merged(student)
    expected = (p * (p / q).log()).sum(-1)
    found = kl_divergence_to_top(best.values, best.indices, student)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert (found <= kl_divergence(teacher.log_softmax(-1), student) + 1e-6).all()


def test_targets_hold_the_teacher_s_best_tokens(
    fine_folder: Path, targets: TeacherTargets, blocks_BT: torch.Tensor
) -> None:
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(fine_folder, dtype=torch.float32)(blocks_BT[:2]).logits
    best = logits.log_softmax(-1).topk(64)
    log_probs, tokens = targets.of_blocks([0, 1], 64)
    torch.testing.assert_close(log_probs, best.values.flatten(0, 1), rtol=0, atol=1e-4)
    assert (tokens[:, :8] == best.indices.flatten(0, 1)[:, :8]).float().mean() > 0.999
    assert torch.equal(targets.of_blocks([1], 64)[1], tokens[64:])


def test_log_probs_in_16_bits_are_exact_enough(teacher: Student, blocks_BT: torch.Tensor, tmp_path: Path) -> None:
    scored = slice(32, 63)
    likelihoods = _write_log_probs(teacher, blocks_BT[:2], scored, tmp_path / "teacher")
    model = StreamedModel(teacher)
    (hidden,) = model.stream([TokenGroup(blocks_BT[:2])])
    with torch.no_grad():
        expected = torch.cat([logits for _, logits in model.logits_in_chunks(hidden, scored)]).log_softmax(-1)
    reader = LogProbReader(tmp_path / "teacher")
    decoded = reader.rows(0, len(reader))
    near = expected > expected.amax(-1, keepdim=True) - 15.99  # the last step below may round to impossible
    assert (decoded - expected)[near].abs().max() <= 16 / 65535 / 2 + 1e-5
    assert (decoded[expected < expected.amax(-1, keepdim=True) - 16.01] == -torch.inf).all()
    following = blocks_BT[:2, 33:64].flatten()
    torch.testing.assert_close(likelihoods, -expected.gather(-1, following[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert abs(judge(teacher, blocks_BT[:2], reader, scored).divergence) < 1e-6


def test_a_student_is_judged_with_another_choice_of_experts(
    teacher: Student, blocks_BT: torch.Tensor, tmp_path: Path
) -> None:
    tokens_BT, scored = blocks_BT[:2], slice(32, 63)
    _write_log_probs(teacher, tokens_BT, scored, tmp_path / "teacher")
    with torch.no_grad():
        known, found = (
            torch.cat([logits for _, logits in model.logits_in_chunks(*model.stream([TokenGroup(tokens_BT)]), scored)])
            for model in (StreamedModel(teacher), StreamedModel(teacher, choice=AllExperts(32)))
        )
    expected = functional.kl_div(
        found.log_softmax(-1), known.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()
    judged = judge(teacher, tokens_BT, LogProbReader(tmp_path / "teacher"), scored, choice=AllExperts(32))
    assert expected > 0.1
    assert judged.divergence == pytest.approx(expected, rel=1e-3)
    assert judged.perplexity == pytest.approx(
        functional.cross_entropy(found, tokens_BT[:, 33:64].flatten()).exp().item(), rel=1e-4
    )


def test_schedule_is_the_published_one() -> None:
    settings = Schedule.published()
    assert (settings.n_blocks, settings.n_steps, settings.learning_rate) == (3000, 375, 5e-5)
    rates = [settings.rate_at(step) for step in range(settings.n_steps)]
    warmup = math.ceil(0.03 * 375)
    assert rates.index(max(rates)) in (warmup - 1, warmup)
    assert max(rates) == pytest.approx(5e-5)
    assert np.all(np.diff(rates[warmup:]) < 0)
    assert 0 < rates[-1] < 5e-5 / 300


def test_training_equals_stock_torch_with_adamw(
    fine_folder: Path, pruned: Student, blocks_BT: torch.Tensor, targets: TeacherTargets
) -> None:
    settings = Schedule(n_blocks=6, learning_rate=1e-3, blocks_per_step=2, seed=3)
    taught = train(Training(pruned, blocks_BT, Distillation(targets, pruned), settings))
    expected = _train_with_autograd(fine_folder, pruned, blocks_BT, targets, settings)
    for layer, weight in enumerate(expected):
        before = pruned.tensor(Role.ROUTER, layer).float()
        moved = taught.tensor(Role.ROUTER, layer) - before
        assert (moved - (weight - before)).norm() / moved.norm() < 0.02
        assert taught.tensor(Role.ROUTER, layer).dtype == torch.float32


def _train_with_autograd(
    folder: Path, student: Student, blocks_BT: torch.Tensor, targets: TeacherTargets, settings: Schedule
) -> list[torch.Tensor]:
    """The same schedule on a whole stock model, with autograd's gradients and the loss written out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    routers = []
    for layer, module in enumerate(model.model.layers):
        kept = list(student.experts.kept[layer])
        module.mlp.gate.weight = torch.nn.Parameter(module.mlp.gate.weight[kept].clone())
        routers.append(module.mlp.gate.weight)
        experts = module.mlp.experts
        experts.num_experts = module.mlp.gate.num_experts = len(kept)
        experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[kept], requires_grad=False)
        experts.down_proj = torch.nn.Parameter(experts.down_proj[kept], requires_grad=False)
    optimizer = torch.optim.AdamW(routers, weight_decay=0.0)
    order = torch.randperm(settings.n_blocks, generator=torch.Generator().manual_seed(settings.seed))
    for step, chosen in enumerate(order.split(settings.blocks_per_step)):
        optimizer.param_groups[0]["lr"] = settings.rate_at(step)
        log_q = functional.log_softmax(model(blocks_BT[chosen]).logits, dim=-1)
        log_probs, top = (found.unflatten(0, (len(chosen), 64)) for found in targets.of_blocks(chosen.tolist(), 64))
        p = log_probs.exp()
        q = log_q.exp().gather(-1, top)
        rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
        divergence = (p * (p / q).log()).sum(-1) + rest_p * (rest_p / rest_q).log()
        optimizer.zero_grad()
        divergence[:, :-1].mean().backward()
        torch.nn.utils.clip_grad_norm_(routers, 1.0)
        optimizer.step()
    return [router.detach() for router in routers]


def test_training_brings_the_student_nearer_and_is_deterministic(
    teacher: Student, pruned: Student, blocks_BT: torch.Tensor, targets: TeacherTargets, tmp_path: Path
) -> None:
    settings = Schedule(n_blocks=40, learning_rate=3e-3, seed=0)
    taught = train(Training(pruned, blocks_BT, Distillation(targets, pruned), settings))
    scarce = MemoryLimit(1, tmp_path / "spill")  # nothing fits: it decides where things lie, not what they are
    again = train(Training(pruned, blocks_BT, Distillation(targets, pruned), settings, limit=scarce))
    assert all(torch.equal(taught.overlay[name], again.overlay[name]) for name in taught.overlay)
    assert not list((tmp_path / "spill").iterdir())
    unseen, scored = blocks_BT[40:], slice(32, 63)
    _write_log_probs(teacher, unseen, scored, tmp_path / "teacher")
    reader = LogProbReader(tmp_path / "teacher")
    before = judge(pruned, unseen, reader, scored).divergence
    assert judge(taught, unseen, reader, scored).divergence < 0.95 * before


def test_only_layers_with_experts_are_taught_and_only_their_routers_are_handed_on(
    teacher: Student, blocks_BT: torch.Tensor, targets: TeacherTargets
) -> None:
    half = tuple((expert,) for expert in range(0, 32, 2))
    layers = (LayerMap(0, half), LayerMap(1, ()), LayerMap(3, half[:1]), LayerMap(5, half))
    student = Student(teacher.source, ExpertMap(32, layers))
    changed = student.name(Role.EXPERT_UP, 0, 3)
    merged = student.with_overlay({changed: student.expert(Role.EXPERT_UP, 0, 3) * 2})
    settings = Schedule(n_blocks=2, learning_rate=1e-3, blocks_per_step=2, seed=5)
    training = Training(merged, blocks_BT, Distillation(targets, merged), settings)
    taught = train(training)
    routers = {student.name(Role.ROUTER, layer) for layer in (0, 2, 3)}
    assert set(training.overlay()) == routers
    assert set(taught.overlay) == routers | {changed}
    for layer in (0, 3):
        assert not torch.equal(taught.tensor(Role.ROUTER, layer), student.tensor(Role.ROUTER, layer).float())


def test_too_little_text_is_refused(pruned: Student, blocks_BT: torch.Tensor, targets: TeacherTargets) -> None:
    with pytest.raises(InputError, match="49 blocks"):
        Training(pruned, blocks_BT, Distillation(targets, pruned), Schedule(n_blocks=49, learning_rate=1e-3))


def test_interrupted_training_goes_on_to_the_same_bits(
    pruned: Student, blocks_BT: torch.Tensor, targets: TeacherTargets, tmp_path: Path
) -> None:
    settings = Schedule(n_blocks=8, learning_rate=1e-3, blocks_per_step=2, seed=5)

    def save(training: Training) -> None:
        if training.n_done == 2:
            save_file(training.state(), tmp_path / "state.safetensors")

    expected = train(Training(pruned, blocks_BT, Distillation(targets, pruned), settings), after_step=save)
    resumed = Training(pruned, blocks_BT, Distillation(targets, pruned), settings)
    resumed.restore(StoredTensors(tmp_path / "state.safetensors"))
    assert resumed.n_done == 2
    taught = train(resumed)
    assert all(torch.equal(taught.overlay[name], expected.overlay[name]) for name in expected.overlay)


def test_training_in_bfloat16_moves_routers_the_same_way(
    pruned: Student, blocks_BT: torch.Tensor, targets: TeacherTargets
) -> None:
    settings = Schedule(n_blocks=2, learning_rate=1e-3, blocks_per_step=2, seed=5)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        training = Training(pruned, blocks_BT, Distillation(targets, pruned), settings, dtype=dtype)
        training.step()
        state = training.state()
        gradients.append(torch.cat([state[f"{layer}.router.exp_avg"].flatten() for layer in range(6)]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9
