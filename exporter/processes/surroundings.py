"""The settings that a stage inherits from the run, its environment variables and its output."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any

__all__ = ["STDERR", "Surroundings"]

STDERR = 2
_STDOUT = 1


class _OpenFile:
    """A file descriptor that is handed over when a process is started; there it arrives as a number."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _handed_over, (reduction.DupFd(self._descriptor),)


def _handed_over(descriptor: Any) -> int:
    number: int = descriptor.detach()
    return number


@dataclass(frozen=True)
class Surroundings:
    """Environment variables and output; multiprocessing itself hands over the working directory."""

    environment: Mapping[str, str]
    output: _OpenFile | int  # the number of the file descriptor, in the process that it was handed over to

    @classmethod
    def here(cls, output: int = STDERR) -> Surroundings:
        """The surroundings of this process, to be handed over; output goes to the file descriptor ``output``."""
        return cls(dict(os.environ), _OpenFile(output))

    def enter(self) -> None:
        """Applies them to this process. What libraries print, in C too, goes to the output from now on."""
        os.environ.clear()
        os.environ.update(self.environment)
        assert isinstance(self.output, int), "they are handed over first"
        for descriptor in (_STDOUT, STDERR):
            os.dup2(self.output, descriptor)
        os.close(self.output)
