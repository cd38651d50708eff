"""The files that ``make scale`` writes: a run that is measured again replaces its own figures and no others."""

from __future__ import annotations

import csv
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.scale.measure import ScaleRun, StageCost
from benchmarks.scale.results import record

_RUN = ScaleRun(shape="olmoe", layers=2, memory="1GB", threads=2)
_CALIBRATE = StageCost(
    stage="calibrate",
    seconds=12.34,
    peak_rss=900_000_000,
    runtime_peak_rss=None,
    storage_read=5_000_000,
    storage_written=6_000_000,
    calls_read=7_000_000,
    calls_written=8_000_000,
    output=9_000_000,
)
_VALIDATE = replace(_CALIBRATE, stage="validate_gguf", runtime_peak_rss=800_000_000)


def _record(run: ScaleRun, cost: StageCost, folder: Path) -> None:
    record(asdict(run), [asdict(cost)], folder)


def test_a_run_replaces_its_own_figures(tmp_path: Path) -> None:
    _record(_RUN, _CALIBRATE, tmp_path)
    _record(replace(_RUN, cold=True), _CALIBRATE, tmp_path)
    _record(_RUN, replace(_CALIBRATE, seconds=99.0), tmp_path)
    with (tmp_path / "scale.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["cold"], row["seconds"]) for row in rows] == [("True", "12.3"), ("False", "99.0")]
    assert (tmp_path / "scale.md").read_text().count("## olmoe, 2 layers, --memory 1GB") == 2


def test_the_table_says_what_exceeds_the_limit(tmp_path: Path) -> None:
    _record(_RUN, _CALIBRATE, tmp_path)
    assert "| calibrate | 12.3 | 900 | yes | 5 | 7 | 6 | 8 | 9 |" in (tmp_path / "scale.md").read_text()
    _record(_RUN, replace(_CALIBRATE, peak_rss=1_000_000_001), tmp_path)
    assert "| calibrate | 12.3 | 1,000 | NO |" in (tmp_path / "scale.md").read_text()
    _record(_RUN, _VALIDATE, tmp_path)
    assert "| runtime 800 MB by itself |" in (tmp_path / "scale.md").read_text()
