"""A model of a context below 512 tokens is run on blocks that it was made for, or refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from compressors.calibration.splits import BLOCK_LENGTH, block_length_of
from compressors.model.errors import InputError, UnsupportedError
from exporter.planning.job import Flags, Job
from exporter.planning.plan_making import make_plan
from exporter.planning.recipe import load_recipe, recipe_yaml

Shortened = Callable[[int], Path]


@pytest.fixture
def shortened(toy_model: Path, tmp_path: Path) -> Shortened:
    """Makes the toy model with so short a context."""

    def shorten(n_tokens: int) -> Path:
        folder = Path(shutil.copytree(toy_model, tmp_path / f"context-{n_tokens}"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": n_tokens}))
        return folder

    return shorten


def _job(model: Path, texts: tuple[Path, Path], recipe: Path) -> Job:
    return Flags(
        model=str(model), recipe=recipe, calibration=texts[0], text=texts[1], out=model.parent / "out", threads=1
    ).job()


def _recipe_for(recipe: Path, context: int, folder: Path) -> Path:
    """The recipe for any model, with this context."""
    chosen = load_recipe(recipe)
    budget = chosen.budget.model_copy(update={"context": context})
    source = chosen.source.model_copy(update={"identity": None})
    path = folder / f"recipe-{context}.yaml"
    path.write_text(recipe_yaml(chosen.model_copy(update={"budget": budget, "source": source})))
    return path


def test_a_block_is_no_longer_than_the_context() -> None:
    assert [block_length_of(length) for length in (96, 511, 512, 8192)] == [96, 511, BLOCK_LENGTH, BLOCK_LENGTH]


def test_a_context_too_short_to_write_texts_is_refused_before_any_work(
    shortened: Shortened, small_texts: tuple[Path, Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    recipe = _recipe_for(tiny_recipe, 64, tmp_path)
    with pytest.raises(UnsupportedError, match=r"context is 95 tokens \(max_position_embeddings .* texts of 96"):
        make_plan(_job(shortened(95), small_texts, recipe), "moe-export")


def test_a_recipe_for_a_longer_context_is_refused(
    shortened: Shortened, small_texts: tuple[Path, Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    recipe = _recipe_for(tiny_recipe, 257, tmp_path)
    with pytest.raises(InputError, match=r"budget\.context is 257 tokens, and the model was made for 256; lower it"):
        make_plan(_job(shortened(256), small_texts, recipe), "moe-export")


def test_both_files_of_a_short_context_run_in_their_runtimes(
    shortened: Shortened,
    toy_command: Callable[..., Sequence[str]],
    tiny_recipe: Path,
    tmp_path: Path,
    run_command: Callable[[Sequence[str]], object],
) -> None:
    out = tmp_path / "out"
    command = list(toy_command(out, "--recipe", str(_recipe_for(tiny_recipe, 256, tmp_path)), "--require", "kld=99"))
    command[3] = str(shortened(256))
    run_command(command)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    rows = {row["artifact"]: row for row in report["validation"]}
    for artifact in ("gguf", "onnx"):
        assert rows[artifact]["perplexity"] == pytest.approx(rows["student"]["perplexity"], rel=0.2)
