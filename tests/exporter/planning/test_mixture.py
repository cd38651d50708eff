"""Several calibration texts, and chats, from the command line to the plan and the recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compressors.calibration.mixture import WeightedText
from compressors.model.errors import InputError
from exporter.planning.flags import Flags, command_of
from exporter.planning.plan import Plan
from exporter.planning.plan_making import make_plan
from exporter.planning.recipe import load_recipe, recipe_yaml
from exporter.run import job_identity


@pytest.fixture
def model(toy_model: Path, tmp_path: Path) -> Path:
    """The toy with a chat template."""
    folder = Path(shutil.copytree(toy_model, tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}), encoding="utf-8")
    return folder


@pytest.fixture
def chats(small_texts: tuple[Path, Path], tmp_path: Path) -> Path:
    """Chats about the encyclopedic text: its first lines."""
    lines = (small_texts[0] / "encyclopedic.txt").read_text(encoding="utf-8").splitlines()
    paragraphs = [line for line in lines if len(line) > 100][:60]
    path = tmp_path / "chats.jsonl"
    asked = {"role": "user", "content": "Tell me something."}
    chats = [json.dumps({"messages": [asked, {"role": "assistant", "content": text}]}) for text in paragraphs]
    path.write_text("\n".join(chats), encoding="utf-8")
    return path


def _flags(model: Path, texts: tuple[Path, Path], calibration: Any, **further: Any) -> Flags:
    choices = further if "recipe" in further else {"budget": "3MB", "budget_kind": "file"} | further
    return Flags(model=str(model), calibration=calibration, text=texts[1], out=model.parent / "out", **choices)


def test_a_mixture_stands_in_the_plan_and_in_the_recipe(
    model: Path, chats: Path, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    religion = small_texts[0] / "religion.txt"
    given = (f"{religion}:2", f"{chats}:1")
    flags = _flags(model, small_texts, given)
    plan = make_plan(flags.job(), command_of(flags))
    assert f"--calibration {religion}:2 --calibration {chats}:1" in plan.command
    assert plan.mixture == "blocks: 21 of religion (all; by weight 22), 12 of chats"
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.calibration == plan.calibration == (WeightedText(religion, 2.0), WeightedText(chats, 1.0))

    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(plan.recipe), encoding="utf-8")
    assert [(one.file, one.weight) for one in load_recipe(path).text.mix] == [("religion.txt", 2), ("chats.jsonl", 1)]
    followed = make_plan(_flags(model, small_texts, given, recipe=path).job(), "moe-export")
    assert followed.recipe == plan.recipe
    other = _flags(model, small_texts, given[::-1], recipe=path).job()
    with pytest.raises(InputError, match="another calibration text"):
        make_plan(other, "moe-export")
    other = _flags(model, small_texts, (f"{religion}:1", f"{chats}:1"), recipe=path).job()
    with pytest.raises(InputError, match=r"another mixture .* --calibration PATH/religion.txt:2"):
        make_plan(other, "moe-export")


def test_a_single_text_is_named_as_it_always_was(toy_model: Path, small_texts: tuple[Path, Path]) -> None:
    calibration = small_texts[0]
    for given in (calibration, str(calibration), (f"{calibration}:3",)):
        job = _flags(toy_model, small_texts, given).job()
        assert job_identity(job)["calibration"] == str(calibration)
    assert job_identity(_flags(toy_model, small_texts, ()).job())["calibration"] is None
    mixed = _flags(toy_model, small_texts, [f"{calibration / 'religion.txt'}:2", calibration / "encyclopedic.txt"])
    assert job_identity(mixed.job())["calibration"] == [
        f"{calibration / 'religion.txt'}:2",
        f"{calibration / 'encyclopedic.txt'}:1",
    ]


def test_a_missing_file_that_may_be_a_weight_is_explained(toy_model: Path, small_texts: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="there does not exist; the number behind the last colon is its weight"):
        _flags(toy_model, small_texts, ("there:2", str(small_texts[0]))).job()
