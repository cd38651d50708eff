"""transformers' modules without weights: built on the meta device, with a student's sizes, layer by layer."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compressors.model.config.reading import language_model_config, transformers_config
from compressors.model.description.gate_order import gates_first
from compressors.model.description.mixers import GroupedQuery, Mamba2
from compressors.model.description.mtp import MTP_MODULES
from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec, MoeSize
from compressors.model.description.tensors import Kind
from compressors.model.errors import UnsupportedError
from compressors.model.running.experts import GROUPED_EXPERTS, register_grouped_experts
from compressors.model.running.layers import LayerWeights

__all__ = ["Skeleton"]

_NO_LIMIT = (0.0, math.inf)
"""The limits of the steps of Mamba-2's heads; a class of transformers has another lower one of its own."""


class Skeleton:
    """Decoder layers, rotary embedding and final norm of a student.

    Args:
        settings: the source's, as ``config.json`` has them; they tell everything but the sizes.
        spec: the student.
    """

    def __init__(self, settings: Mapping[str, Any], spec: ModelSpec) -> None:
        from transformers import AutoModelForCausalLM

        self._spec = spec
        register_grouped_experts()
        # it recommends packages for recurrent layers in every process, but torch's own arithmetic is meant to be used
        logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
        self._settings = language_model_config(settings)
        config = self._config(spec)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, experts_implementation=GROUPED_EXPERTS
            )
        _store_nothing_for_others(model)
        self.is_causal_by_itself: bool = model.config._attn_implementation == "sdpa"  # eager attention needs a mask
        self._like = [*range(spec.n_layers), *([] if spec.mtp is None else [_layer_like(spec.mtp, spec)])]
        self.final_norm: nn.Module = model.get_submodule(spec.tensor(Role.FINAL_NORM).submodule).eval()
        self.layers = [self._fitted(layer, index, model.config) for index, layer in enumerate(model.model.layers)]
        if spec.mtp is not None:
            self.layers.append(self._mtp_layer(model))
        self.rotary = _rotary(model.model, config)
        self.cache_argument = _cache_argument(self.layers[0])
        has_kinds = self.rotary is not None and _LAYER_TYPE in inspect.signature(self.rotary.forward).parameters
        self._rotary_kinds: Sequence[str] | None = model.config.layer_types if has_kinds else None

    def position_embeddings(self, index: int, hidden_BTD: torch.Tensor, positions_1T: torch.Tensor) -> Any:
        """The cosines and sines that a layer turns by, of the dtype and on the device of the hidden states; or None."""
        if self.rotary is None:
            return None
        kind = {} if self._rotary_kinds is None else {_LAYER_TYPE: self._rotary_kinds[self._like[index]]}
        return self.rotary(hidden_BTD, positions_1T, **kind)

    def state(
        self, index: int, weights: LayerWeights, dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """A layer's weights by their names in its module; experts stay in storage dtype, routers are float32."""
        layer = self._spec.blocks[index]
        named = {}
        for role, tensor in weights.others.items():
            described = layer.tensor(role)
            tensor = gates_first(tensor) if described.alternates else tensor
            named[described.in_layer] = tensor.to(device, torch.float32 if described.runs_in_float32 else dtype)
        if layer.routed is not None:
            name = "gate_up_proj" if layer.routed.glu.is_gated else "up_proj"
            named[f"{layer.routed.experts_module}.{name}"] = weights.gate_up_EFD.to(device)
            named[f"{layer.routed.experts_module}.down_proj"] = weights.down_EDF.to(device)
        return named

    def _config(self, spec: ModelSpec) -> Any:
        """transformers' configuration of a model with these sizes."""
        config = transformers_config(spec.family.edited(spec, self._settings))
        mixer, differs = spec.layers[0].mixer, getattr(config, "is_heterogeneous", False)
        if not differs and getattr(config, "head_dim", None) is None and isinstance(mixer, GroupedQuery):
            config.head_dim = mixer.head_dim  # some kinds of rotary embedding do not work it out themselves
        _keep_windows(config, spec)
        return config

    def _fitted(self, module: nn.Module, index: int, config: Any) -> nn.Module:
        """Returns the layer with its own sizes where layers differ; modules that it has lost add nothing."""
        spec, layer = self._spec, self._spec.blocks[index]
        if layer.routed is not None and layer.moe != MoeSize(spec.n_experts, spec.expert_width):
            alike = self._config(replace(spec, layers=tuple(_with_experts_of(layer, each) for each in spec.layers)))
            alike._attn_implementation = config._attn_implementation
            alike._experts_implementation = config._experts_implementation
            with torch.device("meta"):
                module = type(module)(alike, self._like[index])
        if isinstance(layer.mixer, Mamba2):
            rule = layer.tensor(Role.MIXER_INPUT).submodule.rpartition(".")[0]
            module.get_submodule(rule).time_step_limit = _NO_LIMIT  # type: ignore[assignment]
        if layer.routed is not None:
            module.get_submodule(layer.routed.router_module).register_forward_pre_hook(_in_float32)
            _lay_out(module.get_submodule(layer.routed.experts_module))
        _fit_shapes(module, layer)
        for lost in layer.lost_modules:
            module.set_submodule(lost.name, _Nothing(lost.n_outputs))
        return module.eval()

    def _mtp_layer(self, model: Any) -> nn.Module:
        """The layer that predicts one more token: like a decoder layer, with the modules of :data:`MTP_MODULES`."""
        index, size = self._spec.n_layers, self._spec.hidden_size
        like = self._like[index]
        with torch.device("meta"):
            module = type(model.model.layers[like])(model.config, like)
            module.add_module(MTP_MODULES[Role.MTP_PROJECTION], nn.Linear(2 * size, size, bias=False))
        for role in (Role.MTP_EMBEDDING_NORM, Role.MTP_STATE_NORM, Role.MTP_OUTPUT_NORM):
            module.add_module(MTP_MODULES[role], copy.deepcopy(self.final_norm))
        return self._fitted(module, index, model.config)


def _store_nothing_for_others(model: nn.Module) -> None:
    """Stops layers from handing on keys and values that no layer takes, as transformers 5.24 lets some of them do."""
    attentions = [module for module in model.modules() if hasattr(module, "store_full_length_kv")]
    if not any(module.is_kv_shared_layer for module in attentions):
        for module in attentions:
            module.store_full_length_kv = False  # type: ignore[assignment]


def _cache_argument(layer: nn.Module) -> str:
    """The name of a layer's argument for its cache: transformers 5.24 renamed it, and 5.40 drops the old name."""
    return "cache" if "cache" in inspect.signature(layer.forward).parameters else "past_key_values"


def _layer_like(mtp: LayerSpec, spec: ModelSpec) -> int:
    """The last decoder layer of the same kind as the layer that predicts one more token.

    Raises:
        UnsupportedError: the student has lost all of them.
    """
    kind = (mtp.mixer, mtp.routed is None)
    alike = [index for index, layer in enumerate(spec.layers) if (layer.mixer, layer.routed is None) == kind]
    if not alike:
        raise UnsupportedError(
            "no layer is left of the kind of the MTP layer: leave --keep-mtp out, or keep such layers"
        )
    return alike[-1]


def _keep_windows(config: Any, spec: ModelSpec) -> None:
    """Gives layers their windows back that a class takes away by itself, as Gemma 4's does with the last layer's."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        windows = (layer.mixer.window for layer in spec.layers)
        config.layer_types = [
            kind if window is None else _WINDOWED for kind, window in zip(kinds, windows, strict=True)
        ]


_WINDOWED = "sliding_attention"
_LAYER_TYPE = "layer_type"
"""The argument of rotary embeddings that differ from one kind of layers to another."""


def _rotary(model: nn.Module, config: Any) -> nn.Module | None:
    """The rotary embedding of all layers, whatever its name, on a device, because it computes; None: there is none."""
    found = (type(child) for child in model.children() if type(child).__name__.endswith("RotaryEmbedding"))
    kind = next(found, None)
    return None if kind is None else kind(config=config)


def _with_experts_of(layer: LayerSpec, other: LayerSpec) -> LayerSpec:
    """Returns the other layer with this one's experts, if it has some."""
    return other if other.routed is None else replace(other, feed_forward=layer.feed_forward)


class _Nothing(nn.Module):
    """Replaces a dropped part of a layer.

    A layer may ask a norm for the dtype of its weight, to compute in it: the narrowest widens nothing.
    """

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self._n_outputs = n_outputs
        self.weight = torch.empty(0, dtype=torch.bfloat16)

    def forward(self, hidden_BTD: torch.Tensor, *_others: object) -> torch.Tensor | tuple[torch.Tensor, ...]:
        nothing = torch.zeros_like(hidden_BTD)
        return nothing if self._n_outputs == 1 else (nothing,) * self._n_outputs


def _fit_shapes(module: nn.Module, layer: LayerSpec) -> None:
    """Gives tensors their own shapes where transformers' class has one setting for the sizes of several."""
    for tensor in (tensor for tensor in layer.shared_tensors if tensor.kind is not Kind.TABLE):
        owner, name = module.get_submodule(tensor.submodule), tensor.in_layer.rpartition(".")[2]
        shape = layer.dimensions(tensor)
        if tuple(getattr(owner, name).shape) != shape:
            owner.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))


def _lay_out(experts: nn.Module) -> None:
    """Gives the experts of every class the same shapes: output features come first."""
    if getattr(experts, "is_transposed", False):
        for name in ("gate_up_proj", "down_proj"):
            matrices = experts.get_parameter(name)
            experts.register_parameter(name, nn.Parameter(matrices.transpose(1, 2), requires_grad=False))


def _in_float32(_router: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].float(), *inputs[1:])
