"""llama.cpp's mixes: the named sets of types that ``llama-quantize`` writes, such as Q4_K_M.

A mix gives most matrices its base type, and some more or fewer bits, by their name in the file, their layer and the
model: ``llama_tensor_get_type_impl`` in ``src/llama-quant.cpp``, as the tool decides when it has an importance matrix.
:func:`compressors.quantize.fallback_type` replaces types whose blocks do not divide a row, as the tool does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from compressors.model.description.family import GgufValue
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType
from compressors.quantize import fallback_type

__all__ = ["ALIASES", "MIXES", "Mix", "MixedModel", "file_type_of", "is_quantized", "mix_named", "mixed_types"]

_T = GGMLQuantizationType


@dataclass(frozen=True)
class Mix:
    """One value of ``--quant``. Routers and norms are float32 in all of them."""

    name: str
    base: GGMLQuantizationType  # the type of every matrix that no rule names
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
"""The mixes by name, from the most bits of the base type to the fewest."""

ALIASES: Mapping[str, str] = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}
"""Other names that the tool knows."""


def mix_named(name: str) -> Mix:
    """The mix of this name or alias.

    Raises:
        InputError: there is none; the message lists the known ones.
    """
    mix = MIXES.get(ALIASES.get(name, name))
    if mix is None:
        raise InputError(f"--quant {name}: no such type; choose one of {', '.join(MIXES)}")
    return mix


@dataclass(frozen=True)
class MixedModel:
    """The numbers of a model that mixes depend on, as llama.cpp reads them from a file's metadata."""

    architecture: str
    n_layers: int
    n_experts: int
    n_heads: int  # in the first layer
    n_kv_heads: int  # in the first layer; 0 if it has no attention

    @classmethod
    def of(cls, spec: ModelSpec) -> MixedModel:
        """The numbers of the file that a model is written as."""
        gguf = spec.written.family.gguf
        keys = gguf.keys(spec.written)
        n_heads = _first(keys.get(_HEADS, 0))
        n_kv_heads = _first(keys.get(f"{_HEADS}_kv", n_heads))
        n_experts = _first(keys.get("expert_count", 0))
        return cls(gguf.architecture, len(spec.blocks), n_experts, n_heads, n_kv_heads)

    @property
    def shares_values(self) -> bool:
        """True if four query heads or more share each value head: values are few then, and get more bits."""
        return self.n_kv_heads > 0 and self.n_heads // self.n_kv_heads >= 4

    @property
    def is_llama_70b(self) -> bool:
        """True if llama.cpp takes the model for a Llama 70B (``load_arch_hparams`` in ``src/models/llama.cpp``)."""
        return self.architecture == "llama" and self.n_layers == 80 and self.n_heads != self.n_kv_heads


_HEADS = "attention.head_count"


def _first(value: GgufValue) -> int:
    return int(value[0] if isinstance(value, tuple) else value)


class _Category(Enum):
    """The matrices that the rules tell apart; the value is what names in files contain, tried in this order."""

    FUSED_ATTENTION = "attn_qkv.weight"
    KEYS_AND_VALUES = "attn_kv_b.weight"
    VALUE = "attn_v.weight"
    KEY = "attn_k.weight"
    QUERY = "attn_q.weight"
    ATTENTION_OUTPUT = "attn_output.weight"
    UP = "ffn_up"  # for experts, a shared expert and a dense feed-forward alike
    GATE = "ffn_gate"
    DOWN = "ffn_down"
    OTHER = ""


@dataclass(frozen=True)
class _Matrix:
    """A matrix as the rules see it."""

    shape: tuple[int, ...]
    layer: int
    number: int  # how many of the matrices that are counted together are in earlier layers
    n_counted: int  # the number of those matrices


_NEVER_QUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "per_layer_model_proj",
)


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """True if the tool quantizes a tensor of this name (``tensor_allows_quantization``)."""
    n_dimensions = len(shape) - next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    is_named_so = name.endswith("weight") and not any(part in name for part in _NEVER_QUANTIZED)
    return n_dimensions >= 2 and is_named_so


def mixed_types(
    mix: Mix, shapes: Mapping[str, tuple[int, ...]], model: MixedModel
) -> Mapping[str, GGMLQuantizationType]:
    """The type that a mix gives to each tensor of a file.

    Args:
        mix: the mix.
        shapes: the shapes of all tensors of the file by name, in torch's order.
        model: the numbers of the model.
    """
    matrices = {name: shape for name, shape in shapes.items() if is_quantized(name, shape)}
    if mix.base in (_T.F32, _T.F16, _T.BF16):
        return {name: mix.base if name in matrices else _T.F32 for name in shapes}
    is_tied = _HEAD not in shapes
    types = dict.fromkeys(shapes, _T.F32)
    for name, category, matrix in _counted(matrices):
        is_head = name == _HEAD or (is_tied and name == _EMBEDDING)
        chosen = _head(mix, matrix) if is_head else _matrix_type(mix, name, category, matrix, model)
        types[name] = fallback_type(chosen, matrix.shape[-1])
    return types


def _counted(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, _Category, _Matrix]]:
    """The matrices in the order in which the tool counts them: by layer, then by name."""
    categories = {name: _category(name) for name in shapes}
    totals = Counter(map(_counted_as, categories.values()))
    counts: Counter[_Category] = Counter()
    for name in sorted(shapes, key=lambda name: (_layer(name), name)):
        counted_as = _counted_as(categories[name])
        matrix = _Matrix(shapes[name], _layer(name), counts[counted_as], totals[counted_as])
        yield name, categories[name], matrix
        counts[counted_as] += 1


def _category(name: str) -> _Category:
    return next(category for category in _Category if category.value in name)


def _counted_as(category: _Category) -> _Category:
    return _Category.VALUE if category in _LIKE_VALUES else category


_LIKE_VALUES = (_Category.FUSED_ATTENTION, _Category.KEYS_AND_VALUES)
"""Matrices that hold values, and are treated as such."""

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def _layer(name: str) -> int:
    """The layer of a tensor; -1 outside of the layers."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _matrix_type(mix: Mix, name: str, category: _Category, matrix: _Matrix, model: MixedModel) -> GGMLQuantizationType:
    """The type of a matrix that is not the head."""
    if mix.name == "MXFP4_MOE":
        return _T.MXFP4 if len(matrix.shape) > 2 and matrix.shape[-3] > 1 else _T.Q8_0
    if name == _EMBEDDING:
        return _EMBEDDINGS.get(mix.name, mix.base)
    rule = _RULES.get(_counted_as(category))
    return mix.base if rule is None else rule(mix, matrix, model)


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
"""The type of an embedding that is not the head too."""


def _head(mix: Mix, matrix: _Matrix) -> GGMLQuantizationType:
    """The type of the head, and of an embedding that is the head too."""
    if mix.name == "MXFP4_MOE" or mix.base is _T.Q8_0 or matrix.shape[-1] % BLOCK_SIZES[mix.base][0]:
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


def _value(mix: Mix, matrix: _Matrix, model: MixedModel) -> GGMLQuantizationType:
    if mix.name in _LOWEST:
        return _T.Q4_K if model.shares_values or model.n_experts >= 4 else _VALUES[mix.name]
    if model.n_experts == 8:
        return _T.Q8_0
    chosen = _VALUES.get(mix.name, mix.base)
    if mix.name in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(matrix.number, matrix.n_counted):
        chosen = _T.Q6_K
    elif matrix.number < {"Q3_K_M": 2, "Q4_K_S": 4}.get(mix.name, 0):
        chosen = _T.Q5_K
    elif model.shares_values:
        chosen = _SHARED_VALUES.get(mix.name, chosen)
    return _T.Q5_K if model.is_llama_70b and chosen in (_T.Q3_K, _T.Q4_K) else chosen


def _key(mix: Mix, matrix: _Matrix, model: MixedModel) -> GGMLQuantizationType:
    if model.n_experts == 8:
        return _T.Q4_K if mix.name in _LOWEST else _T.Q8_0
    return _query(mix, matrix, model)


def _query(mix: Mix, _matrix: _Matrix, _model: MixedModel) -> GGMLQuantizationType:
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


def _attention_output(mix: Mix, _matrix: _Matrix, model: MixedModel) -> GGMLQuantizationType:
    if model.n_experts == 8:
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


def _down(mix: Mix, matrix: _Matrix, model: MixedModel) -> GGMLQuantizationType:
    place, n_layers = _place(mix, matrix, model), model.n_layers
    if place < n_layers // 8 and mix.name in _FIRST_DOWN:
        return _FIRST_DOWN[mix.name]
    if mix.name == "Q3_K_M" and place < n_layers // 16:
        return _T.Q5_K
    if _gets_more_bits(place, n_layers):
        if mix.name in ("Q4_K_M", "Q5_K_M"):
            return _T.Q6_K
        if mix.name == "IQ3_M" and model.n_experts == 8:
            return _T.Q4_K
    return _DOWN.get(mix.name, mix.base)


def _gate_or_up(mix: Mix, matrix: _Matrix, model: MixedModel) -> GGMLQuantizationType:
    place, n_layers = _place(mix, matrix, model), model.n_layers
    is_in_the_middle = n_layers // 8 <= place < 7 * n_layers // 8
    return _T.IQ3_XXS if mix.name == "IQ3_XS" and is_in_the_middle else mix.base


def _place(mix: Mix, matrix: _Matrix, model: MixedModel) -> int:
    """The number that the tool takes for the layer of a feed-forward's matrix.

    If there is one expert, and in the lowest mixes, the tool does not read the name but counts matrices, including a
    shared expert's.
    """
    return matrix.layer if model.n_experts > 1 and mix.name not in _LOWEST else matrix.number


def _gets_more_bits(layer: int, n_layers: int) -> bool:
    """True for layers in the first and last eighth, and for every third layer between them."""
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


_RULES: Mapping[_Category, Callable[[Mix, _Matrix, MixedModel], GGMLQuantizationType]] = {
    _Category.VALUE: _value,
    _Category.KEY: _key,
    _Category.QUERY: _query,
    _Category.ATTENTION_OUTPUT: _attention_output,
    _Category.UP: _gate_or_up,
    _Category.GATE: _gate_or_up,
    _Category.DOWN: _down,
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
