"""The permitted outcomes of a damaged input: a result, or one sentence for the user."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from compressors.model.errors import MoeExportError

__all__ = ["complaint_about", "judge"]

_LONGEST = 1000  # characters of a message
_CPU_SECONDS = 20  # readers take milliseconds
_SECONDS = 120


class _TooLongError(BaseException):
    """Nothing of ours catches it."""


def judge(read: Callable[[], None], folder: Path) -> tuple[str, str | None]:
    """Runs a reader on what lies in a folder, in this process.

    Returns:
        How it ended (``read``, ``refused``, or what it should not have done), and what is wrong with that, if anything.
    """
    before = _names(folder.parent)
    try:
        with _time_limit():
            read()
    except _TooLongError:
        return "endless", f"it computes for more than {_CPU_SECONDS} s, or waits for more than {_SECONDS}"
    except MoeExportError as error:
        complaint = complaint_about(str(error), folder)
        outcome = ("refused", None) if complaint is None else ("message", complaint)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        return "traceback", f"{type(error).__name__}: {error!s:.300}"
    else:
        outcome = ("read", None)
    if _names(folder.parent) != before:
        return "written", f"files came or went: {sorted(_names(folder.parent) ^ before)[:3]}"
    return outcome


def complaint_about(message: str, folder: Path) -> str | None:
    """Says what is wrong with a message; None if it is one line that names a file or a flag."""
    if not message.isprintable():
        return f"control characters in the message {message[:300]!r}"
    if len(message) > _LONGEST:
        return f"a message of {len(message)} characters: {message[:200]!r}"
    if str(folder) not in message and re.search(r"--[a-z]+|MODEL|PATH", message) is None:
        return f"no file and no flag is named in {message!r}"
    return None


def _names(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@contextmanager
def _time_limit() -> Iterator[None]:
    """Limits of computing and of waiting: a busy machine takes longer for the same work."""
    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, _CPU_SECONDS),
        signal.SIGALRM: (signal.ITIMER_REAL, _SECONDS),
    }
    before = {number: signal.signal(number, _stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TooLongError
