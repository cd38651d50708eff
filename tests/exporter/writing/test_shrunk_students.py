"""Students that lost layers, experts and neurons, in every container: each computes what the streamed student does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.calibration.statistics import LayerStatistics, StatisticsCollector, importance
from compressors.model.description.spec import NO_MOE, MoeSize
from compressors.model.errors import UnsupportedError
from compressors.model.predictions.routing_record import NO_EXPERT, RoutingRecord
from compressors.model.running.recorder import RoutingRecorder
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from compressors.shrink.merge import REAM
from compressors.shrink.prune import Prune
from compressors.shrink.slim.width import SlimWidth
from exporter.writing.gguf.writer import predict_file_size, write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from exporter.writing.onnx.writer import predict_size, write_onnx
from validate.metrics.generation import greedy
from validate.runtimes.backend import scored_positions
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend

_EXACT = 1e-3  # logits reach 17; float32 in another order of summation

Tokens = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def tokens_BT(heldout_tokens: Tokens) -> Tokens:
    return heldout_tokens[30_000 : 30_000 + 2 * 128].reshape(2, 128)


@pytest.fixture(scope="module")
def compressed(heldout_tokens: Tokens) -> Callable[[Source, Sequence[LayerTarget]], Student]:
    """Applies the targets' methods, one-shot."""
    text_BT = torch.from_numpy(heldout_tokens[: 4 * 128].reshape(4, 128))
    found: dict[Path, list[LayerStatistics]] = {}

    def compress(source: Source, targets: Sequence[LayerTarget]) -> Student:
        if source.path not in found:
            found[source.path] = _statistics(Student.teacher(source), text_BT)
        run = LayerwiseCompression(source, targets, found[source.path], text_BT, n_sample_blocks=4).run()
        layers = list(run)
        overlay = {name: tensor for layer in layers for name, tensor in layer.overlay.items()}
        experts = ExpertMap(source.spec.n_experts, tuple(layer.map for layer in layers))
        return Student(source, experts).with_overlay(overlay)

    return compress


def _statistics(student: Student, text_BT: torch.Tensor) -> list[LayerStatistics]:
    collector = StatisticsCollector(student.spec)
    StreamedModel(student).stream([TokenGroup(text_BT, [collector.observe])])
    return [collector.take(layer) for layer in range(student.spec.n_layers)]


@torch.no_grad()
def _streamed(student: Student, tokens_BT: Tokens) -> tuple[npt.NDArray[np.float32], RoutingRecord]:
    """Logits [B, T, V] and the routing of all tokens."""
    model, recorder = StreamedModel(student), RoutingRecorder(student.spec)
    (hidden,) = model.stream([TokenGroup(torch.from_numpy(tokens_BT), [recorder.observe])])
    parts = [part for _, part in model.logits_in_chunks(hidden, slice(0, tokens_BT.shape[1]))]
    return torch.cat(parts).view(*tokens_BT.shape, -1).numpy(), recorder.routing()


def _tokens_of(routing: RoutingRecord, block: int, n_tokens: int) -> RoutingRecord:
    tokens = slice(block * n_tokens, (block + 1) * n_tokens)
    return routing.tokens(tokens)


def _assert_equal_runs(
    backend: LlamaCppBackend | OnnxRuntimeBackend, student: Student, tokens_BT: Tokens, layers: Sequence[int]
) -> None:
    """Logits, chosen experts and their weights; ``layers`` are those with experts."""
    logits_BTV, routing = _streamed(student, tokens_BT)
    scored, n_tokens = scored_positions(tokens_BT.shape[1]), tokens_BT.shape[1]
    for block, output in enumerate(backend.run(tokens_BT)):
        expected = _tokens_of(routing, block, n_tokens)
        found = output.routing
        assert found.experts_LTK.shape == expected.experts_LTK.shape
        without = [layer for layer in range(student.spec.n_layers) if layer not in layers]
        assert (found.experts_LTK[without] == NO_EXPERT).all()
        assert not found.weights_LTK[without].any()
        assert ((found.experts_LTK[list(layers)] != NO_EXPERT).any(axis=(1, 2))).all()
        same_T = (np.sort(found.experts_LTK) == np.sort(expected.experts_LTK)).all(axis=(0, 2))
        assert same_T.mean() > 0.98, "float rounding decides between two experts now and then"
        assert np.abs(output.logits_SV - logits_BTV[block, scored])[same_T[scored]].max() < _EXACT
        np.testing.assert_allclose(
            np.sort(found.weights_LTK)[:, same_T], np.sort(expected.weights_LTK)[:, same_T], atol=1e-4
        )


def _layers_that_differ(source: Source) -> tuple[list[LayerTarget], list[int]]:
    """Few narrow experts of a width that is no multiple of 32; none; merged ones; one; all. And which have experts."""
    n_experts, width = source.spec.n_experts, source.spec.expert_width
    targets = [
        LayerTarget(0, MoeSize(3, 40), (Prune("reap", 3), SlimWidth(40))),
        LayerTarget(1, NO_MOE),
        LayerTarget(2, MoeSize(6, width), (REAM(6),)),
    ]
    if source.spec.n_layers > 3:  # layer 3 goes as a whole
        targets += [LayerTarget(4, MoeSize(1, width), (Prune("frequency", 1),)), LayerTarget(5, NO_MOE)]
        return targets, [0, 2, 3]
    assert n_experts > 6
    return targets, [0, 2]


def test_onnx_runs_layers_that_differ(
    family_folder: Path, compressed: Callable[..., Student], tokens_BT: Tokens, tmp_path: Path
) -> None:
    source = open_source(family_folder)
    targets, with_experts = _layers_that_differ(source)
    student = compressed(source, targets)
    write_onnx(student, "F32", tmp_path / "onnx", threads=1)
    backend = OnnxRuntimeBackend(tmp_path / "onnx", threads=1)
    prompt = tokens_BT[0, :20].tolist()
    generated = backend.generate(prompt, 5, greedy)
    _assert_equal_runs(backend, student, tokens_BT, with_experts)
    whole = np.array([*prompt, *generated], dtype=np.int64)[None]
    best = _streamed(student, whole)[0][0].argmax(-1)
    assert generated == best[len(prompt) - 1 : -1].tolist()
    written = sum(file.stat().st_size for file in (tmp_path / "onnx").iterdir())
    assert written == predict_size(student.spec, "F32")


def test_onnx_quantizes_layers_that_differ(
    fine_folder: Path, compressed: Callable[..., Student], tokens_BT: Tokens, tmp_path: Path
) -> None:
    source = open_source(fine_folder)
    targets = [
        LayerTarget(0, MoeSize(12, 64), (REAM(12), SlimWidth(64))),
        LayerTarget(1, NO_MOE),
        LayerTarget(3, MoeSize(32, 96), (SlimWidth(96),)),
    ]
    student = compressed(source, targets)
    text_BT = torch.from_numpy(tokens_BT)
    matrix = importance(_statistics(student, text_BT), student.experts.of_itself(), student.spec)
    write_onnx(student, "Q4_0", tmp_path / "onnx", importance=matrix, threads=1)
    logits_BTV, _ = _streamed(student, tokens_BT)
    scored = scored_positions(tokens_BT.shape[1])
    for block, output in enumerate(OnnxRuntimeBackend(tmp_path / "onnx", threads=1).run(tokens_BT)):
        expected = torch.from_numpy(logits_BTV[block, scored]).log_softmax(-1)
        found = torch.from_numpy(output.logits_SV).log_softmax(-1)
        assert (expected.exp() * (expected - found)).sum(-1).mean() < 0.1, "4 bits cost a little"
        assert (output.routing.experts_LTK[1] == NO_EXPERT).all()
        assert output.routing.experts_LTK[0].max() < 12


def test_onnx_names_the_weight_whose_width_4_bits_cannot_have(
    fine_folder: Path, compressed: Callable[..., Student], tmp_path: Path
) -> None:
    student = compressed(open_source(fine_folder), _layers_that_differ(open_source(fine_folder))[0])
    with pytest.raises(UnsupportedError, match=r"layers\.0\..*down.* rows of 40 values.*these encodings fit: F32"):
        write_onnx(student, "Q4_0", tmp_path / "onnx", threads=1)


def _layers_alike(source: Source) -> list[LayerTarget]:
    """Two blocks dropped (of three: one); six merged experts, half as wide."""
    sources = [0, 1, 3, 5] if source.spec.n_layers > 3 else [0, 2]
    width = source.spec.expert_width // 2
    return [LayerTarget(layer, MoeSize(6, width), (REAM(6), SlimWidth(width))) for layer in sources]


def test_llama_cpp_runs_a_student_that_lost_blocks_experts_and_neurons(
    family_folder: Path, compressed: Callable[..., Student], tokens_BT: Tokens, tmp_path: Path
) -> None:
    student = compressed(open_source(family_folder), _layers_alike(open_source(family_folder)))
    path = tmp_path / "f32.gguf"
    write_gguf(student, "F32", path, name="x", threads=1)
    assert path.stat().st_size == predict_file_size(student.spec, student.source, "F32", "x")
    backend = LlamaCppBackend(path, kv_type="f32", threads=1)
    _assert_equal_runs(backend, student, tokens_BT, range(student.spec.n_layers))


@torch.no_grad()
def test_stock_transformers_loads_a_student_that_lost_blocks_experts_and_neurons(
    family_folder: Path, compressed: Callable[..., Student], tokens_BT: Tokens, tmp_path: Path
) -> None:
    student = compressed(open_source(family_folder), _layers_alike(open_source(family_folder)))
    write_checkpoint(student, tmp_path / "student")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    assert stock.config.num_hidden_layers == student.spec.n_layers
    logits_BTV = stock(torch.from_numpy(tokens_BT)).logits.numpy()
    assert np.abs(logits_BTV - _streamed(student, tokens_BT)[0]).max() < 1e-4
    again = open_source(tmp_path / "student")
    assert again.spec == student.spec
    assert np.abs(_streamed(Student.teacher(again), tokens_BT)[0] - logits_BTV).max() < 1e-4


def test_gguf_and_the_saved_student_refuse_layers_that_differ(
    fine_folder: Path, compressed: Callable[..., Student], tmp_path: Path
) -> None:
    student = compressed(open_source(fine_folder), _layers_that_differ(open_source(fine_folder))[0])
    sizes = "3 experts of width 40, no experts, 6 experts of width 128, 1 experts of width 128"
    with pytest.raises(UnsupportedError, match=rf"qwen3moe graph .* these layers have {sizes}: .*--formats onnx"):
        write_gguf(student, "F32", tmp_path / "x.gguf", name="x", threads=1)
    with pytest.raises(UnsupportedError, match=rf"{sizes}, which transformers could not load: leave --save-student"):
        write_checkpoint(student, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []
