"""A run that is resumed or repeated must find all three texts that it was planned for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compressors.model.errors import InputError
from exporter.planning.job import Flags
from exporter.planning.plan_making import make_plan
from exporter.progress.views import show_nothing
from exporter.run import run_job
from exporter.work.directory import WorkDirectory


@pytest.fixture
def texts(small_texts: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """(calibration, held-out), to be changed."""
    calibration, heldout = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in small_texts)
    return calibration, heldout


def _replace(file: Path, edit: Callable[[str], str]) -> None:
    """Same length, another word."""
    text = file.read_text(encoding="utf-8")
    changed = edit(text)
    assert changed != text
    file.write_text(changed, encoding="utf-8")


def _first_word(text: str) -> str:
    return "Another" + text[7:]


def _last_word(text: str) -> str:
    return text.rstrip()[:-7] + "another"


_CHANGES = [
    ("calibration", "calibration", _first_word),
    ("selection", "calibration", _last_word),
    ("held-out", "heldout", _last_word),
]


@pytest.mark.parametrize(("split", "folder", "edit"), _CHANGES)
def test_a_changed_text_is_refused_by_name_when_a_run_goes_on(
    split: str,
    folder: str,
    edit: Callable[[str], str],
    toy_model: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    calibration, heldout = texts
    place = tmp_path / folder
    out = tmp_path / "out"
    job = Flags(
        model=str(toy_model), budget="3MB", budget_kind="file", calibration=calibration, text=heldout, out=out
    ).job()
    job.work_dir.mkdir()
    make_plan(job, "moe-export").save(WorkDirectory(job.work_dir).plan_path)
    _replace(place / "religion.txt", edit)
    said = rf"{place} has changed since this run was planned: its {split} text is another; "
    with pytest.raises(InputError, match=said + "put it back, or remove .*out.work and start again"):
        run_job(job, "moe-export", show_nothing)
    assert not out.exists()
