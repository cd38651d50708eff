"""TEMPORARY: what consumers of the old description still ask; goes when all of them iterate layers and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from compressors.model.description.roles import Role

if TYPE_CHECKING:
    from compressors.model.description.mixers import GroupedQuery
    from compressors.model.description.spec import ModelSpec, MoeSize


class Legacy:
    @property
    def _self(self) -> ModelSpec:
        return cast("ModelSpec", self)

    @property
    def attention(self) -> GroupedQuery:
        return cast("GroupedQuery", next(layer.mixer for layer in self._self.layers if not layer.mixer.is_recurrent))

    @property
    def n_heads(self) -> int:
        return self.attention.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.attention.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim

    @property
    def rope_theta(self) -> float:
        return self.attention.rope.theta

    @property
    def normalize_top_k(self) -> bool:
        return next(layer.routed.routing.normalizes for layer in self._self.layers if layer.routed)

    @property
    def sizes(self) -> tuple[MoeSize, ...] | None:
        sizes = tuple(layer.moe for layer in self._self.layers)
        return None if len(set(sizes)) == 1 else sizes

    def layer(self, index: int) -> ModelSpec:
        from dataclasses import replace

        spec = self._self
        return replace(spec, layers=(spec.layers[index],) * spec.n_layers)

    def layer_roles(self, layer: int) -> tuple[Role, ...]:
        return tuple(tensor.role for tensor in self._self.layers[layer].shared_tensors)

    @property
    def has_moe(self) -> bool:
        return self._self.n_experts > 0

    @property
    def is_dense(self) -> bool:
        return self._self.written.family is not self._self.family

    @property
    def stored_roles(self) -> tuple[Role, ...]:
        written = self._self.written
        found = {tensor.role for tensor, _ in written.places}
        return tuple(role for role in Role if role in found)

    def stored_name(self, role: Role, layer: int | None = None, expert: int | None = None) -> str:
        spec = self._self
        written = spec.written
        try:
            name = written.tensor(role, layer).name
        except KeyError:
            name = spec.tensor(role, layer).name
        return name.format(layer=layer, expert=expert)

    @property
    def gguf_architecture(self) -> str:
        return self._self.written.family.gguf.architecture

    def gguf_name(self, role: Role, layer: int | None = None) -> str:
        try:
            tensor = self._self.written.tensor(role, layer)
        except KeyError:
            tensor = self._self.tensor(role, layer)
        return tensor.gguf.name.format(layer=layer)

    def onnx_name(self, role: Role, layer: int | None = None) -> str:
        try:
            tensor = self._self.written.tensor(role, layer)
        except KeyError:
            tensor = self._self.tensor(role, layer)
        return tensor.onnx_name.format(layer=layer)

    def in_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        written = self._self.written
        return written.family.edited(written, config)

    @property
    def expert_parameters(self) -> int:
        return max(layer.expert_parameters for layer in self._self.layers)

    @property
    def layer_parameters(self) -> int:
        return max(layer.parameters for layer in self._self.layers)

    @property
    def dense_layer_parameters(self) -> int:
        return max(layer.parameters_beside_experts for layer in self._self.layers)


NORMS = frozenset({Role.FINAL_NORM, Role.ATTENTION_NORM, Role.QUERY_NORM, Role.KEY_NORM, Role.MOE_NORM})
ATTENTION = frozenset({Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUTPUT})


def role_shape(role: Role, spec: ModelSpec) -> tuple[int, ...]:
    return spec.dimensions(role, None if role.is_global else 0)
