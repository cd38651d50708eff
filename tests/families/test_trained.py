"""A trained model with latent attention and biased sigmoid routers: in both runtimes it is the model of transformers.

Random weights make experts alike, so that some mistakes of routing hardly change the logits. Here they do. The whole
run on this model, with recovery, is ``benchmarks/latent``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compressors.model.description.roles import Role
from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.running.recorder import RoutingRecorder
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from exporter.writing.onnx.writer import write_onnx
from validate.routing.agreement import routing_agreement
from validate.runtimes.backend import RuntimeBackend, scored_positions
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend

Tokens = npt.NDArray[np.int64]

_LENGTH = 128
_KEPT = (0, 1, 3, 4, 6, 7, 9, 10, 12, 15, 16, 18, 19, 21, 22, 24, 25, 27, 28, 30)


@pytest.fixture(scope="module")
def source(latent_folder: Path) -> Checkpoint:
    """The model's checkpoint."""
    return Checkpoint(latent_folder)


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "pruned"])
def student(request: pytest.FixtureRequest, source: Checkpoint) -> Student:
    """All experts, or 20 of 32 in the layers that have some."""
    if not request.param:
        return Student.teacher(source)
    kept = [_KEPT if layer.routed is not None else () for layer in source.spec.layers]
    return Student(source, ExpertMap.keeping(source.spec.n_experts, kept))


@pytest.fixture(scope="module")
def stock(student: Student, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """The same model in stock transformers."""
    path = tmp_path_factory.mktemp("stock") / "student"
    write_checkpoint(student, path)
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return loaded


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: Tokens) -> Tokens:
    """Blocks of held-out text from all of its domains."""
    return _spread(heldout_tokens, 5)


def _spread(tokens: Tokens, n_blocks: int) -> Tokens:
    starts = np.linspace(0, len(tokens) - _LENGTH, n_blocks).astype(int)
    return np.stack([tokens[start : start + _LENGTH] for start in starts])


@torch.no_grad()
def _logits(stock: nn.Module, blocks_BT: Tokens) -> torch.Tensor:
    logits: torch.Tensor = stock(torch.from_numpy(blocks_BT)).logits
    return logits


@torch.no_grad()
def _routing(student: Student, blocks_BT: Tokens) -> RoutingRecord:
    recorder = RoutingRecorder(student.spec)
    list(StreamedModel(student).stream([TokenGroup(torch.from_numpy(blocks_BT), [recorder.observe])]))
    return recorder.routing()


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_the_runtime_computes_and_routes_like_transformers(
    student: Student, stock: nn.Module, blocks_BT: Tokens, tmp_path: Path, container: str
) -> None:
    outputs = [(each.logits_SV.copy(), each.routing) for each in _backend(student, tmp_path, container).run(blocks_BT)]
    expected_BSV = _logits(stock, blocks_BT)[:, scored_positions(_LENGTH)]
    found_BSV = torch.from_numpy(np.stack([logits_SV for logits_SV, _ in outputs]))
    assert (found_BSV - expected_BSV).abs().max() < 1e-3 * expected_BSV.std()
    routings = [routing for _, routing in outputs if routing is not None]
    found, expected = RoutingRecord.concatenate(routings), _routing(student, blocks_BT)
    assert routing_agreement(expected, found).mean("overlap") > 0.995


def _backend(student: Student, folder: Path, container: str) -> RuntimeBackend:
    if container == "onnx":
        write_onnx(student, "F32", folder, threads=1)
        return OnnxRuntimeBackend(folder, threads=1)
    write_gguf(student, "F32", folder / "x.gguf", name="x", threads=1)
    return LlamaCppBackend(folder / "x.gguf", n_ctx=_LENGTH, kv_type="f32", threads=1)


def test_a_mistake_of_routing_would_show(source: Checkpoint, blocks_BT: Tokens) -> None:
    """The model is trained, and without its biases it chooses other experts, which changes the text that it writes."""
    student = Student.teacher(source)
    biases = [
        (Role.SELECTION_BIAS, index) for index, layer in enumerate(source.spec.layers) if layer.routed is not None
    ]
    plain = student.with_overlay({student.name(*place): torch.zeros_like(student.tensor(*place)) for place in biases})
    routings = [_routing(each, blocks_BT) for each in (student, plain)]
    assert routing_agreement(*routings).mean("overlap") < 0.9
