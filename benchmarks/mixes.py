"""Compares our files of every mix with llama-quantize's. Writes ``results/mixes.{csv,md}``.

    python -m benchmarks.mixes [--tools FOLDER] [--layers 6] [--chunks 20] [--threads 1]

Both trained models, and the coarse one without two of its eight experts, are written in float32. llama-imatrix makes an
importance matrix of each, and llama-quantize a file of every mix; ours is written with the same importance matrix.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.export.llama_cpp import Tools, build_tools
from compressors.calibration.statistics import Importance
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.hub import bundled_text
from exporter.writing.gguf.imatrix import read_imatrix
from exporter.writing.gguf.mixes import MIXES, Mix
from exporter.writing.gguf.writer import write_gguf

_REPOSITORY = Path(__file__).parent.parent
_RESULTS = Path(__file__).parent / "results"
_MODELS = {"fine": _REPOSITORY / "exporter/demo/model", "coarse": _REPOSITORY / "tests/fixtures/coarse"}
_IMATRIX_KEYS = "quantize.imatrix."
_INTRODUCTION = (
    "# Our files of llama.cpp's mixes",
    "",
    "llama-quantize and llama-imatrix are compiled from the sources of the llama-cpp-python that we use; both sides",
    "have the same float32 file and importance matrix. Metadata: all of it, but for the tool's four keys",
    f"`{_IMATRIX_KEYS}*`, which name the importance matrix. Size: from the first tensor on. Written by",
    "`python -m benchmarks.mixes`.",
    "",
)


@dataclass(frozen=True)
class Compared:
    """One mix of one model."""

    model: str
    mix: str
    bytes: int
    tensors: int
    same_types: int
    same_bytes: int
    same_metadata: bool
    same_size: bool

    @property
    def is_equal(self) -> bool:
        """True if nothing differs."""
        return self.tensors == self.same_types == self.same_bytes and self.same_metadata and self.same_size


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, default=_REPOSITORY / ".venv-llama", help="where llama.cpp's are built")
    parser.add_argument("--layers", type=int, default=6, help="the first so many of each model")
    parser.add_argument("--chunks", type=int, default=20, help="chunks of 512 tokens for the importance matrices")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    tools = build_tools(options.tools)
    found: list[Compared] = []
    for name, student in _students(options.layers):
        with tempfile.TemporaryDirectory() as folder:
            for compared in compare(name, student, tools, options.chunks, options.threads, Path(folder)):
                print(compared, flush=True)
                found.append(compared)
    with (_RESULTS / "mixes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Compared)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(compared) for compared in found)
    (_RESULTS / "mixes.md").write_text(page(found), encoding="utf-8")


def _students(n_layers: int) -> Iterator[tuple[str, Student]]:
    for name, n_experts in (("fine", 32), ("coarse", 8), ("coarse", 6)):
        source = open_source(_MODELS[name])
        experts = ExpertMap.keeping(source.spec.n_experts, [range(n_experts)] * n_layers)
        yield f"{name}, {n_layers} layers, {n_experts} experts", Student(source, experts)


def compare(name: str, student: Student, tools: Tools, n_chunks: int, threads: int, folder: Path) -> Iterator[Compared]:
    """Compares our file of every mix of one model with llama-quantize's.

    Args:
        name: the model's name, for the table.
        student: the model.
        tools: llama.cpp's tools.
        n_chunks: number of chunks of 512 tokens for the importance matrix.
        threads: threads of both sides.
        folder: an empty folder for the files.
    """
    float32, imatrix, text = folder / "f32.gguf", folder / "imatrix.gguf", folder / "text.txt"
    write_gguf(student, "F32", float32, name=name, threads=threads)
    texts = sorted(bundled_text("calibration").glob("*.txt"))
    text.write_text("\n\n".join(path.read_text(encoding="utf-8")[:40_000] for path in texts), encoding="utf-8")
    options = ["-c", "512", "-b", "512", "--no-ppl", "--chunks", str(n_chunks), "-t", str(threads)]
    _run([*tools.imatrix, "-m", float32, "-f", text, "-o", imatrix, *options])
    importance = read_imatrix(imatrix, student.spec)
    for mix in MIXES.values():
        _run([*tools.quantize, "--imatrix", imatrix, float32, folder / "theirs.gguf", mix.name, str(threads)])
        yield _compared(name, mix, student, importance, threads, folder)


def _compared(name: str, mix: Mix, student: Student, importance: Importance, threads: int, folder: Path) -> Compared:
    write_gguf(student, mix.name, folder / "ours.gguf", importance=importance, name=name, threads=threads)
    ours, theirs = GgufFile(folder / "ours.gguf"), GgufFile(folder / "theirs.gguf")
    same_types = [key for key in ours.tensors if ours.tensors[key].ggml_type is theirs.tensors[key].ggml_type]
    same_bytes = [key for key in same_types if _stored(ours, key) == _stored(theirs, key)]
    metadata = {key: value for key, value in theirs.metadata.items() if not key.startswith(_IMATRIX_KEYS)}
    return Compared(
        name,
        mix.name,
        ours.path.stat().st_size,
        len(ours.tensors.keys() | theirs.tensors.keys()),
        len(same_types),
        len(same_bytes),
        metadata == ours.metadata and theirs.array_lengths == ours.array_lengths,
        _data_size(ours) == _data_size(theirs),
    )


def _stored(file: GgufFile, name: str) -> bytes:
    entry = file.tensors[name]
    return file.read_rows(entry, 0, entry.n_bytes // entry.row_bytes).tobytes()


def _data_size(file: GgufFile) -> int:
    """Bytes of the file from the first tensor on."""
    return file.path.stat().st_size - min(entry.offset for entry in file.tensors.values())


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def page(found: Sequence[Compared]) -> str:
    """The page with the table, in Markdown."""
    lines = [*_INTRODUCTION, "| model | mix | bytes | same types | same bytes | metadata | size |"]
    lines.append("|---|---|---|---|---|---|---|")
    for one in found:
        shares = " | ".join(f"{same} of {one.tensors}" for same in (one.same_types, one.same_bytes))
        answers = " | ".join("same" if same else "**differs**" for same in (one.same_metadata, one.same_size))
        lines.append(f"| {one.model} | {one.mix} | {one.bytes:,} | {shares} | {answers} |")
    n_equal = sum(one.is_equal for one in found)
    return "\n".join([*lines, "", f"{n_equal} of {len(found)} files are equal.", ""])


if __name__ == "__main__":
    main()
