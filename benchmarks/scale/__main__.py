"""``make scale``: the runs whose figures are committed, one after the other."""

from __future__ import annotations

import shutil

from benchmarks.scale.measure import DEFAULT_FOLDER, ScaleRun, measure_and_record, source_folder

_RUNS = (
    ScaleRun(shape="olmoe", layers=16, memory="3.5GB"),
    ScaleRun(shape="olmoe", layers=16, memory="3.5GB", cold=True),
    ScaleRun(shape="qwen3-30b", layers=6, memory="5GB"),
    ScaleRun(shape="qwen3-30b", layers=12, memory="5GB"),
)


def main() -> None:
    """Measures every run and writes its figures; one checkpoint is on the disk at a time."""
    DEFAULT_FOLDER.mkdir(parents=True, exist_ok=True)
    for run, following in zip(_RUNS, (*_RUNS[1:], None), strict=True):
        print(run)
        measure_and_record(run, DEFAULT_FOLDER, print)
        source = source_folder(run, DEFAULT_FOLDER)
        if following is None or source_folder(following, DEFAULT_FOLDER) != source:
            shutil.rmtree(source)


if __name__ == "__main__":
    main()
