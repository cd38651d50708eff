"""Every family with methods that change experts, and the experts' inputs that methods and writers use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compressors.calibration.layer_inputs import write_layer_inputs
from compressors.calibration.second_moments import SecondMoments
from compressors.calibration.statistics import StatisticsCollector
from compressors.model.description.roles import Role
from compressors.model.description.spec import NO_MOE, MoeSize
from compressors.model.errors import UnsupportedError
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from compressors.shrink.slim.width import SlimWidth
from exporter.writing.hf_checkpoint import write_checkpoint


@torch.no_grad()
def _logits(student: Student, tokens_BT: torch.Tensor) -> torch.Tensor:
    model = StreamedModel(student)
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    return torch.cat([part for _, part in model.logits_in_chunks(hidden, slice(0, tokens_BT.shape[1]))])


def _with_idle_neurons(source: Checkpoint, folder: Path) -> Checkpoint:
    """The same model, but half of each expert's neurons, another half in every expert, add nothing."""
    student = Student.teacher(source)
    overlay = {}
    for index, layer in enumerate(source.spec.layers):
        for expert in range(layer.n_experts):
            down_DF = student.expert(Role.EXPERT_DOWN, index, expert).clone()
            down_DF[:, expert % 2 :: 2] = 0
            overlay[student.name(Role.EXPERT_DOWN, index, expert)] = down_DF
    write_checkpoint(student.with_overlay(overlay), folder)
    return Checkpoint(folder)


@pytest.mark.parametrize("sequential", [False, True])
def test_narrower_experts_do_without_idle_neurons(
    folder: Path, blocks_BT: torch.Tensor, tmp_path: Path, sequential: bool
) -> None:
    """The others keep their weights and biases: nothing changes, in the streamed student and in the saved one."""
    source = _with_idle_neurons(Checkpoint(folder), tmp_path / "idle")
    collector = StatisticsCollector(source.spec)
    StreamedModel(Student.teacher(source)).stream([TokenGroup(blocks_BT, [collector.observe])])
    layers = source.spec.layers
    statistics = [collector.take(index) if layer.routed is not None else None for index, layer in enumerate(layers)]
    targets = [
        LayerTarget(index, NO_MOE)
        if layer.routed is None
        else LayerTarget(index, MoeSize(8, layer.expert_width // 2), (SlimWidth(layer.expert_width // 2),))
        for index, layer in enumerate(layers)
    ]
    done = list(
        LayerwiseCompression(
            source,
            targets,
            statistics,
            blocks_BT,
            n_sample_blocks=2,
            sequential=sequential,  # type: ignore[arg-type]
        ).run()
    )
    overlay = {name: tensor for layer in done for name, tensor in layer.overlay.items()}
    student = Student(source, ExpertMap(8, tuple(layer.map for layer in done))).with_overlay(overlay)
    expected = _logits(Student.teacher(source), blocks_BT)
    assert (_logits(student, blocks_BT) - expected).abs().max() < 1e-4 * expected.abs().max()
    if source.family.refusal(student.spec) is not None:
        with pytest.raises(UnsupportedError, match="leave --save-student out"):
            write_checkpoint(student, tmp_path / "student")
        return
    write_checkpoint(student, tmp_path / "student")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    with torch.no_grad():
        found = saved(blocks_BT).logits.flatten(0, 1)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_layer_without_its_experts_adds_nothing_there(
    folder: Path, stock: nn.Module, blocks_BT: torch.Tensor
) -> None:
    source = Checkpoint(folder)
    last = source.spec.n_layers - 1
    layers = [
        LayerMap(index, () if index == last else tuple((expert,) for expert in range(layer.n_experts)))
        for index, layer in enumerate(source.spec.layers)
    ]
    found = _logits(Student(source, ExpertMap(8, tuple(layers))), blocks_BT)
    routed = source.spec.layers[last].routed
    assert routed is not None

    def nothing(_block: nn.Module, _inputs: object, output: object) -> object:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)  # type: ignore[call-overload]

    modules = [stock.model.layers[last].get_submodule(module.name) for module in routed.block]
    handles = [module.register_forward_hook(nothing) for module in modules]
    with torch.no_grad():
        expected = stock(blocks_BT).logits.flatten(0, 1)
    for handle in handles:
        handle.remove()
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@dataclass
class _Neurons:
    """The inputs of the experts' down projections."""

    rows: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    student: Student | None = None

    @contextmanager
    def observe(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Watches the experts of one layer."""
        assert self.student is not None
        routed = self.student.spec.layers[index].routed
        if routed is None:
            yield
            return
        experts = layer.get_submodule(routed.experts_module)
        experts.observer = lambda expert, _gates, hidden_nF, _outputs: self.rows.setdefault(  # type: ignore[assignment]
            (index, expert), []
        ).append(hidden_nF.double())
        yield
        del experts.observer


def test_second_moments_of_neurons_are_those_of_a_whole_pass(
    folder: Path, blocks_BT: torch.Tensor, tmp_path: Path
) -> None:
    """Error feedback of down projections sees inputs computed from the experts' inputs, biases included."""
    student = Student.teacher(Checkpoint(folder))
    inputs = write_layer_inputs(StreamedModel(student), blocks_BT, tmp_path / "inputs")
    neurons = _Neurons(student=student)
    StreamedModel(student).stream([TokenGroup(blocks_BT, [neurons.observe])])
    moments, n_compared = SecondMoments(student, inputs), 0
    for index, layer in enumerate(student.spec.layers):
        experts = moments.layer(index).experts
        for expert in range(layer.n_experts):
            assert experts is not None and layer.routed is not None
            of_inputs = (student.expert(role, index, expert) for role in layer.routed.input_roles)
            found = experts.down(expert, *of_inputs)
            rows = torch.cat(neurons.rows.get((index, expert), [torch.zeros(0, layer.expert_width)]))
            if found.n_tokens == len(rows) > 0:  # a close call may go otherwise after states were rounded
                expected = rows.T @ rows / len(rows)
                assert (found.mean_NN - expected).norm() < 0.03 * expected.norm()
                n_compared += 1
    assert n_compared >= 4
