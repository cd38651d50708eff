"""``moe-export pareto``: how a model's divergence grows as its file gets smaller, beside llama.cpp's presets.

The files of every size are made by the stages of an export, measured in llama.cpp and removed; a table and a plot stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError
from compressors.model.names import shown
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from exporter.curve.chart import require_matplotlib, write_chart
from exporter.curve.rows import ParetoRow, RowFile
from exporter.curve.table import html_table, markdown_lines
from exporter.estimating.sizes import parse_size
from exporter.file_names import CURVE_PAGE, CURVE_PLOT, CURVE_TABLE, RESULTS, ROWS
from exporter.hub import resolve_model
from exporter.pipeline.order import pareto_stages
from exporter.pipeline.running import run_stages
from exporter.planning.job import Flags, Job
from exporter.planning.plan import Plan
from exporter.planning.plan_making import make_plan
from exporter.planning.preflight import refuse_too_little_disk
from exporter.progress.events import View
from exporter.progress.run_progress import RunProgress
from exporter.publishing.outputs import publish_folder, reserved
from exporter.run import job_identity
from exporter.searching.outlook import refuse_unless_something_fits
from exporter.searching.structures import structures_for
from exporter.work.directory import WorkDirectory, make_folder
from exporter.work.input_state import refuse_changed_texts
from exporter.writing.gguf.file_size import predict_file_size
from exporter.writing.gguf.mixes import ALIASES, MIXES
from validate.report.curve import render_curve

__all__ = ["DEFAULT_SIZES", "curve_plan", "publish_curve", "run_pareto"]

DEFAULT_SIZES = "Q6_K,Q5_K_M,Q4_K_M,IQ4_XS,Q3_K_M,Q2_K,IQ2_M,IQ2_XXS,15%,12%,9%"

_EXPLANATION = """\
# Divergence against bytes

Each row is a GGUF file, measured in llama.cpp on held-out text: *divergence* is the mean KL divergence from the
original's predictions in nats, with one standard error. Baselines are llama-quantize's mixes of the whole model and of
the experts that REAP keeps, with the importance matrix of the same calibration text; *moe-export* is what a budget of
that size gives. *Ratio*: its divergence over that of the best baseline of no more bytes.
"""


@dataclass(frozen=True)
class _Curve:
    """The plan of a curve, its work directory, and the identity that claims the directory."""

    plan: Plan
    work: WorkDirectory
    identity: Mapping[str, Any]


def run_pareto(
    model: str | None, sizes: str, out: Path, flags: Mapping[str, Any], command: str, view: View
) -> list[ParetoRow]:
    """Measures whatever is not measured yet, and writes a table and a plot into ``out``.

    Args:
        model: a local folder or hub id; None: the bundled model.
        sizes: sizes of the files, separated by commas: names of mixes, sizes such as 7GB, or shares such as 12% of the
            size in 16 bits.
        out: a folder that does not exist yet.
        flags: the flags of an export that apply (:class:`~exporter.planning.flags.Flags`).
        command: the command as it was typed.
        view: shows what happens.

    Raises:
        MoeExportError: a flag is wrong, nothing is as small as a size, or a stage failed; finished work stays.
    """
    require_matplotlib()
    job = _job(model, out, flags)
    _refuse_existing(job.out)
    curve = _curve(job, sizes, command)
    plan, work = curve.plan, curve.work
    with reserved(job.out), work.lock():
        _refuse_existing(job.out)  # another run has just published it
        work.claim(curve.identity)
        if not work.plan_path.exists():
            plan.save(work.plan_path)
        run_stages(plan, work, pareto_stages(), RunProgress(view))
        rows = RowFile(work.path("pareto", ROWS)).rows
        publish_curve(rows, work, job.out)
        work.remove()
    return rows


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise InputError(f"--out: {out} exists; choose another folder, or remove it")


def curve_plan(job: Job, sizes: str, command: str) -> Plan:
    """The plan of a curve.

    Raises:
        InputError: a size cannot be parsed.
        BudgetError: nothing is as small as a size that was named.
    """
    plan = make_plan(job, command)
    checkpoint = plan.open_source()
    assert plan.search is not None, "no mix is pinned"
    structures = structures_for(plan.search, checkpoint.spec)
    curve = _sizes(sizes, checkpoint, plan.recipe.source.model)
    for n_bytes in curve.values():
        budget = plan.recipe.budget.model_copy(update={"bytes": n_bytes})
        refuse_unless_something_fits(
            plan.recipe.model_copy(update={"budget": budget}), checkpoint, structures, ["gguf"]
        )
    return replace(plan, curve=curve)


def _job(model: str | None, out: Path, flags: Mapping[str, Any]) -> Job:
    """The job of an export with room for everything in 16 bits, from which the curve goes down."""
    checkpoint = open_source(resolve_model(model, flags.get("revision"), offline=bool(flags.get("offline"))))
    n_bytes = 2 * predict_file_size(checkpoint.spec, checkpoint, "BF16", "")
    return Flags(model=model, budget=f"{n_bytes}B", budget_kind="file", formats="gguf", out=out, **flags).job()


def _curve(job: Job, sizes: str, command: str) -> _Curve:
    work = WorkDirectory(job.work_dir)
    identity = job_identity(job) | {"command": "pareto", "sizes": sizes}
    if work.has_owner:
        work.claim(identity)
        if work.plan_path.exists():
            plan = work.plan()
            what_to_do = f"put it back, or remove {work.folder} and start again"
            refuse_changed_texts(plan.recipe.text, plan.calibration, plan.heldout, what_to_do)
            return _Curve(plan, work, identity)
    plan = curve_plan(job, sizes, command)
    refuse_too_little_disk([plan], work.folder, job.out)
    return _Curve(plan, work, identity)


def _sizes(text: str, checkpoint: Source, name: str) -> dict[str, int]:
    """Bytes by label."""
    found = {}
    for label in (part.strip() for part in text.split(",")):
        mix = ALIASES.get(label.upper(), label.upper())
        if mix in MIXES:
            n_bytes = predict_file_size(checkpoint.spec, checkpoint, mix, name)
        elif label.endswith("%"):
            in_16_bits = predict_file_size(checkpoint.spec, checkpoint, "BF16", name)
            n_bytes = int(_share(label) * in_16_bits)
        else:
            n_bytes = _bytes(label)
        found[label] = n_bytes
    return found


def _bytes(label: str) -> int:
    try:
        return parse_size(label, "--sizes")
    except InputError:
        raise InputError(
            f"--sizes: '{shown(label)}' is not a size; write the name of a mix such as Q4_K_M, bytes such as 7GB, or a "
            "share of the size in 16 bits such as 12%"
        ) from None


def _share(label: str) -> float:
    try:
        percent = float(label.removesuffix("%"))
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise InputError(f"--sizes: '{label}' is no share; write a number from 0 to 100 and %, such as 12%")
    return percent / 100


def publish_curve(rows: Sequence[ParetoRow], work: WorkDirectory, out: Path) -> None:
    """Puts rows, table and plot into a new folder, in one step."""
    folder = work.folder / RESULTS
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    kept = RowFile(ROWS.within(folder))
    for row in rows:
        kept.add(row)
    lines = [*_EXPLANATION.splitlines(), "", *markdown_lines(rows), "", f"![the curve]({CURVE_PLOT})"]
    (folder / CURVE_TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_chart(rows, folder / CURVE_PLOT)
    explanation = " ".join(_EXPLANATION.replace("*", "").splitlines()[2:])
    page = render_curve(rows[0].model, [explanation], html_table(rows), (folder / CURVE_PLOT).read_bytes())
    (folder / CURVE_PAGE).write_text(page, encoding="utf-8")
    publish_folder(folder, out.resolve(), work.folder)
