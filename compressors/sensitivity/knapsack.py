"""Chooses a type for each unit: the multiple-choice knapsack problem, solved to a stated gap.

A price of bytes turns the problem into one for each unit alone (Lagrangian relaxation; Everett, 1963); the best price
gives a lower bound L that no choice can undercut. A choice's excess over L is the sum of two parts: how far each unit's
option lies above the unit's best at that price, and the price of the bytes that are left. So an option that alone lies
further above L than the best known choice is excluded, and few are left; a list of partial choices without dominated
ones (Nemhauser and Ullmann, 1969) finds the best. The list is cut, and the gap to L bounds the loss.

Letters: U units, N options, S partial choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressors.model.errors import InputError
from compressors.sensitivity.divergence import DivergenceModel, SecondOrder
from compressors.sensitivity.table import Option, TypeTable

__all__ = ["Allocation", "allocate", "allocate_file", "smallest_bytes"]

_PARTIAL_CHOICES = 1 << 17  # of all units together, so that the time does not grow with their number
_LEAST_PARTIAL_CHOICES = 256  # of each unit; the more units, the less one of them counts, and the fewer are enough
_MOST_TANGENTS = 5
_SAME_PRICE = 1e-9  # relative difference of prices that is rounding, or comes from alike units in another order
_PRICE_STEPS = 200  # steps of the bisection: more than double precision can tell apart


@dataclass(frozen=True)
class Allocation:
    """A choice for every unit."""

    choices: dict[str, str]  # type by unit
    n_bytes: int
    order: SecondOrder  # predicted
    divergence: float  # predicted, nats
    seconds: float  # predicted, to decode a token with these types
    gap: float
    """No choice is better by more than this many nats, at this price of errors that routers see."""


def smallest_bytes(table: TypeTable) -> int:
    """Bytes of the smallest choice."""
    return sum(min(option.n_bytes for option in unit.options) for unit in table.units)


def allocate(
    table: TypeTable,
    byte_limit: int,
    model: DivergenceModel | None = None,
    *,
    nats_per_second: float = 0.0,
) -> Allocation:
    """Finds the choice of the lowest predicted divergence that fits.

    The divergence is not a sum over units, because of its square root. But it is concave, so the best choice is also
    the best by its own tangent; such a choice is found by solving with the tangent at the last solution.
    (It need not be the only one: in trials the best of all choices was at most 1 % better, mostly the same.)

    Args:
        table: units and their types.
        byte_limit: the most bytes of all units together.
        model: turns second order into nats; None: the default.
        nats_per_second: price of a second of decoding; its product with the seconds is added to the divergence.

    Raises:
        InputError: a unit has no type, or the smallest choice does not fit; the message names its size.
    """
    model = model or DivergenceModel()
    empty = [unit.name for unit in table.units if not unit.options]
    if empty:
        raise InputError(f"{empty[0]} has no type that it may be written in; allow more types")
    smallest = smallest_bytes(table)
    if smallest > byte_limit:
        raise _too_small(smallest, byte_limit)
    problem = _Problem(table, _Columns.of(table), byte_limit, model, nats_per_second)
    price = problem.usual_price_of_flips()
    found: list[Allocation] = []
    while len(found) <= _MOST_TANGENTS:
        found.append(problem.by_tangent(price))
        price, last = model.price_of_flips(found[-1].order), price
        if math.isclose(price, last, rel_tol=_SAME_PRICE):
            break
    return min(reversed(found), key=lambda one: one.divergence + nats_per_second * one.seconds)


@dataclass(frozen=True)
class _Problem:
    """The choice of a type for each unit within a limit of bytes."""

    table: TypeTable
    columns: _Columns
    byte_limit: int
    model: DivergenceModel
    nats_per_second: float

    def by_tangent(self, price_of_flips: float) -> Allocation:
        """Finds the best choice at this price of the errors that routers see."""
        options = self._options(price_of_flips)
        chosen_U, bound = _search(options, self.byte_limit, _best_price(options, self.byte_limit))
        chosen = self._chosen(options, chosen_U)
        order = _order_of(chosen)
        return Allocation(
            {unit.name: option.choice for unit, option in zip(self.table.units, chosen, strict=True)},
            sum(option.n_bytes for option in chosen),
            order,
            self.model.divergence(order),
            sum(option.seconds for option in chosen),
            max(0.0, options.cost(chosen_U) - bound),
        )

    def usual_price_of_flips(self) -> float:
        """The price at which quick choices, which are nearly the best, stay as they are."""
        price = 0.0
        for _ in range(_MOST_TANGENTS):
            options = self._options(price)
            greedy_U = options.best(_best_price(options, self.byte_limit))
            filled_U = _filled(options, greedy_U, self.byte_limit - options.n_bytes(greedy_U))
            price, last = self.model.price_of_flips(_order_of(self._chosen(options, filled_U))), price
            if math.isclose(price, last, rel_tol=_SAME_PRICE):
                break
        return price

    def _options(self, price_of_flips: float) -> _Options:
        columns = self.columns
        cost_UN = self.model.smooth * columns.total_UN + price_of_flips * columns.routed_UN
        return _Options.of(columns.bytes_UN, cost_UN + self.nats_per_second * columns.seconds_UN)

    def _chosen(self, options: _Options, chosen_U: npt.NDArray[np.int64]) -> list[Option]:
        which_U = np.take_along_axis(options.which_UN, chosen_U[:, None], 1)[:, 0].tolist()
        return [unit.options[which] for unit, which in zip(self.table.units, which_U, strict=True)]


def _order_of(options: Sequence[Option]) -> SecondOrder:
    return sum((option.order for option in options), SecondOrder(0.0, 0.0))


def allocate_file(
    table: TypeTable,
    byte_limit: int,
    file_bytes: Callable[[Mapping[str, str]], int],
    model: DivergenceModel | None = None,
    *,
    nats_per_second: float = 0.0,
) -> Allocation:
    """Finds the best choice whose file fits, where headers and alignment depend on the choice.

    Args:
        table: units and their types.
        byte_limit: the most bytes of the file.
        file_bytes: returns the exact size of the file for the types of the units.
        model: as in :func:`allocate`.
        nats_per_second: as in :func:`allocate`.

    Raises:
        InputError: the file of the smallest types does not fit; the message names its size.
    """
    smallest = allocate(table, smallest_bytes(table), model)
    beside = file_bytes(smallest.choices) - smallest.n_bytes
    if smallest.n_bytes + beside > byte_limit:
        raise _too_small(smallest.n_bytes + beside, byte_limit)
    while byte_limit - beside >= smallest.n_bytes:
        found = allocate(table, byte_limit - beside, model, nats_per_second=nats_per_second)
        excess = file_bytes(found.choices) - byte_limit
        if excess <= 0:
            return found
        beside += excess
    return smallest


def _too_small(smallest: int, byte_limit: int) -> InputError:
    return InputError(
        f"the smallest types need {smallest:,} bytes, more than {byte_limit:,}; the smallest limit that can be "
        f"met with these types is {smallest:,}"
    )


@dataclass(frozen=True)
class _Columns:
    """The numbers of every option of a table; where a unit has fewer options than another, the error is infinite."""

    bytes_UN: npt.NDArray[np.int64]
    total_UN: npt.NDArray[np.float64]
    routed_UN: npt.NDArray[np.float64]
    seconds_UN: npt.NDArray[np.float64]

    @classmethod
    def of(cls, table: TypeTable) -> _Columns:
        size = (len(table.units), max(len(unit.options) for unit in table.units))
        found = cls(np.zeros(size, np.int64), np.full(size, np.inf), np.zeros(size), np.zeros(size))
        for index, unit in enumerate(table.units):
            place = (index, slice(len(unit.options)))
            found.bytes_UN[place] = [option.n_bytes for option in unit.options]
            found.total_UN[place] = [option.order.total for option in unit.options]
            found.routed_UN[place] = [option.order.routed for option in unit.options]
            found.seconds_UN[place] = [option.seconds for option in unit.options]
        return found


@dataclass(frozen=True)
class _Options:
    """Each unit's options by rising bytes, without those that another undercuts in both bytes and cost."""

    which_UN: npt.NDArray[np.int64]  # its place among the unit's options
    bytes_UN: npt.NDArray[np.int64]
    cost_UN: npt.NDArray[np.float64]  # infinite where a unit has fewer options than another

    @classmethod
    def of(cls, bytes_UN: npt.NDArray[np.int64], cost_UN: npt.NDArray[np.float64]) -> _Options:
        which_UN = np.lexsort((cost_UN, bytes_UN), axis=1)
        lowest_UN = np.minimum.accumulate(np.take_along_axis(cost_UN, which_UN, 1), 1)
        falls_UN = np.ones_like(lowest_UN, dtype=np.bool_)
        falls_UN[:, 1:] = lowest_UN[:, 1:] < lowest_UN[:, :-1]
        falls_UN &= lowest_UN < np.inf
        which_UN = np.take_along_axis(which_UN, (~falls_UN).argsort(1, kind="stable"), 1)
        is_option_UN = np.arange(which_UN.shape[1]) < falls_UN.sum(1, keepdims=True)
        return cls(
            np.where(is_option_UN, which_UN, 0),
            np.where(is_option_UN, np.take_along_axis(bytes_UN, which_UN, 1), 0),
            np.where(is_option_UN, np.take_along_axis(cost_UN, which_UN, 1), np.inf),
        )

    def n_bytes(self, chosen_U: npt.NDArray[np.int64]) -> int:
        """Bytes of an option for each unit."""
        return int(np.take_along_axis(self.bytes_UN, chosen_U[:, None], 1).sum())

    def cost(self, chosen_U: npt.NDArray[np.int64]) -> float:
        """The cost of an option for each unit."""
        return float(np.take_along_axis(self.cost_UN, chosen_U[:, None], 1).sum())

    def at(self, price: float) -> npt.NDArray[np.float64]:
        """The cost of each option if bytes have a price: [U, N]."""
        priced_UN: npt.NDArray[np.float64] = self.cost_UN + price * self.bytes_UN
        return priced_UN

    def best(self, price: float) -> npt.NDArray[np.int64]:
        """Each unit's cheapest option at a price; the smallest among equals."""
        best_U: npt.NDArray[np.int64] = self.at(price).argmin(1)
        return best_U


def _best_price(options: _Options, byte_limit: int) -> float:
    """The lowest price at which the units' own choices fit, which is where the bound is highest."""
    if options.n_bytes(options.best(0.0)) <= byte_limit:
        return 0.0
    low, high = 0.0, 1e-12
    while options.n_bytes(options.best(high)) > byte_limit:
        low, high = high, high * 4
    for _ in range(_PRICE_STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if options.n_bytes(options.best(middle)) <= byte_limit else (middle, high)
    return high


def _search(options: _Options, byte_limit: int, price: float) -> tuple[npt.NDArray[np.int64], float]:
    """The best choice found, an option for each unit, and the lower bound of any choice's cost."""
    greedy_U = options.best(price)
    priced_UN = options.at(price)
    best_U = priced_UN.min(1)
    bound = float(best_U.sum()) - price * byte_limit
    room = byte_limit - options.n_bytes(greedy_U)
    filled_U = _filled(options, greedy_U, room)
    most = options.cost(filled_U) - bound  # the most by which the best choice can lie above the bound
    if most < 0:  # by rounding: the bound is met
        return filled_U, bound
    above_UN = priced_UN - best_U[:, None]
    extra_UN = options.bytes_UN - np.take_along_axis(options.bytes_UN, greedy_U[:, None], 1)
    n_kept = max(_PARTIAL_CHOICES // len(greedy_U), _LEAST_PARTIAL_CHOICES)
    partial = _Partial(room, price, most, n_kept)
    for unit in (above_UN <= most).sum(1).argsort(kind="stable").tolist():
        partial.extend(unit, extra_UN[unit], above_UN[unit])
    found_U = partial.best(len(greedy_U))
    if found_U is None or options.cost(found_U) >= options.cost(filled_U):
        return filled_U, bound
    return found_U, bound


def _filled(options: _Options, greedy_U: npt.NDArray[np.int64], room: int) -> npt.NDArray[np.int64]:
    """Spends the room that is left on the best steps for their bytes, one unit after the other."""
    chosen_U = greedy_U.copy()
    while True:
        here = chosen_U[:, None]
        extra_UN = options.bytes_UN - np.take_along_axis(options.bytes_UN, here, 1)
        gain_UN = np.take_along_axis(options.cost_UN, here, 1) - options.cost_UN
        possible_UN = (extra_UN > 0) & (extra_UN <= room) & (gain_UN > 0)
        if not possible_UN.any():
            return chosen_U
        rate_UN = np.where(possible_UN, gain_UN / np.maximum(extra_UN, 1), -np.inf)
        unit, option = np.unravel_index(int(rate_UN.argmax()), rate_UN.shape)
        room -= int(extra_UN[unit, option])
        chosen_U[unit] = option


def _lowest_of_equal_bytes(
    order: npt.NDArray[np.int64],
    n_bytes: npt.NDArray[np.int64],
    above: npt.NDArray[np.float64],
    n_partial: int,
    n_options: int,
) -> npt.NDArray[np.int64]:
    """Keeps for each number of bytes the lowest excess; of equal ones, that of the first partial choice.

    Args:
        order: the choices' places, by rising bytes; a place is the option's number times ``n_partial``, and the partial
            choice's number.
        n_bytes: bytes of each.
        above: excess of each over the bound.
        n_partial: the number of partial choices.
        n_options: the number of options.
    """
    begins = np.ones(len(order), dtype=np.bool_)
    begins[1:] = n_bytes[1:] != n_bytes[:-1]
    starts = begins.nonzero()[0]
    if len(starts) == len(order):
        return order
    lowest = np.minimum.reduceat(above, starts)[begins.cumsum() - 1]
    number = (order % n_partial) * n_options + order // n_partial
    first = np.minimum.reduceat(np.where(above == lowest, number, n_partial * n_options), starts)
    kept: npt.NDArray[np.int64] = first % n_options * n_partial + first // n_options
    return kept


class _Partial:
    """Choices for the units so far, with their extra bytes over the greedy choice and their cost above the bound.

    Args:
        room: bytes that the greedy choice leaves.
        price: price of a byte.
        most: choices that lie further above the bound are dropped; not negative.
        n_kept: the number of choices that are kept.
    """

    def __init__(self, room: int, price: float, most: float, n_kept: int) -> None:
        self._room = room
        self._price = price
        self._most = most
        self._n_kept = n_kept
        self._bytes_S = np.zeros(1, dtype=np.int64)
        self._above_S = np.zeros(1)
        self._steps: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # unit, parent, option

    def extend(self, unit: int, bytes_N: npt.NDArray[np.int64], above_N: npt.NDArray[np.float64]) -> None:
        """Gives one more unit each of its options."""
        options = np.flatnonzero(above_N <= self._most)
        n_partial = len(self._bytes_S)
        if len(options) == 1 and bytes_N[options[0]] == 0 == above_N[options[0]]:  # each choice stays as it is
            self._steps.append((unit, np.arange(n_partial), np.full(n_partial, options[0])))
            return
        # the partial choices of one option after those of another: sorted runs, which are merged quickly
        n_bytes = (bytes_N[options][:, None] + self._bytes_S).ravel()
        above = (above_N[options][:, None] + self._above_S).ravel()
        order = self._undominated(n_bytes, above, n_partial)
        order = order[above[order] <= self._most]
        if len(order) > self._n_kept:
            kept = np.argpartition(above[order], self._n_kept)[: self._n_kept]
            order = order[np.sort(kept)]
        self._bytes_S, self._above_S = n_bytes[order], above[order]
        self._steps.append((unit, order % n_partial, options[order // n_partial]))

    def _undominated(
        self, n_bytes: npt.NDArray[np.int64], above: npt.NDArray[np.float64], n_partial: int
    ) -> npt.NDArray[np.int64]:
        """The places of the choices that none undercuts in both bytes and cost, by rising bytes."""
        # by cost, not by excess over the bound: fewer bytes are worth their price
        order = n_bytes.argsort(kind="stable")
        cost = (above - self._price * n_bytes)[order]
        order = order[cost <= np.minimum.accumulate(cost)]
        order = _lowest_of_equal_bytes(order, n_bytes[order], above[order], n_partial, len(n_bytes) // n_partial)
        cost = above[order] - self._price * n_bytes[order]
        falls = np.ones(len(cost), dtype=np.bool_)
        falls[1:] = cost[1:] < cost[:-1]  # no cost rises here, so it is the lowest so far
        return order[falls]

    def best(self, n_units: int) -> npt.NDArray[np.int64] | None:
        """The complete choice of the lowest cost that fits, an option for each unit; None if none does."""
        fits = np.flatnonzero(self._bytes_S <= self._room)
        if not len(fits):
            return None
        place = int(fits[(self._above_S - self._price * self._bytes_S)[fits].argmin()])
        chosen_U = np.zeros(n_units, dtype=np.int64)
        for unit, parents, options in reversed(self._steps):
            chosen_U[unit] = options[place]
            place = int(parents[place])
        return chosen_U
