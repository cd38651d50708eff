"""Every damage of every file, one after another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.damage.graph import FolderDamage, configuration_damages, graph_damages, tokenizer_file_damages
from benchmarks.damage.metadata import MetadataDamage, metadata_damages, rewrite, tokenizer_damages
from benchmarks.damage.sentencepiece import make_sentencepiece_original
from benchmarks.damage.weights import weight_damages
from benchmarks.damage.workshop import Result, Workshop, judge, make_original
from exporter.hub import resolve_model

__all__ = ["grid"]

_EXPERTS = 8  # of 32: files are small, and a role's damage is one expert's
_NAMES = {"gguf": "GGUF", "onnx": "ONNX"}


def grid(folder: Path, files: Sequence[str]) -> Iterator[Result]:
    """Yields what became of every damage of the files, given as ``gguf:Q8_0``."""
    original = make_original(resolve_model(None), folder / "original")
    workshop = Workshop.open(original, _EXPERTS)
    for named in files:
        file_format, _, preset = named.partition(":")
        yield from _weights(workshop, file_format, preset, folder / f"damaged.{file_format}")
    seen = set()
    for named in files:
        file_format, _, preset = named.partition(":")
        path = folder / f"whole-{preset}.{file_format}"
        workshop.write(workshop.student, file_format, preset, path)
        if file_format == "onnx":
            yield from _folder(
                workshop, path, f"ONNX {preset}", folder / "damaged-folder", everything="onnx" not in seen
            )
        elif "gguf" not in seen:
            metadata, tokens = metadata_damages(workshop.student.spec), tokenizer_damages(path)
            yield from _metadata(workshop, path, f"GGUF {preset}", "metadata", metadata)
            yield from _metadata(workshop, path, f"GGUF {preset}", "tokenizer", tokens)
        seen.add(file_format)
    if "gguf" in seen:
        other = Workshop.open(make_sentencepiece_original(original, folder / "sentencepiece"), _EXPERTS)
        path = folder / "sentencepiece.gguf"
        other.write(other.student, "gguf", "Q4_0", path)
        yield from _metadata(other, path, "GGUF Q4_0", "tokenizer, SentencePiece", tokenizer_damages(path))


def _weights(workshop: Workshop, file_format: str, preset: str, path: Path) -> Iterator[Result]:
    for damage in weight_damages(workshop.student):
        workshop.write(workshop.student.with_overlay(damage.overlay), file_format, preset, path)
        yield judge(workshop, path, f"{_NAMES[file_format]} {preset}", "weights", damage.what, damage.names)


def _metadata(
    workshop: Workshop, path: Path, file: str, kind: str, damages: Iterator[MetadataDamage]
) -> Iterator[Result]:
    target = path.with_name("damaged.gguf")
    for damage in damages:
        rewrite(path, target, damage.changes)
        yield judge(workshop, target, file, kind, damage.what, damage.names)


def _folder(workshop: Workshop, source: Path, file: str, target: Path, *, everything: bool) -> Iterator[Result]:
    kinds: dict[str, Iterator[FolderDamage]] = {"attributes": graph_damages(source)}
    if everything:
        kinds |= {"configuration": configuration_damages(source), "tokenizer": tokenizer_file_damages(source)}
    for kind, damages in kinds.items():
        for damage in damages:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
            damage.apply(target)
            yield judge(workshop, target, file, kind, damage.what, damage.names)
