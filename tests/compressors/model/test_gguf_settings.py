"""Settings of files with numbers for each layer, against those of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compressors.model.config.reading import read_spec
from compressors.model.description.family import GgufValue
from compressors.model.description.routing import Routing, Score
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.gguf_settings import gguf_setting_symptoms

_HEADS = "attention.head_count_kv"


def _with_keys(spec: ModelSpec, **changed: GgufValue) -> ModelSpec:
    """The model, of a family that writes other values under some keys."""
    keys = dict(spec.family.gguf.keys(spec)) | {key.replace("__", "."): value for key, value in changed.items()}
    return replace(spec, family=replace(spec.family, gguf=replace(spec.family.gguf, keys=lambda _spec: keys)))


def _metadata(spec: ModelSpec) -> dict[str, GgufValue]:
    gguf = spec.family.gguf
    settings = {f"{gguf.architecture}.{key}": value for key, value in gguf.keys(spec).items()}
    return {"general.architecture": gguf.architecture, **settings}


@pytest.mark.parametrize(
    ("wanted", "found", "said"),
    [
        ((4, 0, 4), (4, 0, 4), None),
        ((4, 0, 4), (4, 4, 4), "(4, 4, 4) in the file, (4, 0, 4) in config.json"),
        ((4, 0, 4), 4, "4 in the file, (4, 0, 4) in config.json"),
        ((4, 4, 4), 4, None),
        (4, (4, 4, 4), None),
        (4, (4, 4, 0), "(4, 4, 0) in the file, 4 in config.json"),
        (4, (), "() in the file, 4 in config.json"),
    ],
)
def test_numbers_by_layer_are_compared(
    fine_folder: Path, wanted: GgufValue, found: GgufValue, said: str | None
) -> None:
    spec = _with_keys(read_spec(fine_folder), attention__head_count_kv=wanted)
    metadata = _metadata(spec) | {f"qwen3moe.{_HEADS}": found}
    assert gguf_setting_symptoms(metadata, spec) == ([] if said is None else [f"{_HEADS}: {said}"])


def test_an_array_that_the_model_does_not_have_is_named(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)
    (said,) = gguf_setting_symptoms(_metadata(spec) | {"qwen3moe.attention.recurrent_layers": (True, False)}, spec)
    assert said == "attention.recurrent_layers: (True, False) in the file, and the model has no such setting"


@pytest.mark.parametrize("score", Score)
def test_the_score_of_a_router_may_be_said_and_must_be_right(fine_folder: Path, score: Score) -> None:
    spec = read_spec(fine_folder)
    layers = [replace(layer, feed_forward=replace(layer.routed, routing=Routing(score))) for layer in spec.layers]
    scored = replace(spec, layers=tuple(layers))
    right = {Score.SOFTMAX: 1, Score.SIGMOID: 2, Score.LOGITS: 3}[score]
    for number in (0, 1, 2, 3):
        symptoms = gguf_setting_symptoms(_metadata(scored) | {"qwen3moe.expert_gating_func": number}, scored)
        assert (not symptoms) == (number in (0, right)), symptoms


@pytest.mark.parametrize("key", ["embedding_scale", "residual_scale"])
def test_a_factor_that_is_absent_is_one(fine_folder: Path, key: str) -> None:
    spec = read_spec(fine_folder)
    metadata = _metadata(spec)
    assert gguf_setting_symptoms(metadata, _with_keys(spec, **{key: 1.0})) == []
    (said,) = gguf_setting_symptoms(metadata, _with_keys(spec, **{key: 0.5}))
    assert said == f"{key}: absent in the file, 0.5 in config.json"
