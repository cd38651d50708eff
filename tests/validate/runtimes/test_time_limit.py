"""The kernel ends a step that does not end by itself; long work in many steps goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from validate.runtimes.time_limit import patience

_REPOSITORY = Path(__file__).parents[3]
_BEGIN = """import ctypes, time
from validate.runtimes.time_limit import set_limit, working
sleep = ctypes.CDLL(None).usleep
"""
_ENDLESS = "with working():\n    ctypes.PyDLL(None).sleep(60)\n"  # holds Python's lock, as no runtime should


def _ends_with(program: str) -> int:
    return subprocess.run([sys.executable, "-c", _BEGIN + program], cwd=_REPOSITORY, check=False).returncode


def test_a_step_that_does_not_end_is_ended() -> None:
    assert _ends_with(f"set_limit(0.3)\n{_ENDLESS}") == -signal.SIGALRM


@pytest.mark.parametrize(
    "program",
    [
        "set_limit(1)\nfor _ in range(15):\n    with working():\n        sleep(100_000)\n",
        "set_limit(1)\nwith working():\n    pass\ntime.sleep(1.5)\n",
        "set_limit(1)\nwith working():\n    for _ in range(15):\n        with working(): sleep(100_000)\n",
        "with working():\n    sleep(800_000)\n",
    ],
    ids=["many steps", "between steps", "steps inside a step", "no limit"],
)
def test_what_takes_long_in_steps_that_end_is_not_ended(program: str) -> None:
    assert _ends_with(program) == 0


def test_large_files_long_chunks_and_slow_machines_have_more_time() -> None:
    least = patience(0)
    assert patience(20_000_000_000) > 1000 + least
    assert patience(0, n_tokens=8192) == 16 * least
    assert patience(0, reference_seconds=100.0) > 1000
