"""The rules of ONNX: the limits of ONNX Runtime's CPU operators in our graphs."""

from __future__ import annotations

from collections.abc import Collection

from compressors.model.description.feed_forward import Routed
from compressors.model.description.glu import Activation
from compressors.model.description.mixers import GatedDelta, GroupedQuery, Latent, Mamba2, NoMixer, ShortConvolution
from compressors.model.description.onnx_cache import Attention, WithStates
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing, Score
from compressors.model.description.spec import ModelSpec
from exporter.capabilities.rules import Container, Feature, Rule

__all__ = ["RULES", "needs_nodes"]

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


def needs_nodes(routed: Routed) -> bool:
    """True if nodes must compute the experts, because no operator computes their function or weighs by their scales."""
    is_known = routed.glu.activation is Activation.SILU if routed.glu.is_gated else _squares_relu(routed)
    return not is_known or routed.routing.has_expert_scale


def _squares_relu(routed: Routed) -> bool:
    """True for experts without a gate that the operators compute, as if gates and values were the same."""
    return routed.glu.activation is Activation.RELU_SQUARED and not routed.routing.has_expert_scale


def _expert_function(spec: ModelSpec) -> str | None:
    layers = [(layer, layer.routed) for layer in spec.written.layers if layer.routed is not None]
    ungated = (routed for _, routed in layers if not routed.glu.is_gated)
    activations = dict.fromkeys(routed.glu.activation for routed in ungated if not _squares_relu(routed))
    lacking = [f"experts without a gate whose activation is {activation}" for activation in activations]
    if any(needs_nodes(routed) and Role.EXPERT_DOWN_BIAS in layer.roles for layer, routed in layers):
        lacking.append("biases of such experts")
    return _refused(f"ONNX Runtime's operators MoE and QMoE do not compute {_listed(lacking)} on the CPU", lacking)


def _shared_bases(spec: ModelSpec) -> str | None:
    """Nodes add what experts on bases lack to ONNX Runtime's operators: its functions, without biases."""
    layers = [(layer, layer.routed) for layer in spec.written.layers if layer.bases is not None]
    lacking = []
    if any(Role.EXPERT_GATE_UP_BIAS in layer.roles or Role.EXPERT_DOWN_BIAS in layer.roles for layer, _ in layers):
        lacking.append("biases of experts")
    if any(routed is not None and needs_nodes(routed) for _, routed in layers):
        lacking.append("experts that no operator computes")
    return _refused(f"our ONNX graphs have no shared bases beside {_listed(lacking)}", lacking)


def _routing(spec: ModelSpec) -> str | None:
    """Nodes for experts choose by the logits alone; weights are a softmax over the chosen."""
    by_nodes = [layer.routed for layer in spec.written.layers if layer.routed is not None and needs_nodes(layer.routed)]
    others = dict.fromkeys(rule.description for rule in (routed.routing for routed in by_nodes) if not _is_plain(rule))
    why = f"our ONNX graphs have one rule for experts that no operator computes; this model's is {_listed(others)}"
    return _refused(why, others)


def _is_plain(rule: Routing) -> bool:
    """True if a softmax over the chosen logits gives the weights, apart from the experts' scales."""
    is_softmax = rule.score is Score.LOGITS or (rule.score is Score.SOFTMAX and rule.normalizes)
    adds_nothing = max(rule.epsilon, rule.least_sum) == 0 and rule.scale == 1.0
    return is_softmax and adds_nothing and not rule.has_selection_bias and rule.n_groups == 1


def _refused(why: str, is_so: object = True) -> str | None:
    """Returns the sentence of a refusal; None if there is nothing to refuse."""
    return f"{why}: it cannot be written as ONNX" if is_so else None


def _listed(names: Collection[str]) -> str:
    *others, last = names or [""]
    return f"{', '.join(others)} and {last}" if others else last


RULES = (
    Rule(Container.ONNX, Feature.MIXERS, _listed(_MIXERS), _mixers),
    Rule(Container.ONNX, Feature.HEADS, f"a multiple of {_HEAD_MULTIPLE} values", _heads),
    Rule(Container.ONNX, Feature.MTP, "left out: ONNX Runtime does not draft with it", lambda _spec: None),
    Rule(
        Container.ONNX,
        Feature.EXPERT_FUNCTION,
        "SwiGLU, its limits and offsets included, and without a gate the square of ReLU, by operators; other functions "
        "with a gate by nodes for each expert",
        _expert_function,
    ),
    Rule(
        Container.ONNX,
        Feature.SHARED_BASES,
        "kept apart, with experts by operators and without biases",
        _shared_bases,
    ),
    Rule(
        Container.ONNX,
        Feature.ROUTING,
        "all with experts by operators; by nodes, a softmax over the chosen experts and their scales",
        _routing,
    ),
)
"""The rules in the order in which they are asked; the first refusal counts."""
