"""The allocation against every possible choice, and at the size of a large model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from compressors.model.errors import InputError
from compressors.sensitivity import (
    DivergenceModel,
    Option,
    SecondOrder,
    TypeTable,
    Unit,
    allocate,
    allocate_file,
    smallest_bytes,
)
from compressors.sensitivity.knapsack import _Partial


def _table(generator: np.random.Generator, n_units: int, n_options: int, sizes: list[int]) -> TypeTable:
    """Types whose error falls by a factor of four with each bit, more or less, as those of real tensors do."""
    units = []
    for number in range(n_units):
        size = int(generator.choice(sizes))
        importance = float(generator.lognormal(-6, 1.5))
        routed = float(generator.choice([0.0, 0.2, 1.0]))
        bits = np.sort(generator.uniform(2, 8.5, n_options))
        noise = generator.lognormal(0, 0.3, n_options)
        options = tuple(
            Option(
                f"T{place}",
                int(size * bit / 8) // 32 * 32,
                SecondOrder(importance * 4.0**-bit * factor, routed * importance * 4.0**-bit * factor),
                bit * 1e-4,
            )
            for place, (bit, factor) in enumerate(zip(bits, noise, strict=True))
        )
        units.append(Unit(f"unit {number}", (f"tensor {number}",), options))
    return TypeTable(tuple(units))


def _best_of_all(table: TypeTable, limit: int, model: DivergenceModel, nats_per_second: float = 0.0) -> float:
    return min(
        model.divergence(sum((option.order for option in options), SecondOrder(0.0, 0.0)))
        + nats_per_second * sum(option.seconds for option in options)
        for options in itertools.product(*(unit.options for unit in table.units))
        if sum(option.n_bytes for option in options) <= limit
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("nats_per_second", [0.0, 0.05])
@pytest.mark.parametrize("flips", [0.0, 0.08])
def test_no_other_choice_is_better(seed: int, nats_per_second: float, flips: float) -> None:
    generator = np.random.default_rng(seed)
    table, model = _table(generator, 5, 5, [4096, 8192, 70_000]), DivergenceModel(1.2, flips)
    lowest, highest = (sum(pick(o.n_bytes for o in unit.options) for unit in table.units) for pick in (min, max))
    for share in (0.0, 0.02, 0.3, 0.6, 0.97, 1.0):
        limit = int(lowest + share * (highest - lowest))
        found = allocate(table, limit, model, nats_per_second=nats_per_second)
        best = _best_of_all(table, limit, model, nats_per_second)
        assert found.n_bytes == table.n_bytes(found.choices) <= limit
        assert found.divergence == pytest.approx(model.divergence(table.order(found.choices)))
        nearness = 1e-9 if flips == 0 else 0.02  # tangents find a best choice, not always the best of them
        assert found.divergence + nats_per_second * found.seconds == pytest.approx(best, rel=nearness)


def _extended_by_definition(
    bytes_S: np.ndarray, above_S: np.ndarray, bytes_N: np.ndarray, above_N: np.ndarray, price: float, most: float
) -> list[tuple[int, float, int, int]]:
    """All pairs of a partial choice and an option, by bytes, excess and place, without those that another undercuts."""
    pairs = sorted(
        (int(bytes_S[s] + bytes_N[n]), float(above_S[s] + above_N[n]), s, n)
        for s, n in itertools.product(range(len(bytes_S)), range(len(bytes_N)))
        if above_N[n] <= most
    )
    kept, lowest = [], np.inf
    for pair in pairs:
        cost = pair[1] - price * pair[0]
        if cost < lowest:
            kept.append(pair)
            lowest = cost
    return [pair for pair in kept if pair[1] <= most]


@pytest.mark.parametrize("seed", range(40))
def test_partial_choices_are_those_of_the_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    price, most = float(generator.choice([0.0, 0.25])), 6.0
    partial = _Partial(room=8, price=price, most=most, n_kept=2048)
    for unit in range(6):
        bytes_N = np.sort(generator.integers(-3, 12, int(generator.integers(1, 6))))  # few sizes, so many are equal
        above_N = generator.integers(0, 8, len(bytes_N)) * 0.5
        bytes_N[0], above_N[0] = 0, 0.0
        expected = _extended_by_definition(partial._bytes_S, partial._above_S, bytes_N, above_N, price, most)
        partial.extend(unit, bytes_N, above_N)
        _, parents, options = partial._steps[-1]
        found = zip(
            *(values.tolist() for values in (partial._bytes_S, partial._above_S, parents, options)), strict=True
        )
        assert list(found) == expected


def test_one_byte_less_than_the_smallest_fails_and_names_it() -> None:
    table = _table(np.random.default_rng(1), 5, 4, [1000])
    smallest = smallest_bytes(table)
    assert allocate(table, smallest).n_bytes == smallest
    with pytest.raises(InputError, match=f"the smallest limit that can be met with these types is {smallest:,}"):
        allocate(table, smallest - 1)


def test_the_gap_of_a_large_model_is_small() -> None:
    table = _table(np.random.default_rng(2), 400, 25, [100_663_296, 8_388_608, 2_097_152, 524_288])
    lowest, highest = (sum(pick(o.n_bytes for o in unit.options) for unit in table.units) for pick in (min, max))
    for share in (0.05, 0.3, 0.7):
        limit = int(lowest + share * (highest - lowest))
        found = allocate(table, limit)
        assert found.n_bytes <= limit
        assert found.gap < 2e-3 * found.divergence


def test_types_can_be_left_out_but_not_all() -> None:
    table = _table(np.random.default_rng(3), 5, 4, [1000])
    largest = 10**6
    assert "T3" not in allocate(table.without({"T3"}), largest).choices.values()
    with pytest.raises(InputError, match="unit 0 has no type"):
        allocate(table.without({f"T{place}" for place in range(4)}), largest)


def test_time_that_costs_nats_buys_faster_types() -> None:
    slow = Option("slow", 100, SecondOrder(0.001, 0.0), seconds=0.02)
    fast = Option("fast", 110, SecondOrder(0.002, 0.0), seconds=0.01)
    table = TypeTable((Unit("a", ("a",), (slow, fast)),))
    assert allocate(table, 200).choices == {"a": "slow"}
    assert allocate(table, 200, nats_per_second=0.2).choices == {"a": "fast"}
    assert allocate(table, 105, nats_per_second=0.2).choices == {"a": "slow"}


def test_a_table_survives_json() -> None:
    table = _table(np.random.default_rng(4), 3, 4, [1000])
    assert TypeTable.from_json(table.to_json()) == table
    assert TypeTable.from_json(table.to_json()) != TypeTable((replace(table.units[0], name="other"),))


def test_a_file_never_exceeds_its_limit_whatever_lies_between_its_tensors() -> None:
    table = _table(np.random.default_rng(5), 8, 6, [4096, 70_000])

    def file_bytes(choices: Mapping[str, str]) -> int:
        """A header, and every tensor on a page of its own."""
        return 1000 + sum(-(-unit.option(choices[unit.name]).n_bytes // 4096) * 4096 for unit in table.units)

    smallest = {unit.name: min(unit.options, key=lambda option: option.n_bytes).choice for unit in table.units}
    least = file_bytes(smallest)
    for limit in range(least, least + 200_000, 7_777):
        found = allocate_file(table, limit, file_bytes)
        assert file_bytes(found.choices) <= limit
        assert found.order.total <= table.order(smallest).total
    assert found.order.total < table.order(smallest).total / 2
    with pytest.raises(InputError, match=f"the smallest limit that can be met with these types is {least:,}"):
        allocate_file(table, least - 1, file_bytes)
