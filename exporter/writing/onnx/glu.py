"""The function between an expert's products, as attributes of the MoE operators and as nodes."""

from __future__ import annotations

from typing import Any

import numpy as np

from compressors.model.description.glu import Activation, Glu
from compressors.model.files.onnx_names import RELU_ALPHA
from exporter.writing.onnx.builder import GraphBuilder

__all__ = ["add_glu", "operator_attributes"]


def operator_attributes(glu: Glu) -> dict[str, Any]:
    """Attributes of MoE and QMoE: rows of gate and up alternate (fusion 1); beta is added to up.

    The square of ReLU is x sigmoid(alpha x) x with an alpha so large that the sigmoid is 0 or 1: each row of up stands
    for the gate too.
    """
    attributes: dict[str, Any] = {"activation_type": "swiglu", "swiglu_fusion": 1}
    alpha = glu.alpha if glu.is_gated else RELU_ALPHA
    attributes |= {"activation_alpha": alpha, "activation_beta": glu.offset}
    return attributes if glu.limit is None else attributes | {"swiglu_limit": glu.limit}


def add_glu(graph: GraphBuilder, glu: Glu, gate: str | None, up: str, prefix: str) -> str:
    """Adds nodes that compute the function; ``gate`` is None where there is none. Names begin with ``prefix``."""
    if gate is None:
        return _activated(graph, glu, up, prefix)
    if glu.limit is not None:
        low, high = (
            graph.constant(f"glu.{name}", sign * glu.limit, np.float32) for name, sign in (("low", -1), ("high", 1))
        )
        gate = graph.node("Clip", [gate, "", high], f"{prefix}.limited_gate")
        up = graph.node("Clip", [up, low, high], f"{prefix}.limited_up")
    activated = _activated(graph, glu, gate, prefix)
    if glu.offset:
        up = graph.node("Add", [up, graph.constant("glu.offset", glu.offset, np.float32)], f"{prefix}.shifted_up")
    return graph.node("Mul", [activated, up], f"{prefix}.hidden")


def _activated(graph: GraphBuilder, glu: Glu, values: str, prefix: str) -> str:
    if glu.activation is Activation.GELU_TANH:
        return graph.node("Gelu", [values], f"{prefix}.gelu", approximate="tanh")
    if glu.activation is Activation.RELU_SQUARED:
        relu = graph.node("Relu", [values], f"{prefix}.relu")
        return graph.node("Mul", [relu, relu], f"{prefix}.relu_squared")
    inner = values
    if glu.alpha != 1.0:
        alpha = graph.constant("glu.alpha", glu.alpha, np.float32)
        inner = graph.node("Mul", [values, alpha], f"{prefix}.times_alpha")
    sigmoid = graph.node("Sigmoid", [inner], f"{prefix}.sigmoid")
    return graph.node("Mul", [values, sigmoid], f"{prefix}.silu")
