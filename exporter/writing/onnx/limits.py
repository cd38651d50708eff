"""What ONNX Runtime's operators on the CPU cannot compute of a model, in a sentence each."""

from __future__ import annotations

from collections.abc import Iterator

from compressors.model.description.feed_forward import Routed
from compressors.model.description.glu import Activation, Glu
from compressors.model.description.mixers import GroupedQuery
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.errors import UnsupportedError

__all__ = ["check_representable", "onnx_limit"]

_HEAD_MULTIPLE = 16


def onnx_limit(spec: ModelSpec) -> str | None:
    """Says what of a model cannot be computed; None if everything can."""
    return next((limit for layer in spec.written.layers for limit in _limits(layer)), None)


def check_representable(spec: ModelSpec) -> None:
    """Refuses a model that cannot be written.

    Raises:
        UnsupportedError: the message says why.
    """
    limit = onnx_limit(spec)
    if limit is not None:
        raise UnsupportedError(f"{limit}: it cannot be written as ONNX; use --formats gguf")


def _limits(layer: LayerSpec) -> Iterator[str]:
    if isinstance(layer.mixer, GroupedQuery) and layer.mixer.head_dim % _HEAD_MULTIPLE:
        # the attention operator checks it only when it runs (gqa_attention_base.h in ONNX Runtime)
        yield (
            f"ONNX Runtime's GroupQueryAttention with a rotary embedding runs heads of a multiple of {_HEAD_MULTIPLE} "
            f"values; this model's have {layer.mixer.head_dim}"
        )
    if isinstance(layer.feed_forward, Routed):
        lacks = _operator_lacks(layer.feed_forward.glu)
        if lacks is not None:
            yield f"ONNX Runtime's operators MoE and QMoE do not compute {lacks} on the CPU"


def _operator_lacks(glu: Glu) -> str | None:
    if not glu.is_gated:
        return f"experts without a gate whose activation is {glu.activation}"
    if glu.activation is not Activation.SILU:
        return f"experts whose gate's activation is {glu.activation}"
    return None
