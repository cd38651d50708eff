"""The capability table: what each container refuses, and that both writers and the planner say the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressors.model.config.reading import read_spec
from compressors.model.description.feed_forward import Routed
from compressors.model.description.glu import Activation, Glu
from compressors.model.description.mixers import GatedDelta
from compressors.model.description.rope import RopeKind
from compressors.model.description.routing import Routing, Score
from compressors.model.description.spec import NO_MOE, ModelSpec, MoeSize
from compressors.model.errors import UnsupportedError
from exporter.capabilities.rules import Container
from exporter.capabilities.table import TABLE, refusal, refuse_unless_held
from exporter.writing.gguf.layout import plan_tensors as gguf_tensors
from exporter.writing.onnx.layout import plan_tensors as onnx_tensors
from tests.altered import altered, with_dense_layers
from tests.exporter.writing.onnx.described import latent_attention


@pytest.fixture
def spec(fine_folder: Path) -> ModelSpec:
    return read_spec(fine_folder)


def _with_experts_like(spec: ModelSpec, **changes: object) -> ModelSpec:
    layers = tuple(
        replace(layer, feed_forward=replace(layer.feed_forward, **changes))  # type: ignore[type-var,arg-type]
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


def _with_latent(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """Latent attention in all layers, whose rotary embedding is as wide as it says."""
    mixer = latent_attention(**changes)
    mixer = replace(mixer, rope=replace(mixer.rope, width=mixer.rotary_dim))
    return replace(spec, layers=tuple(replace(layer, mixer=mixer) for layer in spec.layers))


@pytest.mark.parametrize("container", Container)
def test_trained_models_are_held(container: Container, family_folder: Path) -> None:
    assert refusal(read_spec(family_folder), container) is None


@pytest.mark.parametrize(
    ("container", "said"),
    [
        (Container.GGUF, "32 experts of width 128, no experts: they cannot be written as GGUF"),
        (Container.ONNX, None),
        (Container.STUDENT, "32 experts of width 128, no experts, which transformers could not load"),
    ],
)
def test_a_layer_that_lost_its_experts(spec: ModelSpec, container: Container, said: str | None) -> None:
    lost = spec.with_sizes([MoeSize(32, 128)] * 5 + [NO_MOE])
    sentence = refusal(lost, container)
    assert sentence is None if said is None else sentence is not None and said in sentence


def test_layers_that_never_had_experts_differ_from_layers_that_lost_them(spec: ModelSpec) -> None:
    dense = with_dense_layers(spec, 2)
    assert [refusal(dense, container) for container in Container] == [None] * len(Container)


def test_onnx_refuses_what_its_graphs_do_not_compute(spec: ModelSpec) -> None:
    first, *others = spec.layers
    delta = replace(first, mixer=GatedDelta(n_key_heads=2, n_value_heads=4, key_dim=16, value_dim=16, kernel=4))
    short = replace(delta, mixer=replace(delta.mixer, kernel=1))
    rope = replace(spec.rope, width=24)
    for model, said in (
        (
            _with_experts_like(spec, glu=Glu(Activation.GELU_TANH, is_gated=False)),
            "a gate whose activation is gelu_pytorch_tanh",
        ),
        (replace(spec, layers=(short, *others)), "the convolution of this model covers one token"),
        (altered(spec, head_dim=40), "runs heads of a multiple of 16 values; this model's have 40"),
        (altered(spec, rope=rope), "turns a multiple of 16 values of a head; this model's attention turns 24"),
        (_with_latent(spec, rank=40), "takes vectors of a multiple of 16 values; this model's have 56"),
    ):
        sentence = refusal(model, Container.ONNX)
        assert sentence is not None and said in sentence and "use --formats gguf" in sentence
        with pytest.raises(UnsupportedError, match="cannot be written as ONNX"):
            onnx_tensors(model, "F32")


def test_a_dense_student_needs_no_routing(spec: ModelSpec) -> None:
    one = spec.with_sizes([MoeSize(1, 512)] * 6)
    sigmoid = _with_experts_like(one, routing=Routing(score=Score.SIGMOID))
    assert isinstance(sigmoid.layers[0].feed_forward, Routed)
    assert refusal(sigmoid, Container.ONNX) is None


def test_gguf_refuses_what_llama_cpp_cannot_compute(spec: ModelSpec) -> None:
    llama3 = replace(spec.rope, kind=RopeKind.LLAMA3, factor=8.0, original_context=1024)
    for model, said in (
        (altered(spec, normalizes=False), "graph always normalises the weights"),
        (altered(spec, n_experts=1025), "at most 1024 experts and 512 layers; this model has 1025 and 6"),
        (altered(spec, rope=llama3), "cannot turn by the angles of rope_type 'llama3'"),
    ):
        sentence = refusal(model, Container.GGUF)
        assert sentence is not None and said in sentence
        with pytest.raises(UnsupportedError) as refused:
            gguf_tensors(model, "F16")
        assert str(refused.value) == sentence


def test_each_feature_has_at_most_one_rule_in_a_container() -> None:
    entries = [(rule.container, rule.feature) for rule in TABLE]
    assert len(set(entries)) == len(entries)


def test_nothing_is_refused_where_a_container_can_hold_a_model(spec: ModelSpec) -> None:
    assert all(refusal(spec, container) is None for container in Container)
    for container in Container:
        refuse_unless_held(spec, container)
