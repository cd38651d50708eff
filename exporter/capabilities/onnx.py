"""The rules of ONNX: the limits of ONNX Runtime's CPU operators in our graphs."""

from __future__ import annotations

from collections.abc import Collection

from compressors.model.description.glu import Activation
from compressors.model.description.mixers import GatedDelta, GroupedQuery, Latent, Mamba2, NoMixer, ShortConvolution
from compressors.model.description.onnx_cache import Attention, WithStates
from compressors.model.description.spec import ModelSpec
from exporter.capabilities.rules import Container, Feature, Rule

__all__ = ["RULES"]

_HEAD_MULTIPLE = 16
_MIXERS = (GroupedQuery.kind, Latent.kind, GatedDelta.kind, Mamba2.kind, ShortConvolution.kind)


def _mixers(spec: ModelSpec) -> str | None:
    mixers = [layer.mixer for layer in spec.layers if not isinstance(layer.mixer, NoMixer)]
    others = dict.fromkeys(mixer.kind for mixer in mixers if mixer.kind not in _MIXERS)
    if others:
        return _refused(f"our ONNX graphs have {_listed(_MIXERS)}; this model also has {_listed(others)}")
    if not any(isinstance(mixer, Attention) for mixer in mixers):
        return _refused("our ONNX graphs need a layer that attends, and this model has none")
    is_short = any(isinstance(mixer, WithStates) and mixer.kernel == 1 for mixer in mixers)
    kept = "our ONNX graphs keep the last inputs of a convolution"
    return _refused(f"{kept}, and the convolution of this model covers one token", is_short)


def _heads(spec: ModelSpec) -> str | None:
    """The attention operator checks it only when it runs (``group_query_attention_helper.h`` in ONNX Runtime)."""
    operator, multiple = "ONNX Runtime's GroupQueryAttention", f"a multiple of {_HEAD_MULTIPLE} values"
    for mixer in (layer.mixer for layer in spec.layers):
        if isinstance(mixer, GroupedQuery) and mixer.head_dim % _HEAD_MULTIPLE:
            runs = f"{operator} with a rotary embedding runs heads of {multiple}"
            return _refused(f"{runs}; this model's have {mixer.head_dim}")
        rope = mixer.rope if isinstance(mixer, GroupedQuery) else None
        if rope is not None and rope.width % _HEAD_MULTIPLE:
            return _refused(f"{operator} turns {multiple} of a head; this model's attention turns {rope.width}")
        if isinstance(mixer, Latent) and mixer.cached_values % _HEAD_MULTIPLE:
            halves = f"{operator} caches latent attention's vectors in halves, which takes vectors of {multiple}"
            return _refused(f"{halves}; this model's have {mixer.cached_values}")
    return None


def _expert_function(spec: ModelSpec) -> str | None:
    glus = {layer.routed.glu for layer in spec.written.layers if layer.routed is not None}
    ungated = (glu.activation for glu in glus if not glu.is_gated)
    activations = dict.fromkeys(each for each in ungated if each is not Activation.RELU_SQUARED)
    lacking = [f"experts without a gate whose activation is {activation}" for activation in activations]
    gates = dict.fromkeys(glu.activation for glu in glus if glu.is_gated and glu.activation is not Activation.SILU)
    lacking += [f"experts whose gate's activation is {activation}" for activation in gates]
    return _refused(f"ONNX Runtime's operators MoE and QMoE do not compute {_listed(lacking)} on the CPU", lacking)


def _refused(why: str, is_so: object = True) -> str | None:
    """Returns the sentence of a refusal; None if there is nothing to refuse."""
    return f"{why}: it cannot be written as ONNX" if is_so else None


def _listed(names: Collection[str]) -> str:
    *others, last = names or [""]
    return f"{', '.join(others)} and {last}" if others else last


RULES = (
    Rule(Container.ONNX, Feature.MIXERS, _listed(_MIXERS), _mixers),
    Rule(Container.ONNX, Feature.HEADS, f"a multiple of {_HEAD_MULTIPLE} values", _heads),
    Rule(
        Container.ONNX,
        Feature.EXPERT_FUNCTION,
        "SwiGLU, its limits and offsets included; without a gate, the square of ReLU",
        _expert_function,
    ),
)
"""The rules in the order in which they are asked; the first refusal counts."""
