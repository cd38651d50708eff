"""The command line with all stages in this one process: starting a dozen takes longer than running a toy's stages.

python -m tests.exporter.one_process ARGUMENTS
"""

from __future__ import annotations

from exporter import pipeline, stage
from exporter.cli import main
from exporter.work import WorkDirectory
from validate.cost import peak_rss_bytes


def _run_here(work: WorkDirectory, name: str, group: str | None = None, *, alone: bool) -> stage.Outcome:
    error = stage._run(work, name, group)
    peak = peak_rss_bytes()
    return stage.Outcome(peak) if error is None else stage.Outcome(peak, str(error), error.exit_code)


if __name__ == "__main__":
    pipeline.run_in_process = _run_here
    main()
