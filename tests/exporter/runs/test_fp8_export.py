"""A float8 checkpoint is exported to the same bytes as the same model in bfloat16."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from exporter.inspection import describe
from tests.float8_checkpoints import write_float8

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def models(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The toy in float8 and, dequantized, in bfloat16; both folders have one name, which files repeat."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("fp8", "plain"):
        (folder / kind).mkdir()
    write_float8(toy_model, folder / "fp8" / "model", folder / "plain" / "model")
    return [folder / kind / "model" for kind in ("fp8", "plain")]


@pytest.fixture(scope="module")
def outs(
    models: list[Path],
    tiny_recipe: Path,
    small_texts: tuple[Path, Path],
    run_command: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Path]:
    """The output folders of a whole run from each."""
    folder, outs = tmp_path_factory.mktemp("outs"), []
    for model in models:
        recipe = yaml.safe_load(tiny_recipe.read_text())
        recipe["source"], recipe["save_student"] = {**recipe["source"], "identity": None}, True
        recipe["recover"] |= {"rungs": [], "after_quantizing": None}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        out = folder / model.parent.name / "out"
        out.parent.mkdir()
        result = run_command(
            [
                *(sys.executable, "-m", "exporter", str(model), "--recipe", str(folder / "recipe.yaml")),
                *("--calibration", str(small_texts[0]), "--text", str(small_texts[1])),
                *("--out", str(out)),
            ]
        )
        assert result.returncode == 0, result.stdout + result.stderr
        outs.append(out)
    return outs


def test_every_file_of_the_model_has_the_same_bytes(outs: list[Path]) -> None:
    contents = [
        {
            str(file.relative_to(out)): file.read_bytes()
            for file in sorted(out.rglob("*"))
            if file.is_file() and (file.parent != out or file.suffix == ".gguf")
        }
        for out in outs
    ]
    assert sum(name.endswith(".gguf") for name in contents[0]) == 1
    assert {"onnx/model.onnx", "onnx/model.onnx.data", "onnx/config.json", "onnx/genai_config.json"} <= set(contents[0])
    assert sum("student" in name for name in contents[0]) >= 5
    assert contents[0] == contents[1]


def test_the_figures_are_the_same(outs: list[Path]) -> None:
    fp8, plain = (json.loads((out / "report.json").read_text(encoding="utf-8")) for out in outs)
    for name in ("perplexity", "perplexity_teacher"):
        assert [row.get(name) for row in fp8["validation"]] == [row.get(name) for row in plain["validation"]]
    assert fp8["budget"]["predicted"] == plain["budget"]["predicted"]
    assert fp8["source"]["identity"] != plain["source"]["identity"]


def test_what_is_written_is_not_called_quantized(outs: list[Path]) -> None:
    configs = list(outs[0].rglob("config.json"))
    assert len(configs) == 2
    for config in configs:
        assert "quantization_config" not in json.loads(config.read_text())
    for file in outs[0].rglob("*.safetensors"):
        assert not any(name.endswith("_scale_inv") for name in load_file(file))


def test_inspect_says_how_the_weights_are_stored(models: list[Path]) -> None:
    fp8, plain = (describe(model) for model in models)
    assert (fp8["stored_as"], plain["stored_as"]) == ("FP8, block 128x128", None)
    differences = {key for key in plain if fp8[key] != plain[key]}
    assert differences == {"folder", "identity", "stored_as"}
