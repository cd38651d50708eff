"""One damaged input: made from its kind, its number and a seed alone, the same on every machine."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.commands import judge_command
from tests.fuzz.kinds import KINDS, Kind
from tests.fuzz.oracle import judge
from tests.fuzz.places import remove

__all__ = ["Case", "cases_of"]


@dataclass(frozen=True)
class Case:
    """The number-th input of a kind."""

    kind: str
    number: int
    seed: int

    @property
    def name(self) -> str:
        """The name of the case, as the command line takes it."""
        return f"{self.kind}:{self.number}"

    @property
    def of_kind(self) -> Kind:
        """The description of its kind."""
        return KINDS[self.kind]

    @contextmanager
    def made(self, inputs: Path, place: Path) -> Iterator[tuple[Path, random.Random]]:
        """The damaged input, in a folder below ``place`` that goes afterwards, and numbers to go on with."""
        rng = random.Random(f"{self.seed} {self.kind} {self.number}")
        folder = place / "case" / "input"
        remove(folder.parent)
        shutil.copytree(inputs / rng.choice(self.of_kind.sources), folder)
        if self.of_kind.damage is not None:
            self.of_kind.damage(rng, folder)
        try:
            yield folder, rng
        finally:
            remove(folder.parent)

    def read(self, inputs: Path, place: Path) -> tuple[str, str | None]:
        """Lets the tool's readers at it; see :func:`tests.fuzz.oracle.judge`."""
        with self.made(inputs, place) as (folder, rng), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a command shows none as an error
            return judge(lambda: self.of_kind.read(folder, rng, inputs), folder)

    def command(self, inputs: Path, place: Path, seconds: float) -> tuple[str, str | None]:
        """Gives it to a whole command; see :func:`tests.fuzz.commands.judge_command`."""
        assert self.of_kind.command is not None
        with self.made(inputs, place) as (folder, _):
            return judge_command(self.of_kind.command(folder, inputs), folder, seconds)


def cases_of(n_inputs: int, seed: int) -> list[Case]:
    """So many inputs, shared among the kinds."""
    whole = sum(kind.share for kind in KINDS.values())
    counts = {name: max(1, n_inputs * kind.share // whole) for name, kind in KINDS.items()}
    counts["safetensors"] += n_inputs - sum(counts.values())
    return [Case(name, number, seed) for name, count in counts.items() for number in range(count)]
