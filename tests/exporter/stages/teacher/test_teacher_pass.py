"""The teacher's pass, interrupted between two layers, goes on there and leaves the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressors.model.running.memory import MemoryLimit
from compressors.model.sources.opening import open_source
from exporter.file_names import SELECTION_PREDICTIONS
from exporter.stages.inputs import Blocks
from exporter.stages.teacher.teacher_pass import TeacherPass
from exporter.work.snapshot import Snapshot


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("pass"), n_layers=3)


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    generator = torch.Generator().manual_seed(4)
    return Blocks(*(torch.randint(0, 4096, (n, 32), generator=generator) for n in (5, 2, 3)))


def _pass(
    model: Path, blocks: Blocks, folder: Path, n_bytes: int = 10**12, *, layer_inputs: bool = True, targets: bool = True
) -> TeacherPass:
    limit = MemoryLimit(n_bytes, folder / "spill")
    checkpoint, device = open_source(model), torch.device("cpu")
    kept = {"layer_inputs": layer_inputs, "targets": targets}
    return TeacherPass(checkpoint, blocks, lambda file: file.within(folder), torch.bfloat16, limit, device, **kept)


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "spill" not in path.parts
    }


@pytest.fixture(scope="module")
def uninterrupted(model: Path, blocks: Blocks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    teacher = _pass(model, blocks, folder)
    assert sum(teacher.run_layers(Snapshot(folder / "snapshot"))) == 3
    teacher.write_predictions()
    return _contents(folder)


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("n_bytes", [1, 10**12])
def test_it_goes_on_after_the_last_finished_layer(
    model: Path, blocks: Blocks, uninterrupted: dict[str, bytes], tmp_path: Path, n_layers: int, n_bytes: int
) -> None:
    first = _pass(model, blocks, tmp_path, n_bytes).run_layers(Snapshot(tmp_path / "snapshot", seconds=0))
    assert next(first) == 0
    for _ in range(n_layers + 1):  # the snapshot is kept after a layer is reported
        next(first)
        assert len(list(tmp_path.glob("s*/*.npy"))) <= 2 * 3, "of each text the states in use, and a snapshot"
    first.close()
    teacher = _pass(model, blocks, tmp_path, n_bytes)
    done = list(teacher.run_layers(Snapshot(tmp_path / "snapshot", seconds=0)))
    assert done == [n_layers] + [1] * (3 - n_layers)
    teacher.write_predictions()
    assert _contents(tmp_path) == uninterrupted


def test_what_nothing_will_need_is_not_kept(
    model: Path, blocks: Blocks, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    teacher = _pass(model, blocks, tmp_path, 1, layer_inputs=False, targets=False)
    assert sum(teacher.run_layers(Snapshot(tmp_path / "snapshot", seconds=0))) == 3
    teacher.write_predictions()
    unneeded = ("layer_inputs/", "targets/")
    assert _contents(tmp_path) == {name: file for name, file in uninterrupted.items() if not name.startswith(unneeded)}
    assert not (tmp_path / "spill").exists()


def test_a_damaged_snapshot_starts_the_pass_anew(
    model: Path, blocks: Blocks, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    first = _pass(model, blocks, tmp_path).run_layers(Snapshot(tmp_path / "snapshot", seconds=0))
    for _ in range(3):
        next(first)
    first.close()
    (hidden,) = tmp_path.glob("snapshot/heldout-*.npy")
    hidden.write_bytes(hidden.read_bytes()[:-1] + b"?")
    teacher = _pass(model, blocks, tmp_path)
    assert next(iter(teacher.run_layers(Snapshot(tmp_path / "snapshot", seconds=1000)))) == 0
    assert sum(teacher.run_layers(Snapshot(tmp_path / "snapshot", seconds=1000))) == 3
    teacher.write_predictions()
    assert _contents(tmp_path) == uninterrupted


def test_without_selection_text_the_other_results_are_the_same(
    model: Path, blocks: Blocks, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    teacher = _pass(model, replace(blocks, selection=blocks.selection[:0]), tmp_path)
    assert sum(teacher.run_layers(Snapshot(tmp_path / "snapshot"))) == 3
    teacher.write_predictions()
    found, of_selection = _contents(tmp_path), SELECTION_PREDICTIONS.name
    assert len(found.pop(of_selection)) < len(uninterrupted[of_selection])
    assert found == {name: file for name, file in uninterrupted.items() if name != of_selection}
