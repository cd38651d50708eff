"""The curve of divergence against bytes: its rows stay, its sizes are kept, its baselines are those of llama.cpp."""

from __future__ import annotations

import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from compressors.calibration.statistics import importance
from compressors.model.errors import BudgetError, InputError
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.curve.chart import write_chart
from exporter.curve.command import curve_plan, publish_curve
from exporter.curve.rows import OURS, ParetoRow, RowFile, best_no_larger
from exporter.curve.table import markdown_lines
from exporter.file_names import ROWS
from exporter.pipeline.order import pareto_stages
from exporter.pipeline.running import run_stages
from exporter.planning.job import Flags
from exporter.planning.plan import Plan
from exporter.planning.recipe import Recipe
from exporter.processes.progress import Progress
from exporter.progress.run_progress import RunProgress
from exporter.progress.views import show_nothing
from exporter.searching import units
from exporter.searching.curve import ParetoFiles
from exporter.stages.inputs import teacher_statistics
from exporter.stages.search import pareto
from exporter.stages.table import PARETO
from exporter.work.directory import WorkDirectory
from exporter.work.stage import StageContext
from exporter.writing.gguf.writer import predict_file_size, write_gguf

_ROW = ParetoRow("toy", "all experts", "Q4_K_M", 1_000, 0.3, 0.01, 0.001, 0.9, 40.0)


def _rows() -> list[ParetoRow]:
    return [
        _ROW,
        replace(_ROW, mix="IQ2_M", n_bytes=600, divergence=0.008),
        replace(_ROW, mix="Q6_K", n_bytes=2_000, divergence=0.002),
        replace(_ROW, model="other", mix="Q2_K", n_bytes=10, divergence=0.0001),
        replace(
            _ROW, method=OURS, n_bytes=999, divergence=0.004, structure="all 8 experts", predicted=0.0035, budget=1_000
        ),
    ]


def test_rows_are_kept_and_replaced_by_their_key(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "rows.csv")
    for row in _rows():
        rows.add(row)
    assert RowFile(rows.path).rows == _rows()
    rows.add(replace(_ROW, divergence=0.5))
    again = RowFile(rows.path)
    assert len(again.rows) == len(_rows())
    assert again.find("toy", "all experts", "Q4_K_M") == replace(_ROW, divergence=0.5)
    assert again.find("toy", OURS, "Q6_K") is None


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("model,method\ntoy,reap\n")
    with pytest.raises(InputError, match=r"rows\.csv is no table"):
        RowFile(tmp_path / "rows.csv")


def test_ours_stands_beside_the_best_baseline_that_is_no_larger() -> None:
    ours = _rows()[-1]
    assert best_no_larger(_rows(), ours) == _rows()[1]
    assert best_no_larger(_rows(), replace(ours, budget=599)) is None
    (line,) = (line for line in markdown_lines(_rows()) if line.startswith("| moe-export"))
    assert line.endswith("| all experts, IQ2_M: 0.00800 | 0.50 |")


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    write_chart(_rows(), tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_what_stays_is_a_table_and_a_plot(tmp_path: Path) -> None:
    work, out = WorkDirectory(tmp_path / "work"), tmp_path / "curve"
    publish_curve(_rows(), work, out)
    assert sorted(path.name for path in out.iterdir()) == ["pareto.csv", "pareto.html", "pareto.md", "pareto.png"]
    assert RowFile(out / "pareto.csv").rows == _rows()
    page = (out / "pareto.html").read_text()
    assert b64encode((out / "pareto.png").read_bytes()).decode() in page
    for row in _rows():
        assert f"| {row.method}, {row.mix} |" in (out / "pareto.md").read_text()
        assert f"{row.method}, {row.mix}" in page
    with pytest.raises(InputError, match="was made by somebody else meanwhile"):
        publish_curve(_rows(), work, out)


@pytest.fixture(scope="module")
def plan(toy_model: Path, small_texts: tuple[Path, Path]) -> Plan:
    """A curve of one size for the toy model, with little text."""
    planned = curve_plan(_flags(toy_model, small_texts).job(), "Q3_K_M", "moe-export pareto")
    recipe = planned.recipe.model_dump()
    recipe["text"] |= {"calibration_blocks": 2, "selection_blocks": 1, "heldout_chunks_per_file": 1}
    return replace(planned, recipe=Recipe.model_validate(recipe))


def _flags(model: Path, texts: tuple[Path, Path]) -> Flags:
    calibration, text = texts
    return Flags(
        model=str(model),
        calibration=calibration,
        text=text,
        budget="90MB",
        budget_kind="file",
        formats="gguf",
        context=512,
        threads=1,
    )


def test_sizes_are_mixes_bytes_or_shares(toy_model: Path, small_texts: tuple[Path, Path]) -> None:
    planned = curve_plan(_flags(toy_model, small_texts).job(), "Q4_K_M, 9MB,25%", "moe-export pareto")
    source, name = open_source(toy_model), planned.recipe.source.model
    expected = {mix: predict_file_size(source.spec, source, mix, name) for mix in ("Q4_K_M", "BF16")}
    assert planned.curve == {"Q4_K_M": expected["Q4_K_M"], "9MB": 9_000_000, "25%": expected["BF16"] // 4}


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ("Q4_K_M,12 %%", InputError, "'12 %%' is no share"),
        ("Q4_X", InputError, "'Q4_X' is not a size"),
        ("1kB", BudgetError, "The smallest budget that works is"),
    ],
)
def test_sizes_that_cannot_be(
    toy_model: Path, small_texts: tuple[Path, Path], sizes: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        curve_plan(_flags(toy_model, small_texts).job(), sizes, "moe-export pareto")


@pytest.fixture(scope="module")
def context(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    """The stage's, after those before it."""
    work = WorkDirectory(tmp_path_factory.mktemp("pareto"))
    plan.save(work.plan_path)
    run_stages(plan, work, pareto_stages()[:-1], RunProgress(show_nothing))
    context = StageContext.of(PARETO, plan, work, Progress())
    context.output.mkdir()
    return context


@pytest.mark.usefixtures("torch_left_as_it_was")
def test_a_baseline_is_the_file_that_llama_quantize_would_write(context: StageContext, tmp_path: Path) -> None:
    path = ParetoFiles(context).write_mix("Q4_K_M")
    student = Student.teacher(open_source(context.plan.source))
    statistics = teacher_statistics(context.plan, context.work)
    name = context.plan.recipe.source.model
    write_gguf(
        student,
        "Q4_K_M",
        tmp_path / "expected.gguf",
        importance=importance(statistics, student.experts, student.spec),
        name=name,
        threads=1,
    )
    assert path.read_bytes() == (tmp_path / "expected.gguf").read_bytes()


@pytest.mark.usefixtures("torch_left_as_it_was")
def test_the_stage_measures_what_has_no_row_yet(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [GGMLQuantizationType[name] for name in ("Q6_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")]
    monkeypatch.setattr(units, "ALLOCATED_TYPES", few)  # or half a minute goes into errors of types
    monkeypatch.setattr(pareto, "MIXES", ("Q3_K_M",))
    monkeypatch.setattr(pareto, "MIXES_OF_PRUNED", ("Q4_0",))
    known = replace(_ROW, model=context.plan.recipe.source.model, method="REAP 50%", mix="Q4_0")
    RowFile(context.file(ROWS)).add(known)
    PARETO.run(context)
    rows = RowFile(context.file(ROWS))
    assert rows.find(*known.key) == known  # of the attempt before
    preset, pruned, ours = (rows.find(known.model, *key) for key in _EXPECTED)
    assert preset is not None and pruned is not None and ours is not None and len(rows.rows) == 4
    assert ours.n_bytes <= ours.budget == context.plan.curve["Q3_K_M"] == preset.n_bytes
    assert ours.divergence < preset.divergence < pruned.divergence
    before = (context.file(ROWS)).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ParetoFiles, "_built", _fails)
        PARETO.run(context)
    assert (context.file(ROWS)).read_bytes() == before


_EXPECTED = (("all experts", "Q3_K_M"), ("REAP 25%", "Q4_0"), (OURS, "Q3_K_M"))


def _fails(*_arguments: object) -> Path:
    raise AssertionError("everything is measured")


def test_the_command_refuses_a_folder_that_exists(
    tmp_path: Path, toy_model: Path, run_command: Callable[[Sequence[str]], subprocess.CompletedProcess[str]]
) -> None:
    done = run_command([sys.executable, "-m", "exporter", "pareto", str(toy_model), "--out", str(tmp_path)])
    assert done.returncode == 2 and "exists; choose another folder" in done.stderr
