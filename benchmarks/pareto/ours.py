"""Our files: what a budget of a given size leads to, by the functions of the tool itself."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.pareto.subject import Subject
from exporter.compression import described_compression
from exporter.job import Flags
from exporter.pareto_rows import OURS
from exporter.pipeline import pareto_stages, run_stages
from exporter.plan_making import make_plan
from exporter.planning.pareto import ParetoFiles
from exporter.progress import Progress
from exporter.stage import StageContext
from exporter.stages.artifacts import use_threads
from exporter.work import WorkDirectory

__all__ = ["measure_ours", "searched_files"]

_RECOVER_TIME = "4m"


def searched_files(subject: Subject) -> ParetoFiles:
    """Runs the teacher and measures sensitivities, unless that is done; what follows happens in this process."""
    flags = Flags(
        model=str(subject.checkpoint),
        budget=f"{2 * subject.bf16_bytes}B",
        budget_kind="file",
        formats="gguf",
        recover_time=_RECOVER_TIME,
        memory="4GB",
        threads=subject.threads,
        out=subject.folder / "export",
    )
    job = flags.job()
    work = WorkDirectory(job.work_dir)
    if not work.plan_path.exists():
        work.folder.mkdir(parents=True, exist_ok=True)
        make_plan(job, "benchmarks.pareto").save(work.plan_path)
    plan = work.plan()
    run_stages(plan, work, pareto_stages()[:-1], print)
    use_threads(plan)
    output = work.folder / "curve"
    output.mkdir(exist_ok=True)
    return ParetoFiles(StageContext(plan, work, output, Progress(silent=True)))


def measure_ours(subject: Subject, files: ParetoFiles, sizes: Mapping[str, int]) -> None:
    """Measures the best file of at most so many bytes, for each label."""
    for label, n_bytes in sizes.items():
        if subject.rows.find(subject.name, OURS, label) is None:
            found = files.best(n_bytes)
            structure = described_compression(found.compress, subject.shape)
            subject.measure(
                OURS, label, lambda path, found=found: files.write(found).rename(path), structure, found.predicted
            )
