"""A control group of Linux that holds a command, with all its processes, to a limit of memory.

The kernel counts what the processes have of their own and the pages of files that they brought into memory, mapped or
not. Where they reach the limit it drops such pages, and reads them again when they are asked for; if nothing can be
dropped it ends a process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ControlGroup", "control_group"]

_ROOT = Path("/sys/fs/cgroup")
_INSIDE = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


@dataclass(frozen=True)
class ControlGroup:
    """A group that exists.

    Args:
        folder: in which the kernel shows it.
        peak: the file with the most memory that its processes have taken at once.
    """

    folder: Path
    peak: str

    def inside(self, command: Sequence[str | Path]) -> list[str | Path]:
        """The command, run in the group."""
        return ["sh", "-c", _INSIDE, self.folder, *command]

    @property
    def peak_bytes(self) -> int:
        """The most memory that its processes have taken at once, pages of files included."""
        return int((self.folder / self.peak).read_text(encoding="ascii"))


@contextmanager
def control_group(n_bytes: int, root: Path = _ROOT) -> Iterator[ControlGroup]:
    """Makes a group that may take so much memory and no swap; it is removed when all its processes have ended.

    Raises:
        SystemExit: this user may not make one, or there are none.
    """
    first = (root / "memory").is_dir()  # each resource has its own tree in the first version of control groups
    folder = (root / "memory" if first else root) / f"moe-export-whole-run-{os.getpid()}"
    limit, swap, peak = (
        ("memory.limit_in_bytes", "memory.swappiness", "memory.max_usage_in_bytes")
        if first
        else ("memory.max", "memory.swap.max", "memory.peak")
    )
    try:
        folder.mkdir()
        (folder / limit).write_text(str(n_bytes), encoding="ascii")
        (folder / swap).write_text("0", encoding="ascii")
    except OSError as error:
        raise SystemExit(f"{folder}: a control group with a limit of memory cannot be made ({error})") from error
    try:
        yield ControlGroup(folder, peak)
    finally:
        folder.rmdir()
