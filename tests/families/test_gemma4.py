"""Gemma 4's peculiarities: a router with a norm of its own, scales of experts, and layers with other heads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compressors.calibration.statistics import StatisticsCollector
from compressors.model.description.gguf_rope import gguf_rope_of
from compressors.model.description.rope import RopeKind
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError
from compressors.model.files.onnx_names import MODEL_FILE
from compressors.model.running.recorder import RoutingRecorder
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refusal
from exporter.writing.gguf.memory import predict_runtime_bytes
from exporter.writing.onnx.writer import write_onnx
from tests.families.conftest import logits_of
from validate.files.file_facts import onnx_facts
from validate.routing.router_alone import RouterInputRecorder, router_alone
from validate.routing.router_inputs import RouterInputs
from validate.runtimes.onnx import OnnxRuntimeBackend


@pytest.fixture(scope="module", params=["gemma4_text"])
def family(request: pytest.FixtureRequest) -> str:
    """The family."""
    return str(request.param)


@dataclass
class _Look:
    """A method that changes nothing and runs each block on its sample."""

    outputs: list[torch.Tensor] = field(default_factory=list)
    needs: Needs = Needs.INPUTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        assert evidence.router_inputs_TD is not None
        self.outputs.append(block.forward(evidence.sample_TD, evidence.router_inputs_TD))
        return CompressedBlock.unchanged(block)


@torch.no_grad()
def test_a_block_computes_what_the_experts_add(folder: Path, stock: nn.Module, blocks_BT: torch.Tensor) -> None:
    """Router and experts read different values, both of which the evidence has."""
    source, look, outputs = Checkpoint(folder), _Look(), list[torch.Tensor]()
    hooks = [
        layer.experts.register_forward_hook(lambda _m, _i, output: outputs.append(output))
        for layer in stock.model.layers
    ]
    stock(blocks_BT)
    for hook in hooks:
        hook.remove()
    collector = StatisticsCollector(source.spec)
    StreamedModel(Student.teacher(source)).stream([TokenGroup(blocks_BT, [collector.observe])])
    layers = source.spec.layers
    statistics = [collector.take(index) for index in range(len(layers))]
    targets = [LayerTarget(index, layer.moe, (look,)) for index, layer in enumerate(layers)]
    list(LayerwiseCompression(source, targets, statistics, blocks_BT, n_sample_blocks=2).run())
    for found, expected in zip(look.outputs, outputs, strict=True):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_routers_in_onnx_runtime_choose_from_torch_s_inputs(
    folder: Path, blocks_BT: torch.Tensor, tmp_path: Path
) -> None:
    """They read the norm of the residual stream, which the experts do not."""
    student = Student.teacher(Checkpoint(folder))
    recorder = RoutingRecorder(student.spec)
    inputs = RouterInputRecorder(tmp_path / "inputs", student.spec, np.arange(len(blocks_BT)), blocks_BT.shape[1])
    StreamedModel(student).stream([TokenGroup(blocks_BT, [recorder.observe, inputs.observe])])
    inputs.finish(recorder.routing())
    write_onnx(student, "F32", tmp_path / "onnx", threads=1)
    fed, backend = RouterInputs(tmp_path / "inputs"), OnnxRuntimeBackend(tmp_path / "onnx", threads=1)
    alone = router_alone(fed, backend.route(blocks_BT.numpy(), fed))
    assert alone.agreement.mean("overlap") == 1.0 and alone.margin_error < 1e-5
    facts = onnx_facts(tmp_path / "onnx" / MODEL_FILE)
    assert (facts.n_experts, facts.top_k) == (8, 2)


def test_a_student_whose_last_layer_has_a_window_cannot_be_saved(folder: Path, blocks_BT: torch.Tensor) -> None:
    """It runs, and llama.cpp can compute it."""
    source = Checkpoint(folder)
    all_experts = tuple((expert,) for expert in range(8))
    student = Student(source, ExpertMap(8, tuple(LayerMap(layer, all_experts) for layer in range(3))))
    assert torch.isfinite(logits_of(StreamedModel(student), blocks_BT)).all()
    said = refusal(student.spec, Container.STUDENT)
    assert said is not None and "takes away the window of the last layer" in said
    assert refusal(student.spec, Container.GGUF) is None


def test_only_windows_bound_a_layer_s_cache(folder: Path) -> None:
    """Each kind of layers has its own number and size of key-value heads."""
    spec = Checkpoint(folder).spec
    small, large = (predict_runtime_bytes(spec, 0, context, "f16")["kv_cache"] for context in (1024, 4096))
    of_windows, of_others = 2 * 2 * 2 * 16 * 2, 2 * 2 * 1 * 32 * 2  # layers, keys and values, heads, values, bytes
    assert large == of_windows * 768 + of_others * 4096
    assert large - small == of_others * 3072


def test_windows_have_no_factors_of_their_own_in_gguf(folder: Path) -> None:
    spec = Checkpoint(folder).spec
    rope = gguf_rope_of(spec)
    assert not rope.keys and [len(values) for values in rope.factors.values()] == [16]
    for kind, said in (
        (RopeKind.PROPORTIONAL, "rope_type 'proportional'"),
        (RopeKind.LINEAR, "proportional and linear"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            gguf_rope_of(_turned_in_windows(spec, kind))


def _turned_in_windows(spec: ModelSpec, kind: RopeKind) -> ModelSpec:
    """The model with a scaled rotary embedding in layers with a window."""
    scaled = replace(spec.ropes[1], kind=kind, factor=2.0, share=0.5)
    layers = [
        layer if layer.mixer.window is None else replace(layer, mixer=replace(layer.mixer, rope=scaled))  # type: ignore[arg-type]
        for layer in spec.layers
    ]
    return replace(spec, layers=tuple(layers))
