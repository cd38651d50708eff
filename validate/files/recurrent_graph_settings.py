"""The attributes that operators of recurrent mixers must have in any exporter's ONNX graph."""

from __future__ import annotations

import onnx

from compressors.model.description.mixers import GatedDelta, Mamba2, ShortConvolution
from compressors.model.description.spec import ModelSpec
from validate.files.own_graph_settings import AllowedValues

__all__ = ["RECURRENT", "recurrent_attributes", "state_operators"]

_STATE_OPERATORS = ("LinearAttention", "GatedDeltaNet")
RECURRENT = ("LinearAttention", "CausalConvWithState", "GatedRMSNorm")
"""Operators whose attributes are known."""

_SILU = (b"silu", b"swish")


def state_operators(spec: ModelSpec) -> tuple[str, ...]:
    """Operators that carry a state: a recurrent layer has one of them."""
    return ("CausalConvWithState",) if _has_short_convolutions(spec) else _STATE_OPERATORS


def _has_short_convolutions(spec: ModelSpec) -> bool:
    return any(isinstance(layer.mixer, ShortConvolution) for layer in spec.layers)


def recurrent_attributes(node: onnx.NodeProto, spec: ModelSpec, layer: int) -> AllowedValues:
    """The right values for such an operator.

    Args:
        node: the operator.
        spec: the model.
        layer: the layer that the operator belongs to, if it carries a state.
    """
    if node.op_type == "CausalConvWithState":
        usual = {"channels_last": (0, 1, None), "state_window": (0, None)}
        activation = (b"none", None) if _has_short_convolutions(spec) else _SILU
        return {"activation": activation, "ndim": (1, None), "dilation": (1, None), **usual}
    if node.op_type == "GatedRMSNorm":
        return {"activation": (*_SILU, None), "epsilon": (spec.rms_norm_eps,)}
    mixer = spec.layers[layer].mixer
    if isinstance(mixer, Mamba2):
        return {
            "q_num_heads": (mixer.n_groups, mixer.n_heads),
            "kv_num_heads": (mixer.n_heads,),
            "scale": (1.0,),
            "update_rule": (b"gated",),
            "state_window": (0, None),
        }
    if not isinstance(mixer, GatedDelta):
        return {"update_rule": ()}  # the layer has no state
    return {
        "q_num_heads": (mixer.n_key_heads, mixer.n_value_heads),  # another exporter may repeat queries
        "kv_num_heads": (mixer.n_value_heads,),
        "scale": (mixer.scale, 0.0, 1.0, None),  # 0 stands for the usual one; queries may be scaled before
        "update_rule": (b"gated_delta", None),
        "state_window": (0, None),
    }
