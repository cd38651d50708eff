"""The files that are compared: the same two layers of a published shape, as ONNX of ours and as GGUF."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scale.checkpoints import MODELS, with_layers, write_checkpoint
from compressors.model.files.integer_blocks import ProductInputs
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.encodings import onnx_units
from exporter.writing.onnx.writer import write_onnx

__all__ = [
    "FORMATS",
    "LAYERS",
    "Format",
    "OnnxForm",
    "Written",
    "shaped_checkpoint",
    "write_gguf_file",
    "write_onnx_folder",
]

LAYERS = 6  # of a token on two of them, the head of a large vocabulary would take the larger part
_ENDS = ("embedding", "head")
_GGUF_ENDS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class OnnxForm:
    """The encodings of an ONNX file of ours, and the inputs of its products of 4 bits."""

    encoding: str
    ends: str  # of embedding and head
    inputs: ProductInputs = "int8"


@dataclass(frozen=True)
class Format:
    """Files of as many bits; embedding and head have 8 wherever the others have fewer."""

    bits: int
    gguf: str  # the type of all matrices but
    gguf_ends: str  # those of embedding and head
    onnx: tuple[OnnxForm, ...]


FORMATS = (
    Format(32, "F32", "F32", (OnnxForm("F32", "F32"),)),
    Format(8, "Q8_0", "Q8_0", (OnnxForm("Q8_0", "Q8_0"), OnnxForm("8@128", "8@128"))),
    Format(
        4,
        "Q4_0",
        "Q8_0",
        (OnnxForm("Q4_0", "Q8_0"), OnnxForm("Q4_0", "Q8_0", "float32"), OnnxForm("4@128", "8@128")),
    ),
    Format(2, "Q2_K", "Q8_0", (OnnxForm("2@64", "8@128"),)),
)
"""The first ONNX file of each has blocks of as many values as the GGUF file's type, if it can."""


@dataclass(frozen=True)
class Written:
    """A file or folder, its bytes, and the seconds of CPU time that writing it took."""

    path: Path
    n_bytes: int
    seconds: float


def shaped_checkpoint(model: str, n_experts: int, folder: Path) -> Path:
    """Writes some layers of a published shape with random weights and fewer experts; returns their folder."""
    config: Mapping[str, Any] = {**with_layers(MODELS[model], LAYERS), "max_position_embeddings": 4096}
    path = folder / model
    write_checkpoint({**config, "num_experts": n_experts}, path)
    return path


def write_onnx_folder(checkpoint: Path, form: OnnxForm, folder: Path) -> Written:
    """Writes our ONNX folder, with the kernels' codes."""
    student = Student.teacher(open_source(checkpoint))
    names = (unit.name for unit in onnx_units(student.spec))
    encodings = {name: form.ends if name in _ENDS else form.encoding for name in names}
    path = folder / f"onnx-{form.encoding}-{form.inputs}"
    start = time.process_time()
    write_onnx(student, "F32", path, encodings=encodings, inputs=form.inputs, threads=1)
    return Written(path, sum(file.stat().st_size for file in path.iterdir()), time.process_time() - start)


def write_gguf_file(checkpoint: Path, form: Format, folder: Path) -> Written:
    """Writes a GGUF file of the same weights, with the kernels' codes."""
    student = Student.teacher(open_source(checkpoint))
    matrices = [tensor.name for tensor in plan_tensors(student.spec, "BF16") if tensor.is_matrix]
    types = {name: form.gguf_ends if name in _GGUF_ENDS else form.gguf for name in matrices}
    path = folder / f"{form.gguf}.gguf"
    start = time.process_time()
    write_gguf(student, "BF16", path, types=types, name=checkpoint.name, threads=1)
    return Written(path, path.stat().st_size, time.process_time() - start)
