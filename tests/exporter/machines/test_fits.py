"""``fits``: its rows against the planner's choice, measured divergences, and placements counted by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from compressors.calibration.splits import read_splits
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from exporter.cli import main
from exporter.estimating.prediction import Prediction
from exporter.machines.command import machines_of
from exporter.machines.known import MACHINES, Machine, Memory, machine_named, machine_with
from exporter.machines.placement import placed
from exporter.machines.rows import BAND, Fit, NoFit, fits_on
from exporter.planning.flags import Flags
from exporter.planning.planner import TextCounts, choose_recipe
from exporter.writing.gguf.layout import PlannedTensor, plan_tensors

_MODEL = Path(__file__).parents[3] / "exporter" / "demo" / "model"
_PARETO = Path(__file__).parents[3] / "benchmarks" / "results" / "pareto.csv"
_CONTEXT = 512
_BESIDE = 1_000_000  # bytes of cache and buffers


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return open_source(_MODEL).spec


@pytest.fixture(scope="module")
def tensors(spec: ModelSpec) -> list[PlannedTensor]:
    return list(plan_tensors(spec, "Q8_0"))


def _row(budget: int) -> Fit | NoFit:
    return next(fits_on([machine_with(budget, "some")], open_source(_MODEL), "tiny", _CONTEXT, "f16"))


def _on(card: int, ram: int, spec: ModelSpec, tensors: list[PlannedTensor]) -> tuple[str, ...] | None:
    prediction = Prediction(0, 0, kv_cache=_BESIDE - 1000, compute=1000, reserve=0)
    placement = placed(spec, tensors, prediction, Machine("m", Memory(card, 4e9), Memory(ram, 1e9)))
    return None if placement is None else tuple(placement.options)


def test_a_row_is_what_the_planner_chooses(small_texts: tuple[Path, Path]) -> None:
    row = _row(80_000_000)
    assert isinstance(row, Fit)
    flags = Flags(budget="80MB", formats="gguf", context=_CONTEXT, threads=1)
    counts = TextCounts(calibration=500, selection=60, heldout_files=5)
    chosen = choose_recipe(flags.job(), open_source(_MODEL), "tiny", read_splits(*small_texts), counts, 8_000_000_000)
    recipe, predictions, _ = chosen
    assert (row.choice, row.prediction) == (recipe.file("gguf"), predictions["gguf"])
    assert row.prediction.total <= 80_000_000


def test_a_machine_that_is_too_small_is_told_what_would_do() -> None:
    row = _row(30_000_000)
    assert isinstance(row, NoFit)
    assert "The smallest budget that works is --budget" in row.why


def test_measured_divergences_lie_in_the_band() -> None:
    """The files of benchmarks/results/pareto.md, measured by llama-perplexity, and what is expected of their size."""
    with _PARETO.open(encoding="utf-8") as file:
        measured = [row for row in csv.DictReader(file) if (row["model"], row["method"]) == ("fine", "moe-export")]
    beside = _row(100_000_000)
    assert isinstance(beside, Fit)
    overhead = beside.prediction.total - beside.prediction.file
    compared = measured[1::3]
    assert len(compared) >= 3
    for row in compared:
        fit = _row(int(row["n_bytes"]) + overhead)
        assert isinstance(fit, Fit)
        low, high = fit.band
        assert low <= float(row["divergence"]) <= high, row["mix"]
        assert high == pytest.approx(low * BAND * BAND)


def test_as_few_layers_as_possible_have_their_experts_in_ram(spec: ModelSpec, tensors: list[PlannedTensor]) -> None:
    """The tied embedding lies in both memories: a token's row is taken from one, and the other has it as the head."""
    experts = [sum(t.n_bytes for t in tensors if t.layer == layer and t.role.is_expert) for layer in range(6)]
    embedding = sum(t.n_bytes for t in tensors if t.role is Role.TOKEN_EMBEDDING)
    rest = sum(t.n_bytes for t in tensors) - sum(experts)
    for n_in_ram in range(7):
        card, ram = rest + sum(experts[n_in_ram:]) + _BESIDE, embedding + sum(experts[:n_in_ram])
        options = ("-ngl", "999", "-ncmoe", str(n_in_ram)) if n_in_ram else ("-ngl", "999")
        assert _on(card, ram, spec, tensors) == options
        assert _on(card, ram - 1, spec, tensors) is None
        if n_in_ram < 6:
            assert _on(card - 1, ram + experts[n_in_ram], spec, tensors) == ("-ngl", "999", "-ncmoe", str(n_in_ram + 1))
    assert _on(rest + _BESIDE - 1, 10**9, spec, tensors) is None


def test_speed_is_the_bytes_of_a_token_over_the_bandwidth(spec: ModelSpec, tensors: list[PlannedTensor]) -> None:
    """Of 32 experts a token reads 4; the tied embedding is the head, and is read whole."""
    experts = sum(t.n_bytes for t in tensors if t.role.is_expert)
    read = sum(t.n_bytes for t in tensors) - experts + experts * 4 / 32
    machine = Machine("m", None, Memory(10**9, 5e9))
    placement = placed(spec, tensors, Prediction(0, 0, 0, 0, 0), machine)
    assert placement is not None
    assert placement.tokens_per_second == pytest.approx(5e9 / read)
    assert placement.options == ()


def test_two_memories_are_read_one_after_the_other(spec: ModelSpec, tensors: list[PlannedTensor]) -> None:
    beside = Prediction(0, 0, 0, 0, 0)
    all_on_card = placed(spec, tensors, beside, Machine("m", Memory(10**9, 4e9), None))
    experts = [t.n_bytes for t in tensors if t.role.is_expert]
    card = Memory(sum(t.n_bytes for t in tensors) - sum(experts), 4e9)
    no_expert_on_card = placed(spec, tensors, beside, Machine("m", card, Memory(10**9, 1e9)))
    assert all_on_card is not None and no_expert_on_card is not None
    later = 1 / no_expert_on_card.tokens_per_second - 1 / all_on_card.tokens_per_second
    assert later == pytest.approx(sum(experts) * 4 / 32 * (1 / 1e9 - 1 / 4e9))


def test_a_file_that_does_not_divide_becomes_smaller() -> None:
    machine = Machine("m", Memory(30_000_000, 4e9), Memory(62_000_000, 1e9))
    (row,) = fits_on([machine], open_source(_MODEL), "tiny", _CONTEXT, "f16")
    assert isinstance(row, Fit)
    assert row.prediction.total < machine.budget


def test_names_stand_for_budgets() -> None:
    job = Flags(budget="16gb-mac, 8GB", threads=1).job()
    assert job.budgets == (machine_named("16GB-Mac", "--for").budget, 8_000_000_000)
    assert machine_named("12gb-gpu", "--for").budget == 11 * 2**30


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("9gb-gpu", None, None, None), r"--for: '9gb-gpu' is no machine; known are 8gb-gpu"),
        ((None, "much", None, None), r"--budget: 'much' is not a size"),
        ((None, None, "1GiB", "8GB"), r"--vram: llama\.cpp keeps 1 GiB"),
        (("16gb-mac,16gb-mac", None, None, None), r"named twice"),
    ],
)
def test_wrong_machines_are_named(flags: tuple[str | None, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        machines_of(*flags)


def test_all_machines_without_a_flag() -> None:
    assert [machine.name for machine in machines_of(None, None, None, None)] == list(MACHINES)


def test_the_command_prints_a_line_for_each_machine() -> None:
    arguments = ["fits", str(_MODEL), "--for", "8gb-gpu", "--budget", "80MB,30MB", "--vram", "1.08GiB", "--ram", "80MB"]
    printed = CliRunner().invoke(main, [*arguments, "--context", "512"])
    assert printed.exit_code == 0, printed.output
    for said in ("8gb-gpu", "80MB", "30MB: nothing fits", "yours: llama-server -m FILE.gguf -c 512 -ngl 999"):
        assert said in printed.output
    data = json.loads(CliRunner().invoke(main, [*arguments, "--context", "512", "--json"]).stdout)
    assert [row["fits"] for row in data] == [True, True, False, True]
    assert data[1]["total"] <= 80_000_000
