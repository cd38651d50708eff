"""A run that searches for two budgets: what it finds and shares, and that its recipes make the same files again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from compressors.sensitivity import TypeTable
from exporter.estimating.disk import disk_by_stage
from exporter.planning.job import Flags
from exporter.planning.recipe import recipe_yaml
from exporter.progress.views import PlainLines
from exporter.publishing.result import final_recipe
from exporter.run import run_job
from exporter.searching import units
from exporter.searching.trial import Trial
from exporter.stages.search import search
from exporter.stages.table import GGUF, TEACHER_TEXTS
from exporter.work.directory import WorkDirectory
from exporter.writing.files import sha256_of
from exporter.writing.hf_checkpoint import write_checkpoint
from tests.exporter.stage_runs import stages_in_this_process

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]

_N_EXPERTS = 8
_BUDGETS = {"1.25MB": 1_250_000, "640KiB": 640 * 1024}
_LARGE, _SMALL = _BUDGETS
_MEASURED = 2  # files of each budget: a busy machine would measure fewer in its time, an idle one more


_LAST_RESORT = "Q2_0"
_TYPES = [ggml_type for ggml_type in units.ALLOCATED_TYPES if not ggml_type.name.startswith("IQ2")]
"""Without those whose tables take ggml's library most of the test's time; nor are the IQ1 types the last resort."""


def _look(trial: Trial) -> Look:
    whole = trial.context.work.stage("calibrate").parent
    built = sorted({path.parent.name for path in whole.rglob("trial-*/compress") if path.is_dir()})
    n_bytes = sum(512 * path.stat().st_blocks for path in whole.rglob("*") if path.is_file())
    tables = [TypeTable.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in whole.rglob("table-*.json")]
    measured = {option.choice for table in tables for unit in table.units for option in unit.options}
    plan = trial.context.plan
    announced = sum(disk_by_stage(plan)["search"].values())
    return Look(built, n_bytes, announced, measured, plan.recipe.budget.bytes)


@dataclass(frozen=True)
class Searched:
    """A finished run."""

    out: Path
    said: str
    reports: dict[str, dict[str, Any]]
    model: Path
    looks: list[Look]


@dataclass(frozen=True)
class Look:
    """The disk at a moment of the search."""

    built: list[str]  # folders of the structures, except the original, whose student lies there
    n_bytes: int  # in the work folder
    announced: int  # for the search
    measured: set[str]  # all types that were tried
    budget: int


@pytest.fixture(scope="module")
def few_experts(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint with one layer and a quarter of its experts: a search spends most of its time on their codes."""
    whole = toy_checkpoint(tmp_path_factory.mktemp("whole"), n_layers=1)
    folder = tmp_path_factory.mktemp("model") / "few-experts"
    source = open_source(whole)
    write_checkpoint(Student(source, ExpertMap.keeping(source.spec.n_experts, (tuple(range(_N_EXPERTS)),))), folder)
    for path in whole.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, small_texts: tuple[Path, Path]) -> tuple[Path, Path]:
    """(calibration, held-out): the beginnings of one of the toy job's files."""
    folder = tmp_path_factory.mktemp("texts")
    for source in small_texts:
        text = (source / "religion.txt").read_text(encoding="utf-8")
        (folder / source.name).mkdir()
        half = text[: text.rindex("\n\n", 0, len(text) // 2)]
        (folder / source.name / "religion.txt").write_text(half, encoding="utf-8")
    return folder / "calibration", folder / "heldout"


@pytest.fixture(scope="module")
def searched(
    tmp_path_factory: pytest.TempPathFactory, few_experts: Path, texts: tuple[Path, Path], run_command: Run
) -> Searched:
    out = tmp_path_factory.mktemp("search") / "out"
    calibration, heldout = texts
    inputs = [str(few_experts), "--calibration", str(calibration), "--text", str(heldout)]
    choices = ["--budget", ",".join(_BUDGETS), "--budget-kind", "file", "--formats", "gguf", "--context", "512"]
    limits = ["--threads", "1", "--recover-time", "3s"]
    looks: list[Look] = []
    build, judge = Trial.student, Trial.judged

    def student(trial: Trial) -> Student:
        built = build(trial)
        looks.append(_look(trial))
        return built

    def judged(trial: Trial, student: Student, write: Callable[[int], None] | None = None) -> float:
        def watched(layer: int) -> None:
            assert write is not None
            write(layer)
            looks.append(_look(trial))  # a layer of the file that is measured lies there too

        looks.append(_look(trial))
        return judge(trial, student, watched if write is not None else None)

    effort = mock.patch.object(search, "n_measured_files", lambda context: _MEASURED)
    watching = mock.patch.multiple(Trial, student=student, judged=judged)
    types = mock.patch.multiple(units, ALLOCATED_TYPES=_TYPES, LAST_RESORT={_LAST_RESORT})
    with effort, types, watching, stages_in_this_process():
        result = run_command([sys.executable, "-m", "exporter", *inputs, *choices, *limits, "--out", str(out)])
    assert result.returncode in (0, 4), result.stderr
    reports = {name: json.loads((out / name / "report.json").read_text(encoding="utf-8")) for name in _BUDGETS}
    return Searched(out, result.stderr, reports, few_experts, looks)


def test_each_budget_has_an_output_of_its_own_that_fits(searched: Searched) -> None:
    for name, n_bytes in _BUDGETS.items():
        (artifact,) = searched.reports[name]["artifacts"]
        assert 0.97 * n_bytes < artifact["bytes"] <= n_bytes
        assert artifact["bytes"] == searched.reports[name]["budget"]["predicted"]["gguf"]["file"]
    table = (searched.out / "README.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in _BUDGETS)


def test_calibration_and_sensitivities_are_made_once(searched: Searched) -> None:
    for what in ("run the teacher over the calibration text", "measure what each tensor's errors do to the output"):
        lines = [line for line in searched.said.splitlines() if what in line]
        assert [line.endswith("done already") for line in lines] == [False] + [True] * (len(lines) - 1)


def test_bits_go_first_and_then_width_or_experts(searched: Searched) -> None:
    large, small = (searched.reports[name]["recipe"]["compress"] for name in _BUDGETS)
    assert (large["experts"], large["width"]) == (_N_EXPERTS, None)
    assert small["experts"] < _N_EXPERTS or small["width"] is not None
    types = searched.reports[_LARGE]["recipe"]["gguf"]["tensors"]
    assert len(set(types.values())) > 2, "tensors have types of their own"


def test_the_lowest_measured_divergence_is_chosen_and_no_mix_beats_it(searched: Searched) -> None:
    for report in searched.reports.values():
        measured = {row["measured"]: row for row in report["search"] if row["measured"] is not None}
        assert measured[min(measured)]["is_chosen"]
    baselines = [row for row in searched.reports[_LARGE]["search"] if row["is_baseline"]]
    assert baselines, "mixes that fit were measured"
    assert not any(row["is_chosen"] for row in baselines)


def test_one_structure_lies_on_the_disk_at_a_time_and_no_more_than_was_announced(searched: Searched) -> None:
    assert len({name for look in searched.looks for name in look.built}) > 1, "several were built"
    assert max(len(look.built) for look in searched.looks) == 1
    assert all(look.n_bytes < look.announced + 2**20 for look in searched.looks)


def test_types_of_the_last_resort_are_only_measured_where_no_others_fit(searched: Searched) -> None:
    large, small = (
        set().union(*(look.measured for look in searched.looks if look.budget == n_bytes))
        for n_bytes in _BUDGETS.values()
    )
    assert {"Q8_0", "Q2_K"} <= large
    assert _LAST_RESORT not in large
    assert _LAST_RESORT in small, "all experts do not fit without"


class _Enough(Exception):
    pass


def test_a_recipe_that_was_found_makes_the_same_file_again(
    searched: Searched, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """The run ends when the file is written, and tuned if the first one was: what follows is as without a search."""
    calibration, heldout = texts
    recipe = searched.out / _LARGE / "recipe.yaml"
    job = Flags(
        model=str(searched.model), calibration=calibration, text=heldout, recipe=recipe, out=tmp_path / "x", seed=42
    ).job()

    def announce(line: str) -> None:
        if TEACHER_TEXTS.what in line:
            raise _Enough

    with pytest.raises(_Enough), stages_in_this_process():
        run_job(job, "moe-export", PlainLines(announce))
    work = WorkDirectory(tmp_path / "x.work")
    (first,), (again,) = (folder.glob("*.gguf") for folder in (searched.out / _LARGE, work.stage(GGUF.name)))
    assert first.name == again.name
    assert sha256_of(first) == sha256_of(again)
    assert recipe_yaml(final_recipe(work.plan(), work)) == recipe.read_text(encoding="utf-8")
