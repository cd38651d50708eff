"""One attempt at an export, in a process of its own: it may be killed, or run out of space, at a chosen byte.

python export_attempt.py SOURCE FORMAT OUT [--kill-at BYTES] [--limit BYTES]
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing import pieces, resumable
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from exporter.writing.onnx.writer import write_onnx
from exporter.writing.resumable import Part, ResumableFile

__all__ = ["FILES", "PIECE_VALUES", "export", "student_of"]

PIECE_VALUES = 50_000
"""Slices smaller than usual, since the toy model is: every attempt has to cut in the same way."""

FILES = {"gguf": "model.gguf", "onnx": "onnx/model.onnx.data", "student": "student/model-00001-of-00003.safetensors"}
"""The file of each format that an attempt spends its time on."""


def student_of(source: Path) -> Student:
    """Five experts of each of the two layers."""
    checkpoint = open_source(source)
    return Student(checkpoint, ExpertMap.keeping(checkpoint.spec.n_experts, ((1, 5, 6, 7, 30), (0, 2, 3, 4, 31))))


def export(student: Student, kind: str, out: Path, progress: list[int] | None = None) -> None:
    """Goes on with whatever lies in ``out``."""
    report = (progress if progress is not None else []).append
    if kind == "gguf":
        write_gguf(student, "Q4_0", out / FILES["gguf"], name="x", threads=2, resume=True, progress=report)
    elif kind == "onnx":
        write_onnx(student, "Q4_0", out / "onnx", threads=2, resume=True, progress=report)
    else:
        write_checkpoint(student, out / "student", resume=True, progress=report)


def _kill_at(n_bytes: int) -> None:
    """Ends this process, without warning, in the middle of the write that reaches so many bytes."""
    write, written = os.pwrite, 0

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        if written + len(data) > n_bytes:
            write(descriptor, data[: n_bytes - written], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        written += len(data)
        return write(descriptor, data, offset)

    os.pwrite = pwrite


def _flush_often() -> None:
    """The toy model is smaller than the usual interval, and is written faster than any disk flushes."""
    resumable._FLUSH_BYTES = 100_000
    write_piece = ResumableFile.write_piece

    def write_and_wait(file: ResumableFile, parts: Iterable[Part]) -> None:
        write_piece(file, parts)
        if file._flush is not None:
            file._flush.result()

    ResumableFile.write_piece = write_and_wait  # type: ignore[method-assign]


def _main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("kind", choices=FILES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pieces._PIECE_VALUES = PIECE_VALUES
    _flush_often()
    if arguments.kill_at is not None:
        _kill_at(arguments.kill_at)
    if arguments.limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (arguments.limit, arguments.limit))
    try:
        export(student_of(arguments.source), arguments.kind, arguments.out)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
