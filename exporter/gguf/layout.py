"""The tensors of a GGUF file, with their names, types and sizes. No weight is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from gguf.constants import LlamaFileType

from compressors.model.checkpoint import role_shape
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families import Role
from compressors.model.gguf_rope import GgufRope, gguf_rope
from compressors.model.shape import MoeShape
from compressors.quantize import GGMLQuantizationType, fallback_type, row_bytes

__all__ = ["PRESETS", "GgufTensor", "Preset", "check_uniform", "plan_tensors", "preset_named", "rope_settings"]

_MAX_EXPERTS, _MAX_LAYERS = 1024, 512  # LLAMA_MAX_EXPERTS and LLAMA_MAX_LAYERS in src/llama-hparams.h


@dataclass(frozen=True)
class Preset:
    """One value of ``--quant``: the type of each kind of matrix. Routers and norms are float32 in all of them."""

    name: str
    matrices: GGMLQuantizationType  # experts and attention
    embeddings: GGMLQuantizationType  # token embedding and head
    file_type: LlamaFileType  # what llama.cpp calls the mixture


_T = GGMLQuantizationType

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("F32", _T.F32, _T.F32, LlamaFileType.ALL_F32),
        Preset("BF16", _T.BF16, _T.BF16, LlamaFileType.MOSTLY_BF16),
        Preset("Q8_0", _T.Q8_0, _T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        Preset("Q6_K", _T.Q6_K, _T.Q6_K, LlamaFileType.MOSTLY_Q6_K),
        Preset("Q5_1", _T.Q5_1, _T.Q8_0, LlamaFileType.MOSTLY_Q5_1),
        Preset("Q5_K", _T.Q5_K, _T.Q6_K, LlamaFileType.MOSTLY_Q5_K_S),
        Preset("Q5_0", _T.Q5_0, _T.Q8_0, LlamaFileType.MOSTLY_Q5_0),
        Preset("Q4_K", _T.Q4_K, _T.Q6_K, LlamaFileType.MOSTLY_Q4_K_S),
        Preset("Q4_0", _T.Q4_0, _T.Q8_0, LlamaFileType.MOSTLY_Q4_0),
    )
}
"""By name, from the most bits of an expert's weight to the fewest; between equals the better quantizer first."""

_EMBEDDING_ROLES = frozenset({Role.TOKEN_EMBEDDING, Role.HEAD})
_FLOAT32_ROLES = frozenset(
    {Role.FINAL_NORM, Role.ATTENTION_NORM, Role.MOE_NORM, Role.QUERY_NORM, Role.KEY_NORM, Role.ROUTER}
)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file; all experts of a layer are one tensor [E, F, D] or [E, D, F], one without E if dense."""

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]  # torch's order
    ggml_type: GGMLQuantizationType
    values: tuple[float, ...] | None = None  # of a tensor that is made from config.json; None: it has its role's

    @property
    def row_length(self) -> int:
        """Values of one row, the unit of quantization."""
        return self.shape[-1]

    @property
    def n_bytes(self) -> int:
        """Size of the data in bytes, padding left out."""
        return prod(self.shape[:-1]) * row_bytes(self.ggml_type, self.row_length)


def preset_named(name: str) -> Preset:
    """The row of :data:`PRESETS`.

    Raises:
        InputError: there is none of this name; the message lists them.
    """
    if name not in PRESETS:
        raise InputError(f"--quant {name}: no such type; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def rope_settings(shape: MoeShape) -> GgufRope:
    """Returns the file's keys and tensors for the rotary embedding, except its base and width.

    Raises:
        UnsupportedError: llama.cpp would compute other angles whatever the file says.
    """
    return gguf_rope(shape.rope, shape.gguf_architecture, takes_factors=shape.family.gguf.takes_rope_factors)


def plan_tensors(shape: MoeShape, preset: str) -> tuple[GgufTensor, ...]:
    """Every tensor of the file, in the file's order.

    Raises:
        InputError: there is no such preset.
        UnsupportedError: llama.cpp cannot represent a model of this shape, or a row does not fit the type.
    """
    types = preset_named(preset)
    _check_representable(shape)
    tensors = [_tensor(role, None, shape, types) for role in shape.stored_roles if role.is_global]
    for name, values in rope_settings(shape).factors.items():
        tensors.append(GgufTensor(name, Role.ROPE_FACTORS, None, (len(values),), _T.F32, values))
    for layer in range(shape.n_layers):
        tensors += [_tensor(role, layer, shape, types) for role in shape.stored_roles if not role.is_global]
    return tuple(tensors)


def _tensor(role: Role, layer: int | None, shape: MoeShape, types: Preset) -> GgufTensor:
    dimensions = role_shape(role, shape)
    if role.is_expert and not shape.is_dense:
        dimensions = (shape.n_experts, *dimensions)
    if role in _FLOAT32_ROLES:
        ggml_type = GGMLQuantizationType.F32
    else:
        wanted = types.embeddings if role in _EMBEDDING_ROLES else types.matrices
        ggml_type = fallback_type(wanted, dimensions[-1])
    return GgufTensor(shape.gguf_name(role, layer), role, layer, dimensions, ggml_type)


def check_uniform(shape: MoeShape) -> None:
    """Refuses layers that differ.

    Raises:
        UnsupportedError: they do.
    """
    if shape.sizes is not None or not shape.has_moe:
        raise UnsupportedError(
            f"llama.cpp's {shape.gguf_architecture} graph has one number of experts and one expert width for all "
            f"layers; these layers have {shape.described_sizes}: they cannot be written as GGUF; give all layers the "
            "same, or use --formats onnx"
        )


def _check_representable(shape: MoeShape) -> None:
    gguf = shape.family.gguf
    check_uniform(shape)
    if not shape.is_dense and shape.normalize_top_k != gguf.normalizes_top_k:
        raise UnsupportedError(
            f"llama.cpp's {gguf.architecture} graph {'always' if gguf.normalizes_top_k else 'never'} normalises the "
            f"weights of the chosen experts, but this model has normalize_top_k = {shape.normalize_top_k}: "
            "it cannot be written as GGUF; use --formats onnx"
        )
    attention_widths = {shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim}
    if gguf.needs_square_attention and attention_widths != {shape.hidden_size}:
        raise UnsupportedError(
            f"llama.cpp's {gguf.architecture} graph needs queries and keys as wide as the hidden size; this model has "
            f"{shape.n_heads} heads and {shape.n_kv_heads} key-value heads of {shape.head_dim} at hidden size "
            f"{shape.hidden_size}: it cannot be written as GGUF; use --formats onnx"
        )
    if gguf.needs_untied_head and shape.tied_embeddings:
        raise UnsupportedError(
            f"llama.cpp's {gguf.architecture} graph needs a head of its own, but this model's is tied to the "
            "embedding: it cannot be written as GGUF; use --formats onnx"
        )
    if shape.n_experts > _MAX_EXPERTS or shape.n_layers > _MAX_LAYERS:
        raise UnsupportedError(
            f"llama.cpp loads at most {_MAX_EXPERTS} experts and {_MAX_LAYERS} layers; this model has "
            f"{shape.n_experts} and {shape.n_layers}: use --formats onnx"
        )
