"""The events of a run, which ``--progress json`` prints as they stand here; docs/progress.md describes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

__all__ = [
    "BYTES",
    "EVENTS",
    "Advance",
    "DoneAlready",
    "Event",
    "Message",
    "StageBegins",
    "StageEnds",
    "View",
    "as_data",
]

BYTES = "bytes"
"""The unit of an :class:`Advance` that counts bytes."""


@dataclass(frozen=True)
class Message:
    """A sentence for people."""

    event: ClassVar[str] = "message"

    text: str


@dataclass(frozen=True)
class DoneAlready:
    """An earlier attempt finished a stage."""

    event: ClassVar[str] = "done_already"

    stage: str  # its name
    what: str  # its description for people
    number: int  # its place in the run, from 1
    of: int  # stages of the run, as far as they are known: a search may find that two files need stages of their own


@dataclass(frozen=True)
class StageBegins:
    """A stage begins."""

    event: ClassVar[str] = "stage_begins"

    stage: str
    what: str
    number: int
    of: int
    run_seconds_left: float | None  # None: nothing is known


@dataclass(frozen=True)
class Advance:
    """A stage has done some of its steps; a stage that does several things counts each of them from 0."""

    event: ClassVar[str] = "progress"

    stage: str
    unit: str  # "layers", "bytes", "steps", "tokens", "chunks" or "texts"
    done: int
    total: int
    seconds_left: float | None  # until ``total``, by the speed that was measured; None: not measured yet
    run_seconds_left: float | None


@dataclass(frozen=True)
class StageEnds:
    """A stage is finished."""

    event: ClassVar[str] = "stage_ends"

    stage: str
    what: str
    number: int
    of: int
    seconds: float
    peak_rss_bytes: int  # of its process


Event = Message | DoneAlready | StageBegins | Advance | StageEnds

EVENTS: tuple[type[Event], ...] = (Message, DoneAlready, StageBegins, Advance, StageEnds)

View = Callable[[Event], None]
"""Shows an event."""


def as_data(event: Event) -> dict[str, Any]:
    """The event as plain data, its name first."""
    values = {name: round(value, 1) if isinstance(value, float) else value for name, value in asdict(event).items()}
    return {"event": event.event} | values
