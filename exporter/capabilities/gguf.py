"""The rules of GGUF: what llama.cpp's graphs, which read the files, can compute."""

from __future__ import annotations

from compressors.model.description.gguf_rope import gguf_rope_of
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError
from exporter.capabilities.rules import Container, Feature, Rule

__all__ = ["RULES"]

_MOST_EXPERTS, _MOST_LAYERS = 1024, 512  # LLAMA_MAX_EXPERTS and LLAMA_MAX_LAYERS in src/llama-hparams.h


def _different_layers(spec: ModelSpec) -> str | None:
    has_experts = [layer.routed is not None for layer in spec.layers]
    if spec.is_uniform and (spec.written.family.gguf.mixes_layers or has_experts == sorted(has_experts)):
        return None
    if spec.is_uniform:
        first = has_experts.index(False, has_experts.index(True))
        return (
            f"llama.cpp's {spec.written.family.gguf.architecture} graph has experts in every layer after the first one "
            f"with experts; layer {first} of this model has none: it cannot be written as GGUF"
        )
    return (
        f"llama.cpp's {spec.written.family.gguf.architecture} graph has one number of experts and one expert "
        f"width for all layers; these layers have {spec.described_sizes}: they cannot be written as GGUF "
        "unless all layers are given the same"
    )


def _graph(spec: ModelSpec) -> str | None:
    gguf = spec.written.family.gguf
    refusal = gguf.refusal(spec)
    if refusal is None:
        return None
    return f"llama.cpp's {gguf.architecture} {refusal}: it cannot be written as GGUF"


def _size(spec: ModelSpec) -> str | None:
    if spec.n_experts <= _MOST_EXPERTS and spec.n_layers <= _MOST_LAYERS:
        return None
    return (
        f"llama.cpp loads at most {_MOST_EXPERTS} experts and {_MOST_LAYERS} layers; this model has "
        f"{spec.n_experts} and {spec.n_layers}: it cannot be written as GGUF"
    )


def _rope(spec: ModelSpec) -> str | None:
    try:
        gguf_rope_of(spec)
    except UnsupportedError as error:
        return str(error)
    return None


def _mtp(spec: ModelSpec) -> str | None:
    if spec.mtp is None or spec.family.mtp is not None:
        return None
    return f"{spec.family.why_no_mtp or 'llama.cpp has no such graph'}: leave --keep-mtp out"


def _shared_bases(spec: ModelSpec) -> str | None:
    if all(layer.bases is None for layer in spec.blocks):
        return None
    return (
        "llama.cpp's graphs read every expert's matrices whole, and experts of this model share a base and have an "
        "adapter each: they cannot be written as GGUF unless --materialize multiplies them out, which saves nothing"
    )


RULES = (
    Rule(Container.GGUF, Feature.SHARED_BASES, "none: `--materialize` multiplies them out", _shared_bases),
    Rule(
        Container.GGUF,
        Feature.DIFFERENT_LAYERS,
        "one number of experts and one width for all layers that have experts, and no layer without a feed-forward",
        _different_layers,
    ),
    Rule(Container.GGUF, Feature.GRAPH, "what llama.cpp's graph of the family computes, see below", _graph),
    Rule(Container.GGUF, Feature.MTP, "with `--keep-mtp`, where llama.cpp's graph of the family runs it", _mtp),
    Rule(Container.GGUF, Feature.SIZE, f"at most {_MOST_EXPERTS} experts and {_MOST_LAYERS} layers", _size),
    Rule(Container.GGUF, Feature.ROPE, "the scalings that llama.cpp's graph of the family computes, see below", _rope),
)
"""The rules in the order in which they are asked; the first refusal counts."""
