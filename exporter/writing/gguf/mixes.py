"""llama.cpp's mixes: the named sets of types that ``llama-quantize`` writes, such as Q4_K_M.

A mix gives most matrices its base type, and some more or fewer bits, by their role, their layer and the model:
``llama_tensor_get_type_impl`` in ``src/llama-quant.cpp``, for the architectures of our families, as the tool decides
when it has an importance matrix. :func:`compressors.quantize.fallback_type` replaces types whose blocks do not divide
a row, as the tool does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.files.ggml_types import BLOCK_SIZES, GGMLQuantizationType

__all__ = ["ALIASES", "MIXES", "Mix", "file_type_of", "matrix_type", "mix_named"]

_T = GGMLQuantizationType


@dataclass(frozen=True)
class Mix:
    """One value of ``--quant``. Routers and norms are float32 in all of them."""

    name: str
    base: GGMLQuantizationType  # of every matrix that no rule names
    file_type: int  # enum llama_ftype in include/llama.h, the value of general.file_type


MIXES: Mapping[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix("F32", _T.F32, 0),
        Mix("BF16", _T.BF16, 32),
        Mix("F16", _T.F16, 1),
        Mix("Q8_0", _T.Q8_0, 7),
        Mix("Q6_K", _T.Q6_K, 18),
        Mix("Q5_1", _T.Q5_1, 9),
        Mix("Q5_K_M", _T.Q5_K, 17),
        Mix("Q5_K_S", _T.Q5_K, 16),
        Mix("Q5_0", _T.Q5_0, 8),
        Mix("Q4_1", _T.Q4_1, 3),
        Mix("Q4_K_M", _T.Q4_K, 15),
        Mix("Q4_K_S", _T.Q4_K, 14),
        Mix("IQ4_NL", _T.IQ4_NL, 25),
        Mix("Q4_0", _T.Q4_0, 2),
        Mix("IQ4_XS", _T.IQ4_XS, 30),
        Mix("MXFP4_MOE", _T.MXFP4, 38),
        Mix("Q3_K_L", _T.Q3_K, 13),
        Mix("Q3_K_M", _T.Q3_K, 12),
        Mix("IQ3_M", _T.IQ3_S, 27),
        Mix("IQ3_S", _T.IQ3_S, 26),
        Mix("Q3_K_S", _T.Q3_K, 11),
        Mix("IQ3_XS", _T.IQ3_S, 22),
        Mix("IQ3_XXS", _T.IQ3_XXS, 23),
        Mix("Q2_K", _T.Q2_K, 10),
        Mix("Q2_K_S", _T.Q2_K, 21),
        Mix("IQ2_M", _T.IQ2_S, 29),
        Mix("IQ2_S", _T.IQ2_XS, 28),
        Mix("IQ2_XS", _T.IQ2_XS, 20),
        Mix("Q2_0", _T.Q2_0, 41),
        Mix("IQ2_XXS", _T.IQ2_XXS, 19),
        Mix("TQ2_0", _T.TQ2_0, 37),
        Mix("IQ1_M", _T.IQ1_M, 31),
        Mix("TQ1_0", _T.TQ1_0, 36),
        Mix("IQ1_S", _T.IQ1_S, 24),
    )
}
"""By name, from the most bits of the base type to the fewest."""

ALIASES: Mapping[str, str] = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}
"""Other names that the tool knows."""


def mix_named(name: str) -> Mix:
    """The mix of this name or alias.

    Raises:
        InputError: there is none; the message lists them.
    """
    mix = MIXES.get(ALIASES.get(name, name))
    if mix is None:
        raise InputError(f"--quant {name}: no such type; choose one of {', '.join(MIXES)}")
    return mix


def matrix_type(mix: Mix, role: Role, layer: int | None, spec: ModelSpec) -> GGMLQuantizationType:
    """The type that a mix gives to a matrix; the length of its rows is not considered here.

    Args:
        mix: the mix.
        role: role of a matrix that is quantized: neither a router nor a norm.
        layer: its layer, None for embedding and head.
        spec: shape of the whole model.
    """
    if mix.base in (_T.F32, _T.F16, _T.BF16):
        return mix.base
    if role is Role.HEAD or (role is Role.TOKEN_EMBEDDING and spec.tied_embeddings):
        return _head(mix, spec)
    if mix.name == "MXFP4_MOE":
        return _T.MXFP4 if role.is_expert and spec.n_experts > 1 else _T.Q8_0
    if layer is None:
        return _EMBEDDINGS.get(mix.name, mix.base)
    return _RULES[role](mix, layer, spec)


_LOWEST = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
"""Mixes whose attention and first layers get types of more bits, by rules of their own."""

_IN_LOWEST: Mapping[str, GGMLQuantizationType] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), _T.Q2_K),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), _T.IQ3_S),
}
"""The types that those mixes give to some matrices that get more bits."""

_EMBEDDINGS: Mapping[str, GGMLQuantizationType] = {
    **_IN_LOWEST,
    "IQ3_XXS": _T.IQ3_S,
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), _T.Q4_K),
}
"""The type of an embedding that has a head beside it."""


def _head(mix: Mix, spec: ModelSpec) -> GGMLQuantizationType:
    """The type of the head, and of an embedding that is the head too."""
    if mix.name == "MXFP4_MOE" or mix.base is _T.Q8_0 or spec.hidden_size % BLOCK_SIZES[mix.base][0]:
        return _T.Q8_0
    return _T.Q5_K if mix.name in _LOWEST or mix.name == "IQ3_XXS" else _T.Q6_K


_VALUES: Mapping[str, GGMLQuantizationType] = {
    **_IN_LOWEST,
    "Q2_K": _T.Q3_K,
    "IQ3_M": _T.Q4_K,
    "Q3_K_M": _T.Q4_K,
    "Q3_K_L": _T.Q5_K,
}
_SHARED_VALUES: Mapping[str, GGMLQuantizationType] = {
    **dict.fromkeys(("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"), _T.Q4_K),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), _T.Q5_K),
}
"""Values that four query heads or more share are few, and get more bits."""


def _value(mix: Mix, layer: int, spec: ModelSpec) -> GGMLQuantizationType:
    are_shared = spec.n_heads // spec.n_kv_heads >= 4
    if mix.name in _LOWEST:
        return _T.Q4_K if are_shared or spec.n_experts >= 4 else _VALUES[mix.name]
    if spec.n_experts == 8:
        return _T.Q8_0
    chosen = _VALUES.get(mix.name, mix.base)
    if mix.name in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(layer, spec.n_layers):
        chosen = _T.Q6_K
    elif layer < {"Q3_K_M": 2, "Q4_K_S": 4}.get(mix.name, 0):
        chosen = _T.Q5_K
    elif are_shared:
        chosen = _SHARED_VALUES.get(mix.name, chosen)
    return _T.Q5_K if _is_llama_70b(spec) and chosen in (_T.Q3_K, _T.Q4_K) else chosen


def _is_llama_70b(spec: ModelSpec) -> bool:
    """True if llama.cpp takes the model for a Llama 70B (``load_arch_hparams`` in ``src/models/llama.cpp``)."""
    return spec.gguf_architecture == "llama" and spec.n_layers == 80 and spec.n_heads != spec.n_kv_heads


def _key(mix: Mix, layer: int, spec: ModelSpec) -> GGMLQuantizationType:
    if spec.n_experts == 8:
        return _T.Q4_K if mix.name in _LOWEST else _T.Q8_0
    return _query(mix, layer, spec)


def _query(mix: Mix, _layer: int, _spec: ModelSpec) -> GGMLQuantizationType:
    return {"IQ3_XS": _T.IQ3_XXS, "IQ3_XXS": _T.IQ2_S}.get(mix.name, mix.base)


_ATTENTION_OUTPUTS: Mapping[str, GGMLQuantizationType] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M"), _T.IQ2_XXS),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), _T.IQ3_S),
    "Q2_K": _T.Q3_K,
    **dict.fromkeys(("Q3_K_M", "IQ3_M"), _T.Q4_K),
    "Q3_K_L": _T.Q5_K,
}
_EIGHT_EXPERTS_OUTPUTS = _LOWEST | {"Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "Q3_K_S", "Q3_K_M"}
_EIGHT_EXPERTS_OUTPUTS |= {"IQ4_XS", "IQ4_NL", "Q4_K_S", "Q4_K_M"}
"""Mixes that give the attention output Q5_K in models with 8 experts."""


def _attention_output(mix: Mix, _layer: int, spec: ModelSpec) -> GGMLQuantizationType:
    if spec.n_experts == 8:
        return _T.Q5_K if mix.name in _EIGHT_EXPERTS_OUTPUTS else mix.base
    return _ATTENTION_OUTPUTS.get(mix.name, mix.base)


_DOWN: Mapping[str, GGMLQuantizationType] = {"Q2_K": _T.Q3_K, "Q3_K_M": _T.Q4_K, "Q3_K_L": _T.Q5_K}
_FIRST_DOWN: Mapping[str, GGMLQuantizationType] = {
    **_IN_LOWEST,
    **dict.fromkeys(("Q2_K_S", "IQ3_M"), _T.Q4_K),
    "Q4_K_S": _T.Q5_K,
    "Q4_0": _T.Q4_1,
    "Q5_0": _T.Q5_1,
}
"""The types of down projections in the first eighth of the layers."""


def _down(mix: Mix, layer: int, spec: ModelSpec) -> GGMLQuantizationType:
    n_layers = spec.n_layers
    if layer < n_layers // 8 and mix.name in _FIRST_DOWN:
        return _FIRST_DOWN[mix.name]
    if mix.name == "Q3_K_M" and layer < n_layers // 16:
        return _T.Q5_K
    if _gets_more_bits(layer, n_layers):
        if mix.name in ("Q4_K_M", "Q5_K_M"):
            return _T.Q6_K
        if mix.name == "IQ3_M" and spec.n_experts == 8:
            return _T.Q4_K
    return _DOWN.get(mix.name, mix.base)


def _gate_or_up(mix: Mix, layer: int, spec: ModelSpec) -> GGMLQuantizationType:
    is_in_the_middle = spec.n_layers // 8 <= layer < 7 * spec.n_layers // 8
    return _T.IQ3_XXS if mix.name == "IQ3_XS" and is_in_the_middle else mix.base


def _gets_more_bits(layer: int, n_layers: int) -> bool:
    """True for layers in the first and last eighth, and for every third layer between them."""
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


_RULES: Mapping[Role, Callable[[Mix, int, ModelSpec], GGMLQuantizationType]] = {
    Role.QUERY: _query,
    Role.KEY: _key,
    Role.VALUE: _value,
    Role.ATTENTION_OUTPUT: _attention_output,
    Role.EXPERT_GATE: _gate_or_up,
    Role.EXPERT_UP: _gate_or_up,
    Role.EXPERT_DOWN: _down,
}

_NAMED_AFTER: Mapping[GGMLQuantizationType, str] = {
    _T.Q3_K: "Q3_K_M",
    _T.Q4_K: "Q4_K_M",
    _T.Q5_K: "Q5_K_M",
    _T.MXFP4: "MXFP4_MOE",
}


def file_type_of(ggml_type: GGMLQuantizationType) -> int:
    """The file type that llama.cpp gives to a file that names no mix and is mostly of this type.

    See ``llama_model_loader`` in ``src/llama-model-loader.cpp``, which has no name for a file of MXFP4.
    """
    return MIXES[_NAMED_AFTER.get(ggml_type, ggml_type.name)].file_type
