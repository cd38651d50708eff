"""Does the work of our stage ``gguf`` in its own process: ``ours.py SOURCE STATISTICS PRESET TARGET THREADS``."""

from __future__ import annotations

import sys
from pathlib import Path

from compressors.calibration.statistics import StoredStatistics, importance
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf

__all__ = ["main"]


def main(source: Path, statistics: Path, preset: str, target: Path, threads: int) -> None:
    """Writes the GGUF file of the whole model."""
    student = Student.teacher(open_source(source))
    matrix = importance(StoredStatistics(statistics, student.spec.n_layers), student.experts, student.spec)
    write_gguf(student, preset, target, importance=matrix, name=source.name, threads=threads)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
