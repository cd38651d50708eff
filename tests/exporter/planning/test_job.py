"""A job checks every flag and names the one at fault."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from compressors.model.errors import InputError
from exporter.estimating.durations import parse_duration
from exporter.planning.job import Flags


def test_a_budget_is_enough() -> None:
    job = Flags(budget="20 GB").job()
    assert (job.model, job.budgets, job.budget_kind) == (None, (20 * 10**9,), "total")
    assert (job.context, job.kv_type, job.formats) == (8192, "f16", ("gguf", "onnx"))
    assert (job.method, job.experts, job.quant, job.recover, job.recover_seconds) == ("auto", None, None, "auto", 1800)
    assert (job.memory_bytes, job.seed, job.require) == (None, 42, {})
    assert (job.out, job.work_dir) == (Path("demo-20GB"), Path("demo-20GB.work"))
    assert job.threads >= 1


def test_what_is_given_is_kept(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.touch()
    job = Flags(
        model="owner/name",
        budget="1GiB",
        budget_kind="file",
        formats="onnx, GGUF,onnx",
        kv_type="Q8_0",
        experts=4,
        quant="q4_k",
        recover="router:published",
        recover_time="90s",
        require=["kld=0.1,top1=0.5", "routing=0.9"],
        recipe=recipe,
        memory="4GB",
        threads=3,
        out=tmp_path / "out",
    ).job()
    assert job.formats == ("gguf", "onnx")
    assert (job.kv_type, job.experts, job.quant) == ("q8_0", 4, "Q4_K_M")
    assert (job.recover, job.recover_seconds) == ("router:published", 90)
    assert job.require == {"kld": 0.1, "top1": 0.5, "routing": 0.9}
    assert (job.recipe, job.memory_bytes, job.threads) == (recipe, 4 * 10**9, 3)
    assert job.work_dir == tmp_path / "out.work"


def test_a_job_cannot_be_changed() -> None:
    job = Flags(budget="1GB").job()
    with pytest.raises(FrozenInstanceError):
        job.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(("model", "name"), [("org/Big-MoE", "Big-MoE"), ("/models/tiny/", "tiny"), ("tiny", "tiny")])
def test_the_output_folder_is_named_after_the_model(model: str, name: str) -> None:
    assert Flags(model=model, budget="20GB").job().out == Path(f"{name}-20GB")


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"budget": "much"}, "--budget"),
        ({"budget_kind": "disk"}, "--budget-kind"),
        ({"formats": "gguf,exe"}, "--formats"),
        ({"formats": ""}, "--formats"),
        ({"context": 0}, "--context"),
        ({"kv_type": "q2_k"}, "--kv-type"),
        ({"shard_size": "huge"}, "--shard-size"),
        ({"calibration": Path("no such folder")}, "--calibration"),
        ({"text": Path("no such file.txt")}, "--text"),
        ({"recipe": Path("no such recipe.yaml")}, "--recipe"),
        ({"recipe": Path()}, "--recipe"),
        ({"method": "magic"}, "--method"),
        ({"experts": 0}, "--experts"),
        ({"quant": "Q1"}, "--quant"),
        ({"recover": "prayer"}, "--recover"),
        ({"recover_time": "soon"}, "--recover-time"),
        ({"require": ["kld"]}, "--require"),
        ({"require": ["kld=low"]}, "--require"),
        ({"require": ["kld=nan"]}, "--require"),
        ({"require": ["=1"]}, "--require"),
        ({"require": ["beauty=1"]}, "--require"),
        ({"require": ["kld=1", "kld=2"]}, "--require"),
        ({"memory": "0"}, "--memory"),
        ({"require": ["speed=1"]}, "--require"),
        ({"threads": 0}, "--threads"),
        ({"threads": -1}, "--threads"),
        ({"threads": 1_000_000}, "--threads"),
        ({"threads": 10**30}, "--threads"),
        ({"context": 63}, "--context"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**32}, "--seed"),
        ({"out": Path(__file__)}, "--out"),
        ({"out": Path(__file__) / "below a file"}, "--out"),
        ({"work_dir": Path(__file__)}, "--work-dir"),
    ],
)
def test_a_wrong_value_is_refused_by_flag(arguments: dict[str, Any], flag: str) -> None:
    with pytest.raises(InputError) as caught:
        Flags(**{"budget": "1GB", **arguments}).job()
    assert str(caught.value).startswith(f"{flag}: ")


@pytest.mark.parametrize("name", ["calibration", "text", "recipe", "out", "work_dir"])
def test_a_link_that_leads_to_itself_is_refused_by_flag(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=rf"^--{name.replace('_', '-')}: .*loop"):
        Flags(budget="1GB", **{name: tmp_path / "loop"}).job()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5 H", 5400), ("0.5m", 30)])
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "0s", "0.5s", "-1h", "1h30m", "nan m", "9" * 400 + "h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--recover-time: "):
        parse_duration(text, "--recover-time")


@pytest.mark.parametrize("out", [".", "/", "..", "", "x/.."])
def test_an_output_folder_has_a_name_of_its_own(out: str) -> None:
    with pytest.raises(InputError, match=r"--out: .* has no name of its own; give the name of a new folder"):
        Flags(budget="1GB", out=Path(out)).job()
