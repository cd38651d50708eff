"""The rules of ONNX: the operators of ONNX Runtime that our graphs are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from compressors.model.description.feed_forward import Dense
from compressors.model.description.mixers import GroupedQuery
from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import Kind
from exporter.capabilities.rules import Container, Feature, Rule

__all__ = ["RULES"]

_HEAD_MULTIPLE = 16


def _mixers(spec: ModelSpec) -> str | None:
    others = dict.fromkeys(layer.mixer.kind for layer in spec.layers if not isinstance(layer.mixer, GroupedQuery))
    return _refused(f"graphs have {GroupedQuery.kind}; this model also has {_listed(others)}") if others else None


def _heads(spec: ModelSpec) -> str | None:
    """The attention operator checks it only when it runs (``gqa_attention_base.h`` in ONNX Runtime)."""
    for mixer in (layer.mixer for layer in spec.layers):
        if isinstance(mixer, GroupedQuery) and mixer.head_dim % _HEAD_MULTIPLE:
            return (
                "ONNX Runtime's GroupQueryAttention with a rotary embedding runs heads of a multiple of "
                f"{_HEAD_MULTIPLE} values; this model's have {mixer.head_dim}: it cannot be written as ONNX; use "
                "--formats gguf"
            )
    return None


def _windows(spec: ModelSpec) -> str | None:
    windows = {layer.mixer.window for layer in spec.layers if isinstance(layer.mixer, GroupedQuery)}
    if len(windows) < 2:
        return None
    return _refused("graphs let attention reach back equally far in all layers; this model's has windows in some")


def _routing(spec: ModelSpec) -> str | None:
    """The operators apply a softmax over all experts; only whether the chosen weights are normalised is a setting."""
    rules = dict.fromkeys(layer.routed.routing for layer in spec.written.layers if layer.routed is not None)
    others = [rule.description for rule in rules if replace(rule, normalizes=True) != Routing()]
    return _refused(f"graphs choose experts by a softmax over all; this model's rule is {_listed(others)}", others)


def _expert_function(spec: ModelSpec) -> str | None:
    glus = {layer.feed_forward.glu for layer in spec.layers if layer.feed_forward is not None}
    others = [glu for glu in glus if not glu.is_plain_swiglu]
    return _refused("graphs compute SwiGLU, silu(gate) * up; this model's experts compute another function", others)


def _shared_expert(spec: ModelSpec) -> str | None:
    shared = dict.fromkeys(routed.shared for layer in spec.layers if (routed := layer.routed) is not None)
    found = [expert.description for expert in shared if expert is not None]
    return _refused(f"graphs have routed experts alone; this model has {_listed(found)} beside them", found)


def _dense_layers(spec: ModelSpec) -> str | None:
    written = spec.written
    n_dense = sum(isinstance(layer.feed_forward, Dense) for layer in written.layers)
    is_mixed = n_dense > 0 and written.n_experts > 0
    return _refused(
        f"graphs have experts or one feed-forward in all layers; {n_dense} of this model's differ", is_mixed
    )


def _biases(spec: ModelSpec) -> str | None:
    found = dict.fromkeys(tensor.role for tensor, _ in spec.written.places if tensor.kind is Kind.VECTOR)
    return _refused(f"graphs add no biases; this model has {_listed(found)}", found)


def _refused(why: str, is_so: object = True) -> str | None:
    """The sentence of a refusal, if there is anything to refuse."""
    return f"our ONNX {why}: it cannot be written as ONNX; use --formats gguf" if is_so else None


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names)


RULES = (
    Rule(Container.ONNX, Feature.MIXERS, GroupedQuery.kind, _mixers),
    Rule(Container.ONNX, Feature.HEADS, f"a multiple of {_HEAD_MULTIPLE} values", _heads),
    Rule(
        Container.ONNX,
        Feature.WINDOWS,
        "one in all layers; files are written for no more tokens than it has",
        _windows,
    ),
    Rule(
        Container.ONNX,
        Feature.ROUTING,
        "a softmax over all experts, whose chosen weights are normalised or not",
        _routing,
    ),
    Rule(Container.ONNX, Feature.EXPERT_FUNCTION, "SwiGLU", _expert_function),
    Rule(Container.ONNX, Feature.SHARED_EXPERT, "no", _shared_expert),
    Rule(Container.ONNX, Feature.DENSE_LAYERS, "no", _dense_layers),
    Rule(Container.ONNX, Feature.BIASES, "no", _biases),
)
"""In the order in which they are asked; the first refusal counts."""
