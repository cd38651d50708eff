"""Whole commands on damaged inputs, each in a process of its own, which may die or never end."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

# what a command imports, so that the forked processes have it
import exporter.hub
import exporter.inspection
import exporter.pipeline.running
import exporter.planning.plan_table
import exporter.run
import exporter.validation.revalidation
import exporter.validation.revalidation_table
import exporter.validation.task_runs  # noqa: F401
from exporter.cli import main
from tests.fuzz.oracle import complaint_about

__all__ = ["judge_command"]

_EXIT_CODES = {0: "0", 2: "2", 3: "3", 4: "4"}


def judge_command(words: Sequence[str], folder: Path, seconds: float) -> tuple[str, str | None]:
    """Runs ``moe-export`` with these words in a process forked from this one.

    Returns:
        How it ended (its exit code, or what it should not have done), and what is wrong with that, if anything.
    """
    place = folder.parent
    before = set(folder.rglob("*"))
    for name in ("cwd", "tmp"):
        (place / name).mkdir(exist_ok=True)
    errors = place / "stderr"
    process = os.fork()
    if process == 0:
        _run(words, place, errors)
    status = _wait(process, seconds)
    said = errors.read_text(encoding="utf-8", errors="replace")
    if status is None:
        return "endless", f"it goes on for more than {seconds:.0f} s"
    if os.WIFSIGNALED(status):
        return "signal", f"{signal.Signals(os.WTERMSIG(status)).name}: {said[-300:]!r}"
    code = os.WEXITSTATUS(status)
    if code not in _EXIT_CODES or "Traceback" in said:
        return "traceback", said[-400:]
    last = said.strip().rsplit("\n", 1)[-1]
    if code in (2, 3):
        complaint = (
            complaint_about(last.removeprefix("error: "), folder) if last.startswith("error: ") else f"{said[-300:]!r}"
        )
        if complaint is not None:
            return "message", complaint
    changed = set(folder.rglob("*")) ^ before
    left = changed | set((place / "cwd").rglob("*"))
    return ("written", f"files came or went: {sorted(map(str, left))[:3]}") if left else (_EXIT_CODES[code], None)


def _run(words: Sequence[str], place: Path, errors: Path) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()  # so that everything it starts ends with it
        os.chdir(place / "cwd")
        os.environ.update(TMPDIR=str(place / "tmp"), HOME=str(place / "tmp"))
        out = os.open(place / "stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        error = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(error, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["moe-export", *words]
        main(list(words), prog_name="moe-export")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(process: int, seconds: float) -> int | None:
    """The process's status; None if it had to be killed, with all that it started."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None
