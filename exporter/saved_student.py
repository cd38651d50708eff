"""Loads a saved student as a module of transformers; experts on shared bases are put together first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressors.model.config.reading import read_spec
from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import Kind, TensorSpec
from compressors.model.errors import InputError
from compressors.model.files.weight_file import StoredTensors
from compressors.model.sources.adapters import adapter_names, factors_of
from exporter.file_names import SHARED_BASES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load"]


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, in the dtype of its ``config.json``.

    Raises:
        InputError: a file is missing or damaged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: there is no config.json; give the folder of a saved student")
    if not (folder / SHARED_BASES).exists():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        return model
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    state = _put_together(folder)
    made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    loaded: PreTrainedModel = made.from_pretrained(None, config=config, state_dict=state, dtype=config.dtype)
    return loaded


def _put_together(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder by the names of checkpoints, each replaced expert as its base plus its adapter."""
    spec, tensors = read_spec(folder), _stored(folder)
    try:
        layers = json.loads((folder / SHARED_BASES).read_text(encoding="utf-8"))["layers"]
        for index, (layer, data) in enumerate(zip(spec.layers, layers, strict=True)):
            if data is not None:
                shared = SharedBases.from_json(data)
                shared.check_against(layer.n_experts)
                _put_together_layer(spec, index, shared, tensors)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: {SHARED_BASES} does not fit the tensors beside it ({error}); save it again"
        ) from None
    return tensors


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: there is no safetensors file; give the folder of a saved student")
    return {name: tensor for file in files for name, tensor in StoredTensors(file).items()}


def _put_together_layer(spec: ModelSpec, index: int, shared: SharedBases, tensors: dict[str, torch.Tensor]) -> None:
    """Replaces a layer's bases and adapters by the experts that they stand for."""
    layer = spec.layers[index]
    assert layer.routed is not None, "bases stand under experts"
    for roles in (layer.routed.input_roles, (Role.EXPERT_DOWN,)):
        for expert in shared.replaced:
            first = _name(layer, roles[0], index, expert)
            a_PRI, b_POR = factors_of(tensors, first)
            base = shared.base_of[expert]
            for role, product_OI in zip(roles, b_POR @ a_PRI, strict=True):
                below = 0.0 if base == SharedBases.ZERO else tensors[_name(layer, role, index, f"bases.{base}")].float()
                tensors[_name(layer, role, index, expert)] = (below + product_OI).to(_dtype(tensors, spec))
            for name in adapter_names(first):
                del tensors[name]
        for base in range(shared.n_bases):
            for role in roles:
                del tensors[_name(layer, role, index, f"bases.{base}")]
    _fuse(layer, index, tensors)


def _fuse(layer: LayerSpec, index: int, tensors: dict[str, torch.Tensor]) -> None:
    """Puts all experts into one tensor in families whose checkpoints have no other form."""
    for name, parts in _fused(layer, index):
        stacked = []
        for expert in range(layer.n_experts):
            rows, columns = layer.dimensions(parts[0])
            fused = parts[0].fused
            assert fused is not None
            values = torch.empty(fused.of_expert(rows, columns), dtype=torch.float32)
            for part in parts:
                matrix = tensors.pop(_name(layer, part.role, index, expert))
                assert part.fused is not None
                part.fused.matrix(values).copy_(matrix)
            stacked.append(values.to(matrix.dtype))
        tensors[name] = torch.stack(stacked)


def _fused(layer: LayerSpec, index: int) -> Iterator[tuple[str, Sequence[TensorSpec]]]:
    by_name: dict[str, list[TensorSpec]] = {}
    for tensor in layer.expert_tensors:
        if tensor.kind is Kind.MATRIX and tensor.fused is not None and tensor.fused.is_only_form:
            by_name.setdefault(tensor.fused.name.format(layer=index), []).append(tensor)
    yield from by_name.items()


def _name(layer: LayerSpec, role: Role, index: int, expert: int | str) -> str:
    return layer.tensor(role).name.format(layer=index, expert=expert)


def _dtype(tensors: Mapping[str, torch.Tensor], spec: ModelSpec) -> torch.dtype:
    """The dtype of the experts: that of the embedding."""
    return tensors[spec.tensor(Role.TOKEN_EMBEDDING).name].dtype
