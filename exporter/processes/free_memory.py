"""The memory that is free for a run: in a container it may be less than the machine has.

Docker, Kubernetes, systemd and Slurm set limits with control groups of Linux (cgroups(7)). A group counts the memory of
its processes, and the pages of files that they have read, which the kernel drops when the group needs room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["free_memory"]


@dataclass(frozen=True)
class _Interface:
    """The files of a version of control groups; ``limit`` is a word where there is none."""

    folder: str
    limit: str
    usage: str
    cached: tuple[str, ...]  # keys of ``memory.stat`` whose pages can be dropped, those of groups within included


_FIRST = _Interface(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_SECOND = _Interface("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file"))


def free_memory(root: Path = Path("/")) -> int:
    """The bytes that this process can still take: those free in the machine, or left by its control groups if fewer.

    Args:
        root: the folder in which ``proc`` and ``sys`` are mounted.
    """
    return min([psutil.virtual_memory().available, *_left_by_groups(root)])


def _left_by_groups(root: Path) -> Iterator[int]:
    """Yields the bytes left by the group of this process, and by each group that it lies in, where there is a limit."""
    groups = root / "proc/self/cgroup"
    if not groups.is_file():
        return
    for line in groups.read_text(encoding="utf-8").splitlines():
        _, resources, path = line.split(":", 2)
        if resources and "memory" not in resources.split(","):
            continue
        interface = _FIRST if resources else _SECOND
        top = root / interface.folder
        group = top / path.lstrip("/")  # a container may see its own group as the top, under a path that is not there
        for folder in (group, *group.parents):
            if folder == top.parent:
                break
            left = _left(folder, interface)
            if left is not None:
                yield left


def _left(group: Path, interface: _Interface) -> int | None:
    """The bytes that a group leaves; None if it has no limit, or is not there."""
    try:
        limit, usage, stat = (
            (group / name).read_text(encoding="ascii") for name in (interface.limit, interface.usage, "memory.stat")
        )
    except OSError:
        return None
    if not limit.strip().isdigit():
        return None
    values = dict(line.split() for line in stat.splitlines())
    cached = sum(int(values.get(key, 0)) for key in interface.cached)
    return max(0, int(limit) - int(usage) + cached)
