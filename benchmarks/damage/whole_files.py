"""Undamaged files: of every type, by several quantizers, of several kinds of students."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader

from benchmarks.damage.error_feedback import FEEDBACK_TYPES, with_error_feedback
from benchmarks.damage.metadata import key_values
from benchmarks.damage.workshop import Workshop, make_original
from compressors.calibration.statistics import Importance
from compressors.model.description.roles import Role
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType
from compressors.model.sources.student import ExpertMap, Student
from exporter.validation.static_checks import check_description, check_weights
from exporter.writing.gguf.container import TensorEntry, aligned, render_header, render_values
from exporter.writing.gguf.mixes import MIXES
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.encodings import PRESETS as ONNX_PRESETS
from exporter.writing.onnx.writer import write_onnx
from validate.files.model_file import find_model_file
from validate.files.quantization_error import quantized
from validate.files.weight_comparison import compare_weights
from validate.files.weight_symptoms import weight_symptoms

__all__ = ["Whole", "importance_like", "whole_files"]

_T = GGMLQuantizationType
_EXPERTS = 4  # of each layer: kernels of 2 bits are slow
_OTHERS = (_T.Q4_1, _T.IQ4_NL, _T.IQ4_XS, _T.Q3_K, _T.Q2_K, _T.IQ3_S, _T.IQ3_XXS, _T.IQ2_S, _T.IQ2_XS, _T.IQ2_XXS)
_OTHERS += (_T.IQ1_M, _T.IQ1_S, _T.MXFP4, _T.TQ1_0, _T.TQ2_0, _T.Q2_0, _T.F16)


@dataclass(frozen=True)
class Whole:
    """An undamaged file, and what was said of it: nothing, if all is well."""

    what: str
    symptoms: tuple[str, ...]


def whole_files(folder: Path, models: Mapping[str, Path]) -> Iterator[Whole]:
    """Yields what the checks say of undamaged files of two layers of each model, given by name."""
    folder.mkdir(parents=True)
    for name, model in models.items():
        workshop = Workshop.open(make_original(model, folder / name), _EXPERTS)
        check = partial(_checked, workshop, folder / "file", name)
        yield from _ours(workshop, check)
        for ggml_type in _OTHERS:
            for is_weighted in (False, True):
                by = " with an importance matrix" if is_weighted else ""
                write = partial(_write_type, workshop, ggml_type, is_weighted)
                yield check(f"GGUF {ggml_type.name} as llama-quantize writes it{by}", write)
        for ggml_type in FEEDBACK_TYPES:
            yield _error_feedback(workshop, name, ggml_type)


_Check = Callable[..., Whole]


def _ours(workshop: Workshop, check: _Check) -> Iterator[Whole]:
    """All types of both containers, with and without an importance matrix; and students that are not the original."""
    student, importance = workshop.student, importance_like(workshop.student)
    for preset in MIXES:
        yield check(f"GGUF {preset}", _gguf(student, preset))
        yield check(f"GGUF {preset} with an importance matrix", _gguf(student, preset, importance))
    for preset in ONNX_PRESETS:
        yield check(f"ONNX {preset} with an importance matrix", _onnx(student, preset, importance))
    n_experts = student.spec.n_experts
    pruned = Student(workshop.source, ExpertMap.keeping(n_experts, [range(1, n_experts, 2)] * student.spec.n_layers))
    taught = _taught(pruned)
    for kind, one, trained in (
        ("pruned", pruned, frozenset[Role]()),
        ("pruned, routers taught", taught, frozenset({Role.ROUTER})),
    ):
        original = pruned if trained else one
        yield check(f"GGUF Q4_0, {kind}", _gguf(one, "Q4_0"), original, trained)
        yield check(f"ONNX Q4_0, {kind}", _onnx(one, "Q4_0"), original, trained)


def _gguf(student: Student, preset: str, importance: Importance | None = None) -> Callable[[Path], None]:
    return lambda path: write_gguf(student, preset, path, name="x", importance=importance, threads=1)


def _onnx(student: Student, preset: str, importance: Importance | None = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_onnx(student, preset, path, importance=importance, threads=1)
        write_client_files(student, path)

    return write


def _taught(student: Student) -> Student:
    """Its routers moved a little, as recovery does."""
    generator = torch.Generator().manual_seed(0)
    overlay = {}
    for layer in range(student.spec.n_layers):
        router = student.tensor(Role.ROUTER, layer).float()
        overlay[student.name(Role.ROUTER, layer)] = router + 0.01 * torch.randn(router.shape, generator=generator)
    return student.with_overlay(overlay)


def importance_like(student: Student) -> Importance:
    """Mean squares of inputs as uneven as measured ones: from a hundredth to a hundred times their median."""
    generator = torch.Generator().manual_seed(1)

    def uneven(*shape: int) -> torch.Tensor:
        return torch.exp(1.5 * torch.randn(shape, generator=generator)).clamp(0.01, 100)

    importance: dict[tuple[Role, int | None], torch.Tensor] = {}
    for layer in range(student.spec.n_layers):
        for role in student.spec.layers[layer].roles:
            if role.is_expert:
                columns = student.expert(role, layer, 0).shape[1]
                importance[role, layer] = uneven(student.spec.n_experts, columns)
            elif role in (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUTPUT):
                importance[role, layer] = uneven(student.tensor(role, layer).shape[1])
    return importance  # type: ignore[return-value]


def _checked(
    workshop: Workshop,
    path: Path,
    model: str,
    what: str,
    write: Callable[[Path], None],
    original: Student | None = None,
    trained: frozenset[Role] = frozenset(),
) -> Whole:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    write(path)
    found = find_model_file(path)
    assert found is not None, path
    student = original or workshop.student
    symptoms = check_weights(found, student, trained).symptoms
    symptoms += check_description(found, workshop.source, student.spec, workshop.chunks_BT).symptoms
    return Whole(f"{model}: {what}", tuple(symptoms))


def _write_type(workshop: Workshop, ggml_type: GGMLQuantizationType, is_weighted: bool, path: Path) -> None:
    """Every matrix but routers in one type, or IQ4_NL where its rows do not fit, as llama-quantize's pure files are."""
    plain = path.with_name("plain.gguf")
    write_gguf(workshop.student, "F32", plain, name="x", threads=1)
    reader = GGUFReader(plain)
    data, entries = b"", []
    generator = np.random.default_rng(0)
    for tensor in reader.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        kind, stored = _T.F32, tensor.data.tobytes()
        if len(shape) > 1 and "ffn_gate_inp" not in tensor.name:
            kind = ggml_type if shape[-1] % BLOCK_SIZES[ggml_type][0] == 0 else _T.IQ4_NL
            rows = torch.from_numpy(np.array(tensor.data, np.float32).reshape(-1, shape[-1]))
            weights = np.exp(1.5 * generator.standard_normal(shape[-1])).astype(np.float32) if is_weighted else None
            stored = quantized(rows, kind, weights).tobytes()
        entries.append(TensorEntry(tensor.name, shape, kind, len(stored)))
        data += stored.ljust(aligned(len(stored)), b"\0")
    values = key_values(reader)
    path.write_bytes(render_header(len(values), render_values(values), entries) + data)


def _error_feedback(workshop: Workshop, model: str, ggml_type: GGMLQuantizationType) -> Whole:
    """Codes chosen by error feedback: no bytes are written, the values that a file would hold are compared."""
    student = workshop.student
    found = student.with_overlay(with_error_feedback(student, ggml_type))

    def stored(role: Role, layer: int | None, _part: int) -> GGMLQuantizationType:
        if not role.is_expert or layer is None:
            return _T.F32
        length = student.expert(role, layer, 0).shape[1]
        return ggml_type if length % BLOCK_SIZES[ggml_type][0] == 0 else _T.IQ4_NL

    comparison = compare_weights(student, found, stored)
    return Whole(f"{model}: {ggml_type.name} with error feedback", tuple(weight_symptoms(comparison.damage)))
