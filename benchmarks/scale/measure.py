"""Runs the stages of an export of real shape one by one and records the cost of each.

    python -m benchmarks.scale.measure --shape olmoe --memory 3.5GB --blocks 32 --quant Q4_K

Seconds and peak memory are the stage records' (the operating system's maximum for the stage's process, mapped pages of
files included). Bytes are the kernel's: /proc/self/io of a process includes the children that it has waited for.
``storage`` counts bytes from and to the disk, ``calls`` those of read and write calls; mapped pages are only in the
first.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.scale.checkpoints import MODELS, with_layers, write_checkpoint
from benchmarks.scale.results import record
from compressors.model.config.reading import read_spec
from compressors.model.errors import MoeExportError
from exporter.file_names import MEASUREMENT
from exporter.pipeline.order import stages_of
from exporter.pipeline.running import run_stages
from exporter.planning.job import Flags
from exporter.planning.plan import Plan
from exporter.planning.plan_making import make_plan
from exporter.progress.run_progress import RunProgress
from exporter.progress.views import show_nothing
from exporter.work.directory import StageRecord, WorkDirectory
from exporter.work.stage import Stage

__all__ = ["DEFAULT_FOLDER", "ScaleRun", "StageCost", "measure_and_record", "source_folder"]

DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "moe-export-scale"
"""Holds checkpoints, which are kept, and the work of the run that goes on."""

_KEPT_EXPERTS = 3 / 4
_RECOVERY_STEPS = 2
_SELECTION_BLOCKS = 5
_CONTEXT = 512  # tokens that the runtimes' cost is measured with
_NO_LIMIT = "1000TB"


@dataclass(frozen=True)
class ScaleRun:
    """One run: what is exported, and what it may use."""

    shape: str  # of benchmarks.scale.checkpoints.MODELS
    layers: int
    memory: str  # as --memory takes it
    blocks: int = 32  # of calibration text, 512 tokens each
    formats: str = "gguf,onnx"  # as --formats takes it
    quant: str = "Q4_K"
    threads: int = os.cpu_count() or 1
    cold: bool = False  # the checkpoint is dropped from the page cache before each stage


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage; sizes in bytes."""

    stage: str
    seconds: float
    peak_rss: int
    runtime_peak_rss: int | None  # of a process with the runtime and the file alone, for stages that validate one
    storage_read: int
    storage_written: int
    calls_read: int
    calls_written: int
    output: int  # what the stage left


def measure_and_record(run: ScaleRun, folder: Path, announce: Callable[[str], None]) -> None:
    """Measures a run and puts each stage's figures into the results as soon as it is done.

    Raises:
        MoeExportError: a stage failed; its work directory stays.
    """
    costs = []
    for cost in _stage_costs(run, folder, announce):
        announce(f"{cost.stage}: {cost.seconds:.1f} s, {cost.peak_rss / 1e6:.0f} MB")
        costs.append(asdict(cost))
        record(asdict(run), costs)


def _stage_costs(run: ScaleRun, folder: Path, announce: Callable[[str], None]) -> Iterator[StageCost]:
    """Makes the checkpoint if ``folder`` has none of its kind, runs all stages and removes their outputs.

    Raises:
        MoeExportError: a stage failed; its work directory stays.
    """
    source = source_folder(run, folder)
    if not source.exists():
        announce(f"write {source}")
        write_checkpoint(with_layers(MODELS[run.shape], run.layers), source)
    work = WorkDirectory(folder / "run.work")
    shutil.rmtree(work.folder, ignore_errors=True)
    work.folder.mkdir()
    plan = _plan(run, source, folder)
    plan.save(work.plan_path)
    stages = stages_of(plan)
    for number, stage in enumerate(stages, start=1):
        if run.cold:
            _drop_from_page_cache(source)
        before = _io_counters()
        records = run_stages(plan, work, stages[:number], RunProgress(show_nothing))
        yield _cost(stage, work, records[stage.name], before)
    shutil.rmtree(work.folder)


def source_folder(run: ScaleRun, folder: Path) -> Path:
    """The folder of the run's checkpoint."""
    return folder / f"{run.shape}-{run.layers}-layers"


def _plan(run: ScaleRun, source: Path, folder: Path) -> Plan:
    job = Flags(
        model=str(source),
        budget=_NO_LIMIT,
        budget_kind="file",
        context=_CONTEXT,
        formats=run.formats,
        experts=int(_KEPT_EXPERTS * read_spec(source).n_experts),
        quant=run.quant,
        recover="router",
        memory=run.memory,
        threads=run.threads,
        out=folder / "run",
    ).job()
    plan = make_plan(job, command="")
    text = {
        "calibration_blocks": run.blocks,
        "selection_blocks": _SELECTION_BLOCKS,
        "heldout_chunks_per_file": 1,
    }
    (rung,) = plan.recipe.recover.rungs
    rung = rung.model_copy(update={"blocks": min(run.blocks, _RECOVERY_STEPS * rung.blocks_per_step)})
    recipe = plan.recipe.model_copy(
        update={
            "text": plan.recipe.text.model_copy(update=text),
            "recover": plan.recipe.recover.model_copy(update={"rungs": (rung,)}),
        }
    )
    return replace(plan, recipe=recipe, recover_seconds=0)


def _cost(stage: Stage, work: WorkDirectory, stage_record: StageRecord, before: dict[str, int]) -> StageCost:
    after = _io_counters()
    folder = work.stage(stage.name)
    return StageCost(
        stage=stage.name,
        seconds=stage_record.seconds,
        peak_rss=stage_record.peak_rss_bytes,
        runtime_peak_rss=_runtime_peak_rss(folder),
        storage_read=after["read_bytes"] - before["read_bytes"],
        storage_written=after["write_bytes"] - before["write_bytes"],
        calls_read=after["rchar"] - before["rchar"],
        calls_written=after["wchar"] - before["wchar"],
        output=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    )


def _runtime_peak_rss(folder: Path) -> int | None:
    path = MEASUREMENT.within(folder)
    measurement: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return measurement["cost"]["peak_rss_bytes"] if "cost" in measurement else None


def _io_counters() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def _drop_from_page_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a page that is not on the disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@click.command()
@click.option("--shape", type=click.Choice(sorted(MODELS)), required=True)
@click.option("--layers", type=click.IntRange(min=1), help="Decoder layers.  [default: as published]")
@click.option("--memory", metavar="SIZE", required=True, help="What each stage may use.")
@click.option("--blocks", default=ScaleRun.blocks, show_default=True, help="Calibration blocks of 512 tokens.")
@click.option("--formats", default=ScaleRun.formats, show_default=True)
@click.option("--quant", default=ScaleRun.quant, show_default=True)
@click.option("--threads", default=ScaleRun.threads, show_default=True)
@click.option("--cold", is_flag=True, help="Drop the checkpoint from the page cache before each stage.")
@click.option("--folder", type=click.Path(path_type=Path), default=DEFAULT_FOLDER, show_default=True)
def main(folder: Path, shape: str, layers: int | None, **choices: Any) -> None:
    """Measure one run and put its figures into benchmarks/results/scale.csv and scale.md."""
    run = ScaleRun(shape=shape, layers=layers or MODELS[shape]["num_hidden_layers"], **choices)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        measure_and_record(run, folder, click.echo)
    except MoeExportError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
