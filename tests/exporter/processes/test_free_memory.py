"""The memory that is free for a run, in the machine and within limits of the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.whole_run.control_group import control_group
from exporter.processes.free_memory import free_memory

_STAT = """\
anon 100
inactive_file 2000
active_file 1000
total_inactive_file 20000
total_active_file 10000
"""


def _group(folder: Path, limit: str, usage: int) -> None:
    folder.mkdir(parents=True)
    first = "memory" in folder.parts
    (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(f"{limit}\n")
    (folder / ("memory.usage_in_bytes" if first else "memory.current")).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(_STAT)


def _in_groups(root: Path, lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)


def test_without_a_limit_it_is_that_of_the_machine(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().available
    assert free_memory(tmp_path) == pytest.approx(machine, rel=0.2), "no control groups"
    _in_groups(tmp_path, "0::/user.slice\n")
    _group(tmp_path / "sys/fs/cgroup/user.slice", "max", 50_000)
    assert free_memory(tmp_path) == pytest.approx(machine, rel=0.2)


@pytest.mark.parametrize(("outer", "inner", "left"), [("max", "90000", 43_000), ("80000", "90000", 33_000)])
def test_the_narrowest_group_counts_less_what_it_can_drop(tmp_path: Path, outer: str, inner: str, left: int) -> None:
    _in_groups(tmp_path, "0::/user.slice/run.scope\n")
    _group(tmp_path / "sys/fs/cgroup/user.slice", outer, 50_000)
    _group(tmp_path / "sys/fs/cgroup/user.slice/run.scope", inner, 50_000)
    assert free_memory(tmp_path) == left


@pytest.mark.parametrize("place", ["", "docker/1f"])
def test_the_first_version_of_groups_has_a_tree_for_memory(tmp_path: Path, place: str) -> None:
    _in_groups(tmp_path, "5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/\n")
    _group(tmp_path / "sys/fs/cgroup/memory" / place, "90000", 70_000)  # without a place, as a container sees its own
    assert free_memory(tmp_path) == 50_000


def test_a_group_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    _in_groups(tmp_path, "0::/\n")
    _group(tmp_path / "sys/fs/cgroup", "40000", 50_000)
    assert free_memory(tmp_path) == 0


def test_a_process_in_a_group_has_what_the_group_leaves() -> None:
    print_it = "from exporter.processes.free_memory import free_memory; print(free_memory())"
    try:
        with control_group(300_000_000) as group:
            run = subprocess.run(
                group.inside([sys.executable, "-c", print_it]), capture_output=True, text=True, check=True
            )
    except SystemExit as error:
        pytest.skip(str(error))
    assert 200_000_000 < int(run.stdout) < 300_000_000
