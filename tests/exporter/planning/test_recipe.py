"""The recipe as YAML: what is written is read back, and what a person misspells is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressors.model.errors import InputError
from exporter.planning.recipe import FileChoice, Recipe, load_recipe, recipe_yaml

_DATA: dict[str, Any] = {
    "version": 2,
    "source": {"model": "someone/some-moe", "identity": "0" * 64},
    "budget": {"bytes": 20_000_000_000, "kind": "total", "context": 8192, "kv_type": "q8_0"},
    "text": {
        "calibration_blocks": 320,
        "selection_blocks": 20,
        "heldout_chunks_per_file": 10,
        "calibration_sha256": "1" * 64,
        "selection_sha256": "2e5",  # looks like a number
        "heldout_sha256": "3" * 64,
    },
    "arithmetic": "bfloat16",
    "compress": {
        "drop_blocks": 0,
        "consecutive_blocks": False,
        "drop_moe_layers": 0,
        "method": "reap",
        "experts": 24,
        "allocation": "layer",
        "protect_super_experts": False,
        "width": None,
        "edit": "none",
        "edit_size": None,
        "student": "moe",
        "sequential": False,
        "sample_blocks": 32,
    },
    "recover": {
        "rungs": [
            {
                "scope": "router",
                "experts": None,
                "rank": None,
                "loss": "kd",
                "batches_per_round": None,
                "blocks": 320,
                "blocks_per_step": 8,
                "learning_rate": 0.00075,
            },
            {
                "scope": "adapters",
                "experts": None,
                "rank": 8,
                "loss": "next-token",
                "batches_per_round": None,
                "blocks": 8,
                "blocks_per_step": 8,
                "learning_rate": 1.0,
            },
        ],
        "after_quantizing": None,
        "seed": 42,
    },
    "gguf": {
        "mix": "Q4_0",
        "tensors": {"blk.0.attn_q.weight": "Q8_0"},
        "quantizer": "kernel",
        "inputs": "int8",
        "imatrix": None,
        "why": None,
    },
    "onnx": None,
    "save_student": False,
    "threads": 2,
}


_RUNG = _DATA["recover"]["rungs"][0]


def _write(folder: Path, data: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def _changed(part: str | None, **values: object) -> dict[str, Any]:
    return _DATA | values if part is None else _DATA | {part: _DATA[part] | values}


@pytest.mark.parametrize(
    "data",
    [
        _DATA,
        _changed(None, gguf=None, onnx="F32"),
        _changed("recover", rungs=[]),
        _changed("recover", rungs=[_RUNG | {"scope": "top-experts", "experts": 3}], after_quantizing=_RUNG),
        _changed("compress", experts=[24, 20, 16, 32], drop_moe_layers=2, width=[96, 128, 64, 32]),
        _changed("compress", drop_blocks=5, consecutive_blocks=True, method="none", edit="svd", edit_size=64),
        _changed("source", model="Größe: #1 'quoted' - model\nwith a line"),
    ],
)
def test_yaml_comes_back_equal_and_byte_for_byte(tmp_path: Path, data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(data)
    text = recipe_yaml(recipe)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    assert recipe_yaml(again) == text


def test_the_order_of_keys_in_the_file_does_not_matter(tmp_path: Path) -> None:
    backwards = {key: _DATA[key] for key in reversed(_DATA)}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(backwards, sort_keys=False))
    assert recipe_yaml(load_recipe(path)) == recipe_yaml(Recipe.model_validate(_DATA))


def test_the_file_says_everything_in_the_order_of_the_class() -> None:
    read = yaml.safe_load(recipe_yaml(Recipe.model_validate(_DATA)))
    assert read == _DATA
    assert list(read) == list(_DATA)


def test_the_name_of_a_mix_stands_for_it() -> None:
    recipe = Recipe.model_validate(_changed(None, gguf="Q4_K_M"))
    assert recipe.gguf == FileChoice(mix="Q4_K_M", tensors={}, quantizer="feedback")


def test_which_artifacts_are_written() -> None:
    recipe = Recipe.model_validate(_DATA)
    assert recipe.artifacts == ("gguf",)
    assert recipe.file("gguf").mix == "Q4_0"
    assert Recipe.model_validate(_changed(None, onnx="F32")).artifacts == ("gguf", "onnx")


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        (None, {"treads": 3}, "treads"),
        ("budget", {"contxt": 3}, r"budget\.contxt"),
        ("recover", {"steps": 3}, r"recover\.steps"),
        ("compress", {"experts": "many"}, r"compress\.experts"),
        ("compress", {"experts": 0}, r"compress\.experts"),
        ("compress", {"experts": 2.5}, r"compress\.experts"),
        ("compress", {"method": "magic"}, r"compress\.method"),
        ("compress", {"experts": [4, 0]}, r"compress\.experts"),
        ("compress", {"experts": None}, r"compress\.experts"),
        ("compress", {"width": 0}, r"compress\.width"),
        ("compress", {"drop_blocks": -1}, r"compress\.drop_blocks"),
        ("compress", {"drop_moe_layers": 0.5}, r"compress\.drop_moe_layers"),
        ("compress", {"allocation": "fair"}, r"compress\.allocation"),
        (
            "compress",
            {"allocation": "global", "experts": [4, 5]},
            "allocation is global, so experts must be one number",
        ),
        ("compress", {"edit": "magic"}, r"compress\.edit"),
        ("compress", {"edit": "svd"}, "edit and edit_size go together"),
        ("compress", {"edit_size": 3}, "edit and edit_size go together"),
        ("compress", {"edit": "svd", "edit_size": 0}, r"compress\.edit_size"),
        ("compress", {"sample_blocks": 0}, r"compress\.sample_blocks"),
        ("budget", {"bytes": -1}, r"budget\.bytes"),
        ("budget", {"kind": "both"}, r"budget\.kind"),
        ("budget", {"kv_type": "f8"}, r"budget\.kv_type"),
        ("recover", {"rungs": "all"}, r"recover\.rungs"),
        ("recover", {"rungs": [_RUNG | {"blocks_per_step": 0}]}, r"recover\.rungs\.0\.blocks_per_step"),
        ("recover", {"rungs": [_RUNG | {"scope": "everything"}]}, r"recover\.rungs\.0\.scope"),
        ("recover", {"rungs": [_RUNG, _RUNG | {"blocks": 0}]}, r"recover\.rungs\.1\.blocks"),
        ("recover", {"rungs": [_RUNG | {"loss": "mse"}]}, r"recover\.rungs\.0\.loss"),
        ("recover", {"rungs": [_RUNG | {"learning_rate": 0}]}, r"recover\.rungs\.0\.learning_rate"),
        ("recover", {"rungs": [_RUNG | {"learning_rate": math.nan}]}, r"recover\.rungs\.0\.learning_rate"),
        ("recover", {"rungs": [_RUNG | {"learning_rate": math.inf}]}, r"recover\.rungs\.0\.learning_rate"),
        ("recover", {"rungs": [_RUNG | {"learning_rate": None}]}, "learning_rate is a number with this scope"),
        ("recover", {"rungs": [_RUNG | {"experts": 8}]}, "experts says how many top-experts"),
        ("recover", {"rungs": [_RUNG | {"scope": "top-experts"}]}, "experts says how many top-experts"),
        ("recover", {"rungs": [_RUNG | {"scope": "adapters"}]}, "rank is the adapters'"),
        ("recover", {"rungs": [_RUNG | {"loss": "ka"}]}, "batches_per_round belongs to ka and sar"),
        ("recover", {"rungs": [_RUNG | {"batches_per_round": 1}]}, "batches_per_round belongs to ka and sar"),
        ("recover", {"rungs": [_RUNG | {"rank": 8}]}, "rank is the adapters'"),
        ("recover", {"rungs": [_RUNG | {"scope": "experts", "loss": "router-logits"}]}, "its scope must be router"),
        ("recover", {"after_quantizing": _RUNG | {"scope": "experts"}}, "its scope must be router"),
        ("text", {"calibration_blocks": None}, r"text\.calibration_blocks"),
        ("source", {"model": 3}, r"source\.model"),
        (None, {"save_student": "perhaps"}, "save_student"),
        (None, {"gguf": 4}, "gguf"),
        (None, {"version": 1}, "version"),
        (None, {"gguf": None, "onnx": None}, "gguf"),
        ("gguf", {"inputs": "float32"}, "inputs of gguf must be int8"),
        ("gguf", {"inputs": "int4"}, r"gguf\.inputs"),
    ],
)
def test_a_wrong_choice_is_named(tmp_path: Path, part: str | None, values: dict[str, object], said: str) -> None:
    path = _write(tmp_path, _changed(part, **values))
    with pytest.raises(InputError, match=rf"recipe\.yaml: .*{said}.*--dry-run writes a valid recipe"):
        load_recipe(path)


@pytest.mark.parametrize("key", [key for key in _DATA if key != "version"])
def test_a_missing_choice_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=rf"{key}: field required"):
        load_recipe(_write(tmp_path, {name: value for name, value in _DATA.items() if name != key}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(""),
        lambda path: path.write_text("- a\n- b\n"),
        lambda path: path.write_text("a: [1"),
        lambda path: path.write_text("a: !!python/object/apply:os.getcwd []"),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.unlink(),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = _write(tmp_path, _DATA)
    damage(path)
    with pytest.raises(InputError, match=r"recipe\.yaml"):
        load_recipe(path)
