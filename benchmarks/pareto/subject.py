"""A model whose curve is measured: its F32 file, llama.cpp's tools on it, and the rows that were measured so far."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.export.llama_cpp import Tools
from benchmarks.pareto.llama_cpp import Measuring
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from exporter.curve.rows import ParetoRow, RowFile
from exporter.writing.gguf.writer import predict_file_size, write_gguf

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """One of the models."""

    name: str
    checkpoint: Path
    folder: Path  # for whatever is made of it
    rows: RowFile
    tools: Tools
    threads: int

    @cached_property
    def source(self) -> Source:
        """The model."""
        return open_source(self.checkpoint)

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return self.source.spec

    @cached_property
    def bf16_bytes(self) -> int:
        """Bytes of the file of the whole model in bfloat16."""
        return predict_file_size(self.spec, self.source, "BF16", self.name)

    @cached_property
    def reference(self) -> Path:
        """The F32 file, from which llama-quantize makes the others."""
        path = self.folder / "whole.gguf"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            student = Student.teacher(self.source)
            write_gguf(student, "F32", path, name=self.name, threads=self.threads)
        return path

    @cached_property
    def measuring(self) -> Measuring:
        """llama.cpp's tools, with the F32 file's logits."""
        return Measuring(self.tools, self.reference, self.folder, self.threads)

    def measure(
        self,
        method: str,
        mix: str,
        write: Callable[[Path], None],
        *,
        structure: str = "",
        predicted: float | None = None,
        budget: int | None = None,
    ) -> None:
        """Adds the row of this method and mix, unless it is there; ``write`` makes the file at the path it gets."""
        if self.rows.find(self.name, method, mix) is not None:
            return
        path = self.folder / f"measured-{os.getpid()}.gguf"  # another process may measure the same model
        write(path)
        n_bytes, figures = path.stat().st_size, self.measuring.figures(path)
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
            budget=budget,
        )
        self.rows.add(row)
        print(f"{self.name}: {method}, {mix}: {n_bytes:,} bytes, {figures.divergence:.5f} nats", flush=True)
