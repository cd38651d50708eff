"""A sample of the grid of damaged files (``make damage`` is the whole): each is found, and named in words."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.damage.graph import configuration_damages, graph_damages, tokenizer_file_damages
from benchmarks.damage.metadata import metadata_damages, rewrite, tokenizer_damages
from benchmarks.damage.weights import weight_damages
from benchmarks.damage.workshop import Outcome, Result, Workshop, judge, make_original

_EVERY = 11  # damage is tried; which they are does not change from run to run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, fine_folder: Path) -> Workshop:
    return Workshop.open(make_original(fine_folder, tmp_path_factory.mktemp("grid") / "original"), n_experts=8)


@pytest.fixture(scope="module")
def gguf_file(workshop: Workshop) -> Path:
    path = workshop.source.path.parent / "whole.gguf"
    workshop.write(workshop.student, "gguf", "Q8_0", path)
    return path


@pytest.fixture(scope="module")
def onnx_folder(workshop: Workshop) -> Path:
    path = workshop.source.path.parent / "whole"
    workshop.write(workshop.student, "onnx", "Q4_0", path)
    return path


def _not_named(results: Iterator[Result]) -> list[Result]:
    found = list(results)
    assert len(found) > 3
    return [result for result in found if result.outcome is not Outcome.NAMED]


def test_whole_files_pass(workshop: Workshop, gguf_file: Path, onnx_folder: Path) -> None:
    for path in (gguf_file, onnx_folder):
        for kind in ("weights", "settings"):
            result = judge(workshop, path, "", kind, "", [])
            assert result.outcome is Outcome.MISSED, result.said


@pytest.mark.parametrize("named", [("gguf", "Q8_0"), ("onnx", "F32")], ids="-".join)
def test_damaged_weights(workshop: Workshop, tmp_path: Path, named: tuple[str, str]) -> None:
    def results() -> Iterator[Result]:
        for damage in list(weight_damages(workshop.student))[::_EVERY]:
            workshop.write(workshop.student.with_overlay(damage.overlay), *named, tmp_path / "damaged")
            yield judge(workshop, tmp_path / "damaged", named[0], "weights", damage.what, damage.names)

    assert _not_named(results()) == []


def test_damaged_metadata_and_tokenizer_of_gguf(workshop: Workshop, gguf_file: Path, tmp_path: Path) -> None:
    damages = [*metadata_damages(workshop.student.spec), *tokenizer_damages(gguf_file)]

    def results() -> Iterator[Result]:
        for damage in damages[::_EVERY]:
            rewrite(gguf_file, tmp_path / "damaged.gguf", damage.changes)
            yield judge(workshop, tmp_path / "damaged.gguf", "gguf", "metadata", damage.what, damage.names)

    assert _not_named(results()) == []


@pytest.mark.parametrize("damages", [graph_damages, configuration_damages, tokenizer_file_damages])
def test_damaged_graphs_and_folders(
    workshop: Workshop, onnx_folder: Path, tmp_path: Path, damages: Callable[[Path], Iterator]
) -> None:
    target = tmp_path / "damaged"

    def results() -> Iterator[Result]:
        for damage in list(damages(onnx_folder))[:: _EVERY // 3]:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(onnx_folder, target)
            damage.apply(target)
            yield judge(workshop, target, "onnx", "settings", damage.what, damage.names)

    assert _not_named(results()) == []
