"""Machines that people have: how much of their memory a model may take, and how fast it is read.

Sizes of memory are in GiB, as shops give them. A graphics card keeps 1 GiB back, which is what llama.cpp leaves free by
itself (``--fit-target``); macOS lets a model have two thirds of a small machine's memory and three quarters of a large
one's; a laptop keeps 4 GiB for its system and its other programs. Bandwidths are those of the most common memory of
that size, by the makers' data sheets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from compressors.model.errors import InputError
from compressors.model.names import shown

__all__ = ["MACHINES", "Machine", "Memory", "budget_of", "machine_named", "machine_of", "machine_with"]

_GIB: Final = 2**30
_KEPT_BY_A_CARD: Final = _GIB
_KEPT_BY_A_COMPUTER: Final = 4 * _GIB


@dataclass(frozen=True)
class Memory:
    """A memory from which weights are read."""

    bytes: int  # that a model may take
    bandwidth: float  # bytes a second


@dataclass(frozen=True)
class Machine:
    """A machine; one with a graphics card may have the card's memory alone, or both."""

    name: str
    card: Memory | None
    ram: Memory | None

    @property
    def budget(self) -> int:
        """Bytes that a model may take in all."""
        return sum(memory.bytes for memory in (self.card, self.ram) if memory is not None)


def _card(gib: int, gigabytes_per_second: float) -> Machine:
    return Machine(f"{gib}gb-gpu", Memory(gib * _GIB - _KEPT_BY_A_CARD, gigabytes_per_second * 1e9), None)


def _mac(gib: int, gigabytes_per_second: float) -> Machine:
    share = gib * _GIB * 2 // 3 if gib <= 36 else gib * _GIB * 3 // 4
    return Machine(f"{gib}gb-mac", None, Memory(share, gigabytes_per_second * 1e9))


def _laptop(gib: int, gigabytes_per_second: float) -> Machine:
    return Machine(f"{gib}gb-laptop", None, Memory(gib * _GIB - _KEPT_BY_A_COMPUTER, gigabytes_per_second * 1e9))


_RAM_BANDWIDTH: Final = 80e9  # two channels of DDR5-5600 give 90e9 at most, of DDR4-3200 51e9
_CARD_BANDWIDTH: Final = 360e9  # a card of 12 GiB; those of 8 GiB have about 270e9, those of 24 GiB 900e9

MACHINES: Final[Mapping[str, Machine]] = {
    machine.name: machine
    for machine in (
        *(_card(8, 272), _card(12, 360), _card(16, 448), _card(24, 936), _card(32, 1792)),
        *(_mac(16, 120), _mac(24, 120), _mac(32, 150), _mac(48, 273), _mac(64, 410)),
        *(_laptop(16, 68), _laptop(32, 80), _laptop(64, 80)),
    )
}
"""The machines that have a name, by name."""


def machine_named(name: str, flag: str) -> Machine:
    """The machine of a name such as ``16gb-mac``.

    Raises:
        InputError: no machine has the name; the message names the flag and the machines.
    """
    machine = MACHINES.get(name.strip().lower())
    if machine is None:
        raise InputError(f"{flag}: '{shown(name)}' is no machine; known are {', '.join(MACHINES)}")
    return machine


def machine_of(card_bytes: int | None, ram_bytes: int | None) -> Machine:
    """A machine of which only the memory is known; its bandwidths are those of common parts.

    Args:
        card_bytes: the graphics card's memory, of which 1 GiB is kept back; None if there is none.
        ram_bytes: memory of the computer that a model may take; None if it may take none.

    Raises:
        InputError: the card is too small for anything.
    """
    card = None
    if card_bytes is not None:
        if card_bytes <= _KEPT_BY_A_CARD:
            raise InputError("--vram: llama.cpp keeps 1 GiB of a card free, so give the size of a card with more")
        card = Memory(card_bytes - _KEPT_BY_A_CARD, _CARD_BANDWIDTH)
    return Machine("yours", card, None if ram_bytes is None else Memory(ram_bytes, _RAM_BANDWIDTH))


def machine_with(budget: int, name: str) -> Machine:
    """A computer without a graphics card, on which a model may take so many bytes."""
    return Machine(name, None, Memory(budget, _RAM_BANDWIDTH))


def budget_of(text: str) -> int | None:
    """The bytes that a model may take on the machine of a name; None if no machine has it."""
    machine = MACHINES.get(text.strip().lower())
    return None if machine is None else machine.budget
