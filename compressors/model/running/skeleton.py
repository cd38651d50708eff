"""transformers' modules without weights: built on the meta device, with a student's sizes, layer by layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressors.model.description.shape import MoeShape
from compressors.model.families.table import Role
from compressors.model.running.experts import GROUPED_EXPERTS, register_grouped_experts
from compressors.model.running.layers import LayerWeights

__all__ = ["Skeleton"]


class Skeleton:
    """Decoder layers, rotary embedding and final norm of a model of this shape.

    Args:
        folder: the checkpoint whose ``config.json`` tells everything but the sizes.
        shape: the student's.
    """

    def __init__(self, folder: Path, shape: MoeShape) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self._shape = shape
        register_grouped_experts()
        config = _with_sizes(AutoConfig.from_pretrained(folder, local_files_only=True), shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", experts_implementation=GROUPED_EXPERTS
            )
        self.layers = [self._fitted(layer, index, model.config) for index, layer in enumerate(model.model.layers)]
        self.rotary: nn.Module = type(model.model.rotary_emb)(config=config)  # computes, so it needs a device
        self.final_norm: nn.Module = model.model.norm.eval()

    def state(self, weights: LayerWeights, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """A layer's weights by their names in its module; experts stay in storage dtype, routers are float32."""
        experts = self._shape.family.experts_module
        named = {
            self.name(role): tensor.to(device, torch.float32 if role is Role.ROUTER else dtype)
            for role, tensor in weights.others.items()
        }
        if len(weights.down_EDF):
            named[f"{experts}.gate_up_proj"] = weights.gate_up_EFD.to(device)
            named[f"{experts}.down_proj"] = weights.down_EDF.to(device)
        return named

    def name(self, role: Role) -> str:
        """The name of the role's tensor inside a decoder layer."""
        family = self._shape.family
        if role is Role.ROUTER:
            return f"{family.router_module}.weight"
        return family.names[role].removeprefix("model.layers.{layer}.")

    def _fitted(self, layer: nn.Module, index: int, config: Any) -> nn.Module:
        """The layer with sizes of its own where layers differ; a MoE sub-layer that was dropped adds nothing."""
        family, shape = self._shape.family, self._shape.layer(index)
        if shape.has_moe and self._shape.sizes is not None:
            with torch.device("meta"):
                layer = type(layer)(_with_sizes(copy.deepcopy(config), shape), index)
        if shape.has_moe:
            layer.get_submodule(family.router_module).register_forward_pre_hook(_in_float32)
        else:
            setattr(layer, self.name(Role.MOE_NORM).removesuffix(".weight"), nn.Identity())
            setattr(layer, family.experts_module.split(".")[0], _Nothing())
        return layer.eval()


class _Nothing(nn.Module):
    """Stands where a MoE sub-layer was dropped."""

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_BTD)


def _with_sizes(config: Any, shape: MoeShape) -> Any:
    keys = shape.family.config_keys
    setattr(config, keys.n_experts, shape.n_experts)
    setattr(config, keys.expert_width, shape.expert_width)
    config.num_hidden_layers = shape.n_layers
    config.num_experts_per_tok = shape.top_k
    config.head_dim = shape.head_dim  # some kinds of rotary embedding do not work it out themselves
    return config


def _in_float32(_router: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].float(), *inputs[1:])
