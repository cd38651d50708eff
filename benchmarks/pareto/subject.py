"""A model whose curve is measured: its F32 file, llama.cpp's tools on it, and the rows that were measured so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.export.llama_cpp import Tools
from benchmarks.pareto.llama_cpp import Measuring
from compressors.model.checkpoint import Checkpoint
from compressors.model.student import Student
from exporter.gguf.writer import predict_file_size, write_gguf
from exporter.pareto_rows import ParetoRow, RowFile

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """One of the models."""

    name: str
    checkpoint: Path
    folder: Path  # for whatever is made of it
    rows: RowFile
    measuring: Measuring
    threads: int

    @classmethod
    def prepared(
        cls, name: str, checkpoint: Path, folder: Path, rows: RowFile, tools: Tools, threads: int
    ) -> Subject:
        """Writes the F32 file and takes its logits, unless both are there."""
        folder.mkdir(parents=True, exist_ok=True)
        reference = write_f32(Student.teacher(Checkpoint(checkpoint)), folder / "whole.gguf", name, threads)
        return cls(name, checkpoint, folder, rows, Measuring(tools, reference, folder, threads), threads)

    def measure(
        self, method: str, mix: str, write: Callable[[Path], None], structure: str = "", predicted: float | None = None
    ) -> ParetoRow:
        """The row of this method and mix; unless it is known, ``write`` makes the file at the path that it gets."""
        if (known := self.rows.find(self.name, method, mix)) is not None:
            return known
        path = self.folder / "measured.gguf"
        write(path)
        n_bytes = path.stat().st_size
        figures = self.measuring.figures(path)
        path.unlink()
        row = ParetoRow(
            self.name,
            method,
            mix,
            n_bytes,
            n_bytes / self.bf16_bytes,
            **vars(figures),
            structure=structure,
            predicted=predicted,
        )
        self.rows.add(row)
        print(row, flush=True)
        return row

    @property
    def bf16_bytes(self) -> int:
        """Bytes of the file of the whole model in bfloat16."""
        return predict_file_size(Checkpoint(self.checkpoint).shape, self.checkpoint, "BF16", self.name)


def write_f32(student: Student, path: Path, name: str, threads: int) -> Path:
    """Writes a student's F32 file unless it is there."""
    if not path.exists():
        write_gguf(student, "F32", path, name=name, threads=threads)
    return path
