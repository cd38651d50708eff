"""Our files: the results of a budget of a given size, made by the functions of the tool itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from benchmarks.pareto.subject import Subject
from exporter.curve.rows import OURS
from exporter.file_names import WORK_SUFFIX
from exporter.pipeline.order import pareto_stages
from exporter.pipeline.running import run_stages
from exporter.planning.job import Flags
from exporter.planning.plan_making import make_plan
from exporter.processes.progress import Progress
from exporter.progress.run_progress import RunProgress
from exporter.progress.views import PlainLines
from exporter.searching.curve import ParetoFiles, described_structure
from exporter.stages.inputs import token_blocks, use_threads
from exporter.stages.table import PARETO
from exporter.work.directory import WorkDirectory
from exporter.work.stage import StageContext

__all__ = ["heldout_blocks", "measure_ours", "searched_files"]

_RECOVER_TIME = "12m"
_OUT = "export"


def searched_files(subject: Subject) -> ParetoFiles:
    """Runs the teacher and measures sensitivities, unless that is done; what follows happens in this process."""
    job = Flags(
        model=str(subject.checkpoint),
        budget=f"{2 * subject.bf16_bytes}B",
        budget_kind="file",
        formats="gguf,onnx",
        recover_time=_RECOVER_TIME,
        memory="4GB",
        threads=subject.threads,
        out=subject.folder / _OUT,
    ).job()
    work = _work(subject)
    if not work.plan_path.exists():
        work.folder.mkdir(parents=True, exist_ok=True)
        make_plan(job, "benchmarks.pareto").save(work.plan_path)
    plan = work.plan()
    run_stages(plan, work, pareto_stages()[:-1], RunProgress(PlainLines(print)))
    use_threads(plan)
    output = work.folder / "curve"
    output.mkdir(exist_ok=True)
    return ParetoFiles(StageContext.of(PARETO, plan, work, Progress(), output))


def _work(subject: Subject) -> WorkDirectory:
    return WorkDirectory(subject.folder / f"{_OUT}{WORK_SUFFIX}")


def heldout_blocks(subject: Subject) -> npt.NDArray[np.int64]:
    """The held-out text as :func:`searched_files` cut it."""
    return token_blocks(_work(subject)).heldout.numpy()


def measure_ours(subject: Subject, files: ParetoFiles, sizes: Mapping[str, int]) -> None:
    """Measures the best file of at most so many bytes, for each label."""
    for label, n_bytes in sizes.items():
        if subject.rows.find(subject.name, OURS, label) is None:
            found = files.best(n_bytes)
            structure = described_structure(found.compress, subject.spec)
            subject.measure(
                OURS,
                label,
                lambda path, found=found: files.write(found).rename(path),
                structure=structure,
                predicted=found.predicted,
                budget=n_bytes,
            )
