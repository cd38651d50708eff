"""Keeps the state of a run, which takes up to an hour: one that was killed continues where it stopped."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from compressors.model.sources.student import Student
from compressors.recover.training import Training, train
from exporter.work.snapshot import Snapshot

__all__ = ["Unfinished"]

_STATE = "state.safetensors"
_SECONDS = "seconds"


class Unfinished:
    """A run's training, as far as it got, and the processor time that went into it.

    Args:
        folder: for it.
        pause: seconds between two looks at it, at least.
    """

    def __init__(self, folder: Path, pause: float = 30.0) -> None:
        self._snapshot = Snapshot(folder, pause)
        self._seconds_before = 0.0
        self._start = time.process_time()

    @property
    def seconds(self) -> float:
        """Processor time since this was made, and of the processes before this one."""
        return self._seconds_before + time.process_time() - self._start

    def train(self, training: Training) -> Student:
        """:func:`compressors.recover.training.train`, from where it stopped.

        Raises:
            TrainingDivergedError: a step made NaN or infinite values.
        """
        found = self._snapshot.load()
        if found is not None:
            tensors = load_file(found[1] / _STATE)
            training.restore(tensors)
            self._seconds_before = tensors[_SECONDS].item()

        def save(folder: Path) -> None:
            seconds = torch.tensor(self.seconds, dtype=torch.float64)
            save_file(training.state() | {_SECONDS: seconds}, folder / _STATE)

        return train(training, after_step=lambda training: self._snapshot.keep(training.n_done, save))

    def remove(self) -> None:
        """The run is done."""
        self._snapshot.remove()
