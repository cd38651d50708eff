"""SIGKILL at random moments: at least thirty, and the files are the same bytes as without."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from exporter.writing.files import sha256_of
from tests.exporter.forked_program import ForkedProgram
from tests.exporter.found_processes import stage_of

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]
Command = Callable[..., Sequence[str]]

_KILLS = 30
_PLANNING = 1.5  # seconds: from the start until the first stages work
_MOMENT = 1.5  # kills fall into this many times the time that the stage took: a third of them hits a later one


def _sums(out: Path) -> str:
    """SHA256SUMS of a complete output folder, after checking that it tells the truth."""
    text = (out / "SHA256SUMS").read_text(encoding="utf-8")
    for line in text.splitlines():
        digest, name = line.split("  ")
        assert sha256_of(out / name) == digest, name
    return text


def _report(out: Path) -> Any:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def _without_times(report: Any) -> Any:
    """The report without what legitimately differs: times, rates, peaks, the command line."""
    differs = {
        "seconds",
        "load_seconds",
        "timings",
        "source_bytes_read",
        "peak_rss_bytes",
        "base_rss_bytes",
        "total",
        "reserve",
        "command",
    }
    if isinstance(report, dict):
        return {
            key: _without_times(value)
            for key, value in report.items()
            if key not in differs and not key.endswith(("_per_second", "speed_ratio"))
        }
    return [_without_times(item) for item in report] if isinstance(report, list) else report


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, toy_command: Command, tiny_recipe: Path, run_command: Run
) -> Path:
    """An uninterrupted run's output folder."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    result = run_command(toy_command(out, "--recipe", str(tiny_recipe)))
    assert result.returncode == 0, result.stderr
    return out


_STAGES_BETWEEN = 4  # less than so many are finished between one kill and the next


class _Attempt:
    """One start of the command."""

    def __init__(self, command: Sequence[str], out: Path) -> None:
        records = out.with_name(f"{out.name}.work").glob("*/stage.json")
        self._finished = {path.parent.name for path in records if path.parent.suffix != ".partial"}
        self._program = ForkedProgram(command)

    def wait_for_stage(self, n_before: int) -> int | None:
        """Which stage it begins with after so many others, counted from 0; None if it has none left.

        The stage's process is there then: the moment of the kill shall fall into its work, not into the server's start.
        None is done that was finished.
        """
        begun = number = 0
        for line in self._program.stderr:
            if not line.startswith("["):
                continue
            if not line.endswith("done already\n"):
                assert begun or number >= len(self._finished), f"one of {self._finished} is done again: {line}"
                if begun == n_before:
                    with suppress(AssertionError):  # it was quick, and the last
                        stage_of(self._program.pid)
                    return number
                begun += 1
            number += 1
        return None

    def kill(self, seconds: float, *, whole_group: bool) -> bool:
        """Kills it after this time; False if it had ended by itself."""
        if self._program.wait(seconds) is None:
            with suppress(ProcessLookupError):  # it may end in between
                (os.killpg if whole_group else os.kill)(self._program.pid, signal.SIGKILL)
            self._program.wait()
        self._program.stderr.close()
        return self._program.returncode == -signal.SIGKILL


def test_killed_at_random_moments_it_builds_the_same_bytes(
    uninterrupted: Path, toy_command: Command, tiny_recipe: Path, run_command: Run, tmp_path: Path
) -> None:
    expected = _sums(uninterrupted)
    seconds = list(_report(uninterrupted)["timings"].values())
    moments = random.Random(0)
    kills = runs = 0
    stages_hit = set()
    while kills < _KILLS:
        out = tmp_path / f"{runs}"
        attempt = _Attempt(toy_command(out, "--recipe", str(tiny_recipe)), out)
        early = kills % 3 == 2  # while it plans, looks at what is there, or takes its locks
        stage = None if early else attempt.wait_for_stage(moments.randrange(_STAGES_BETWEEN))
        longest = _PLANNING if stage is None else _MOMENT * seconds[stage]
        if attempt.kill(moments.uniform(0, longest), whole_group=kills % 2 == 0):
            kills += 1
            stages_hit.add(stage)
        if out.exists():  # published: complete, even if the process was killed a moment later
            assert _sums(out) == expected
            runs += 1
    assert len(stages_hit) > 3
    outs = [tmp_path / f"{run}" for run in range(runs + 1)]
    for out in outs:
        if not out.exists() or any(tmp_path.glob(f"{out.name}.*")):  # killed before, or just after publishing
            result = run_command(toy_command(out, "--recipe", str(tiny_recipe)))
            assert result.returncode == 0, result.stderr
        assert _sums(out) == expected
        assert _without_times(_report(out)) == _without_times(_report(uninterrupted))
    assert sorted(tmp_path.iterdir()) == sorted(outs), "unfinished work and locks go when a run is finished"
