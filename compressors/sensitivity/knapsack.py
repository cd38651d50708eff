"""Which type each unit gets: the multiple-choice knapsack problem, solved to a stated gap.

A price of bytes turns the problem into one for each unit alone (Lagrangian relaxation; Everett, 1963); the best price
gives a lower bound L that no choice can undercut. A choice costs more than L by what each unit's option lies above the
unit's best at that price, and by the price of the bytes that it leaves. So options that alone lie further above than
the best known choice are out, and few are left; a list of partial choices without dominated ones (Nemhauser and
Ullmann, 1969) finds the best of those. The list is cut at a fixed length, and the gap to L says what that may cost.

Letters: U units, N options, S partial choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressors.model.errors import InputError
from compressors.sensitivity.table import TypeTable, Unit

__all__ = ["Allocation", "allocate", "smallest_bytes"]

_MOST_PARTIAL_CHOICES = 4096
_PRICE_STEPS = 200  # of the bisection: more than double precision can tell apart


@dataclass(frozen=True)
class Allocation:
    """A choice for every unit."""

    choices: dict[str, str]  # type by unit
    n_bytes: int
    second_order: float  # predicted divergence, nats
    seconds: float  # that decoding a token takes by them
    gap: float  # the best choice's cost can be lower by no more than this: nats


def smallest_bytes(table: TypeTable) -> int:
    """Bytes of the smallest choice."""
    return sum(min(option.n_bytes for option in unit.options) for unit in table.units)


def allocate(table: TypeTable, byte_limit: int, *, nats_per_second: float = 0.0) -> Allocation:
    """The choice of the lowest predicted divergence that fits.

    Args:
        table: units and their types.
        byte_limit: of all units together.
        nats_per_second: what a second that decoding takes longer is worth; its product is added to the divergence.

    Raises:
        InputError: a unit has no type, or the smallest choice does not fit; the message names what does.
    """
    empty = [unit.name for unit in table.units if not unit.options]
    if empty:
        raise InputError(f"{empty[0]} has no type that it may be written in; allow more types")
    smallest = smallest_bytes(table)
    if smallest > byte_limit:
        raise InputError(
            f"the smallest types need {smallest:,} bytes, more than {byte_limit:,}; the smallest limit that can be "
            f"met with these types is {smallest:,}"
        )
    units = [_Options.of(unit, nats_per_second) for unit in table.units]
    price = _best_price(units, byte_limit)
    chosen, bound = _search(units, byte_limit, price)
    return _allocation(table, units, chosen, bound)


@dataclass(frozen=True)
class _Options:
    """One unit's options that no other of its options undercuts in both bytes and cost, by rising bytes."""

    which_N: npt.NDArray[np.int64]  # place among the unit's options
    bytes_N: npt.NDArray[np.int64]
    cost_N: npt.NDArray[np.float64]

    @classmethod
    def of(cls, unit: Unit, nats_per_second: float) -> _Options:
        n_bytes = np.array([option.n_bytes for option in unit.options], dtype=np.int64)
        cost = np.array([option.second_order + nats_per_second * option.seconds for option in unit.options])
        order = np.lexsort((cost, n_bytes))
        kept = _not_dominated(cost[order])
        which = order[kept]
        return cls(which, n_bytes[which], cost[which])

    def at(self, price: float) -> npt.NDArray[np.float64]:
        """What each option costs if bytes have a price."""
        priced_N: npt.NDArray[np.float64] = self.cost_N + price * self.bytes_N
        return priced_N

    def best(self, price: float) -> int:
        """The cheapest at a price; of equals the smallest."""
        return int(self.at(price).argmin())


def _not_dominated(cost_N: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which of the options, sorted by bytes and then cost, cost less than all before them."""
    lowest_before = np.minimum.accumulate(np.concatenate([[np.inf], cost_N[:-1]]))
    kept_N: npt.NDArray[np.bool_] = cost_N < lowest_before
    return kept_N


def _best_price(units: Sequence[_Options], byte_limit: int) -> float:
    """The lowest price at which the units' own choices fit, which is where the bound is highest."""

    def n_bytes(price: float) -> int:
        return sum(int(unit.bytes_N[unit.best(price)]) for unit in units)

    if n_bytes(0.0) <= byte_limit:
        return 0.0
    low, high = 0.0, 1e-12
    while n_bytes(high) > byte_limit:
        low, high = high, high * 4
    for _ in range(_PRICE_STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if n_bytes(middle) <= byte_limit else (middle, high)
    return high


def _search(units: Sequence[_Options], byte_limit: int, price: float) -> tuple[list[int], float]:
    """The best choice found, an option for each unit, and the lower bound of any choice's cost."""
    greedy = [unit.best(price) for unit in units]
    above = [unit.at(price) - unit.at(price)[best] for unit, best in zip(units, greedy, strict=True)]
    bound = sum(float(unit.at(price)[best]) for unit, best in zip(units, greedy, strict=True)) - price * byte_limit
    room = byte_limit - sum(int(unit.bytes_N[best]) for unit, best in zip(units, greedy, strict=True))
    filled = _filled(units, greedy, room)
    most = _cost(units, filled) - bound  # what the best choice can lie above the bound
    partial = _Partial(room, price, most)
    for index in sorted(range(len(units)), key=lambda index: int((above[index] <= most).sum())):
        partial.extend(index, units[index].bytes_N - units[index].bytes_N[greedy[index]], above[index])
    found = partial.best(greedy)
    return (filled, bound) if found is None or _cost(units, found) >= _cost(units, filled) else (found, bound)


def _cost(units: Sequence[_Options], chosen: Sequence[int]) -> float:
    return float(sum(unit.cost_N[option] for unit, option in zip(units, chosen, strict=True)))


def _filled(units: Sequence[_Options], greedy: Sequence[int], room: int) -> list[int]:
    """Spends the room that is left on the best steps for their bytes, one unit after the other."""
    chosen = list(greedy)
    while True:
        steps = [
            (
                (unit.cost_N[chosen[index]] - unit.cost_N[option])
                / (unit.bytes_N[option] - unit.bytes_N[chosen[index]]),
                index,
                option,
            )
            for index, unit in enumerate(units)
            for option in range(chosen[index] + 1, len(unit.cost_N))
            if unit.bytes_N[option] - unit.bytes_N[chosen[index]] <= room
        ]
        if not steps:
            return chosen
        _, index, option = max(steps)
        room -= int(units[index].bytes_N[option] - units[index].bytes_N[chosen[index]])
        chosen[index] = option


class _Partial:
    """Choices for the units so far, by their bytes beyond the greedy choice's and what they lie above the bound.

    Args:
        room: bytes that the greedy choice leaves.
        price: of a byte.
        most: choices that lie further above the bound are out.
    """

    def __init__(self, room: int, price: float, most: float) -> None:
        self._room = room
        self._price = price
        self._most = most
        self._bytes_S = np.zeros(1, dtype=np.int64)
        self._above_S = np.zeros(1)
        self._steps: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # unit, parent, option

    def extend(self, unit: int, bytes_N: npt.NDArray[np.int64], above_N: npt.NDArray[np.float64]) -> None:
        """Gives one more unit each of its options."""
        options = np.flatnonzero(above_N <= self._most)
        n_bytes = (self._bytes_S[:, None] + bytes_N[options]).ravel()
        above = (self._above_S[:, None] + above_N[options]).ravel()
        order = np.lexsort((above, n_bytes))
        # in cost, not in what lies above the bound: fewer bytes are worth their price
        order = order[_not_dominated((above - self._price * n_bytes)[order])]
        order = order[above[order] <= self._most]
        if len(order) > _MOST_PARTIAL_CHOICES:
            order = np.sort(order[np.argpartition(above[order], _MOST_PARTIAL_CHOICES)[:_MOST_PARTIAL_CHOICES]])
            order = order[np.argsort(n_bytes[order], kind="stable")]
        self._bytes_S, self._above_S = n_bytes[order], above[order]
        self._steps.append((unit, order // len(options), options[order % len(options)]))

    def best(self, greedy: Sequence[int]) -> list[int] | None:
        """The complete choice of the lowest cost that fits."""
        fits = np.flatnonzero(self._bytes_S <= self._room)
        if not len(fits):
            return None
        place = int(fits[(self._above_S - self._price * self._bytes_S)[fits].argmin()])
        chosen = list(greedy)
        for unit, parents, options in reversed(self._steps):
            chosen[unit] = int(options[place])
            place = int(parents[place])
        return chosen


def _allocation(table: TypeTable, units: Sequence[_Options], chosen: Sequence[int], bound: float) -> Allocation:
    options = [
        unit.options[int(known.which_N[option])] for unit, known, option in zip(table.units, units, chosen, strict=True)
    ]
    return Allocation(
        {unit.name: option.choice for unit, option in zip(table.units, options, strict=True)},
        sum(option.n_bytes for option in options),
        sum(option.second_order for option in options),
        sum(option.seconds for option in options),
        max(0.0, _cost(units, chosen) - bound),
    )
