"""Opens a file that somebody else wrote in a separate process with limits; the death of that process is a finding.

A runtime asserts, crashes, exhausts memory or never ends when a file's metadata or graph contradict themselves. So
the process that reports on such a file never opens it. The other process answers with plain data, as JSON, and writes
arrays into a folder of the caller.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import psutil

from compressors.model.errors import InputError, MoeExportError
from exporter.processes.child_process import Child, Death, run_child
from exporter.processes.free_memory import free_memory
from exporter.processes.surroundings import Surroundings
from validate.files.model_file import ModelFile
from validate.runtimes import time_limit
from validate.runtimes.backend import RuntimeCrashError
from validate.runtimes.cost import CHUNK_TOKENS
from validate.runtimes.last_words import last_words
from validate.runtimes.lifetime import end_with_creator
from validate.runtimes.time_limit import patience

__all__ = ["Limits", "run_guarded"]

_LEAST_BYTES = 4 << 30
"""Memory for a small file: the logits of a chunk, several times over, and the libraries."""
_TIMES_ITS_SIZE = 8  # a runtime may unpack 4-bit codes into float32, and pack them again for its kernels
_NO_MEMORY = re.compile(r"can't allocate memory|bad_?alloc|bad allocation|[Ff]ailed to allocate", re.ASCII)


@dataclass(frozen=True)
class Limits:
    """The time and memory that a process may take."""

    seconds: float  # for a step, such as a chunk
    memory_bytes: int | None = None  # private memory beyond that at the start; None: no limit

    @classmethod
    def of_file(
        cls, file: ModelFile, *, n_tokens: int = CHUNK_TOKENS, reference_seconds: float = 0.0, on_gpu: bool = False
    ) -> Limits:
        """Limits that every valid file of this size stays within.

        Args:
            file: the file to open.
            n_tokens: length of a chunk.
            reference_seconds: the time that the reference took for a chunk; 0 if it is not known.
            on_gpu: True if a GPU is used; its driver reserves address space freely, so memory is not limited.
        """
        n_bytes = file.n_bytes
        there_is = free_memory() + psutil.swap_memory().free
        memory = None if on_gpu else min(there_is, _LEAST_BYTES + _TIMES_ITS_SIZE * n_bytes)
        return cls(patience(n_bytes, n_tokens, reference_seconds), memory)

    def enter(self, tell: Callable[[str], None]) -> None:
        """Applies the limits to this process."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.memory_bytes is not None and sys.platform == "linux":
            _, most = resource.getrlimit(resource.RLIMIT_DATA)
            limit = _private_bytes() + self.memory_bytes
            if most == resource.RLIM_INFINITY or limit < most:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        time_limit.set_limit(self.seconds, tell)


@dataclass
class _Messages:
    """The messages that the process sent."""

    doing: str = "opening it"
    result: dict[str, Any] | None = field(default=None)

    def take(self, message: bytes) -> None:
        content = json.loads(message)
        if "doing" in content:
            self.doing = content["doing"]
        else:
            self.result = content


def run_guarded(file: ModelFile, limits: Limits, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls ``function(*arguments)`` in a process of its own.

    Args:
        file: the file that the function opens, for messages.
        limits: the limits of the process.
        function: a function at a module's top level that returns plain data for JSON.
        *arguments: values of this program; none may come from the file.

    Returns:
        The function's result.

    Raises:
        MoeExportError: the function refused the file; the error has its exit code.
        RuntimeCrashError: the process died, did not end, or failed; the message says in one line what happened.
    """
    messages = _Messages()
    with tempfile.TemporaryFile() as output:
        child = Child(_work, (function, arguments, limits), output=output.fileno(), leads_group=True)
        death = run_child(child, messages.take)
        result = messages.result
        if result is None:
            raise RuntimeCrashError(_obituary(file, death, limits, messages.doing, output))
    if "failure" in result:
        raise RuntimeCrashError(f"{result['failure']} (while {messages.doing})")
    if "error" in result:
        raise _refusal(result["error"], result["exit_code"])
    return result["answer"]


def _obituary(file: ModelFile, death: Death, limits: Limits, doing: str, output: IO[bytes]) -> str:
    if death.returncode == -signal.SIGALRM:
        return f"{file.runtime} was ended, because {doing} did not come on for {limits.seconds:,.0f} s"
    if death.returncode == -signal.SIGKILL:
        return f"{file.runtime} {death} while {doing}; if nobody killed it, the system ran out of memory"
    said = last_words(output, aborted=death.returncode == -signal.SIGABRT)
    return f"{file.runtime} {death} while {doing}" + (f": {said}" if said else "")


def _refusal(message: str, exit_code: int) -> MoeExportError:
    error = InputError(message) if exit_code == InputError.exit_code else MoeExportError(message)
    error.exit_code = exit_code
    return error


def _work(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    limits: Limits,
    surroundings: Surroundings,
    answers: Connection[bytes, None],
) -> None:
    """Runs in the guarded process: calls the function and sends back its answer."""
    os.setsid()  # ending it also ends the processes that it starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    surroundings.enter()
    end_with_creator()
    os.environ["GGML_NO_BACKTRACE"] = "1"  # a debugger would print for half a minute
    limits.enter(lambda what: answers.send_bytes(json.dumps({"doing": what}).encode()))
    result = _result(function, arguments, limits)
    answers.send_bytes(json.dumps(result).encode())


def _result(function: Callable[..., Any], arguments: tuple[Any, ...], limits: Limits) -> dict[str, Any]:
    """Returns the answer, or one line that says why there is none; every exception is blamed on the file."""
    try:
        return {"answer": function(*arguments)}
    except RuntimeCrashError as failure:
        return {"failure": _one_line(failure)}
    except MoeExportError as refusal:
        return {"error": str(refusal), "exit_code": refusal.exit_code}
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return {"error": f"{where}{error.strerror or error}", "exit_code": InputError.exit_code}
    except Exception as error:
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            return {"failure": _too_large(limits)}
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "failure": f"it contradicts itself, or this program cannot read it: {type(error).__name__}: "
            f"{_one_line(error)} ({Path(place.filename).name}:{place.lineno})"
        }


def _too_large(limits: Limits) -> str:
    allowed = "there is" if limits.memory_bytes is None else f"the {limits.memory_bytes / 1e9:.1f} GB that it may take"
    return f"it asks for more memory than {allowed}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _private_bytes() -> int:
    """The bytes that count against RLIMIT_DATA (VmData of proc(5)): writable private memory, no mapped files."""
    return psutil.Process().memory_info().data
