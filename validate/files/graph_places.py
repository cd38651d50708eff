"""The layers that the operators of any exporter's ONNX graph belong to."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from compressors.model.description.mixers import NoMixer
from compressors.model.description.spec import ModelSpec
from validate.files.recurrent_graph_settings import state_operators

__all__ = ["ATTENTION", "EXPERTS", "Places"]

ATTENTION = ("GroupQueryAttention", "MultiHeadAttention", "Attention")
"""The operators of attention."""
EXPERTS = ("MoE", "QMoE")
"""The operators of routed experts."""


class Places:
    """Finds the layers that nodes belong to, from the order in which they run."""

    def __init__(self, spec: ModelSpec) -> None:
        self._with_mixers = [i for i, layer in enumerate(spec.layers) if not isinstance(layer.mixer, NoMixer)]
        self._with_experts = [i for i, layer in enumerate(spec.layers) if layer.routed is not None]
        self._mixing = (*ATTENTION, *state_operators(spec))
        self._n_mixers = self._n_experts = 0

    def of(self, node: onnx.NodeProto, is_inside: bool) -> int:
        """The layer of the last mixer, or of experts."""
        self._n_mixers += node.op_type in self._mixing and not is_inside
        if node.op_type not in EXPERTS:
            return self._counted(self._with_mixers, self._n_mixers)
        self._n_experts += 1
        return self._counted(self._with_experts, self._n_experts)

    def _counted(self, layers: Sequence[int], number: int) -> int:
        return layers[min(max(number, 1), len(layers)) - 1] if layers else 0
