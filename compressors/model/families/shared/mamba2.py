"""Parts that families with Mamba-2 layers share: how the mixer is read, its tensors, and its keys in GGUF."""

from __future__ import annotations

import math

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.description.family import GgufValue
from compressors.model.description.mixers import Mamba2
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import GgufTensor, Kind, TensorSpec
from compressors.model.description.transforms import Chain, NegativeExponential, Reshaped, Squeezed
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families.shared import parts
from compressors.model.names import shown

__all__ = ["from_keys", "gguf_keys", "head_counts", "limits", "mixer", "refuse_limits_of_steps", "tensors"]

_GGUF = "blk.{layer}.ssm_"
_OF_HEADS = ("N", "1")
_NO_LIMIT = (math.inf, {"__float__": "Infinity"})
"""A limit that there is not, on the hub and as transformers 5 writes it."""


def mixer(
    settings: FamilySettings, *, heads: str, groups: str, head_dim: int, state: str, kernel: str, head_dim_key: str
) -> Mamba2:
    """Reads the mixer.

    Args:
        settings: the family's settings.
        heads: the key of the number of heads.
        groups: the key of the number of groups.
        head_dim: values of a head.
        state: the key of the values of a key.
        kernel: the key of the tokens that the convolution covers.
        head_dim_key: the key of the values of a head, for messages.

    Raises:
        InputError: transformers could not run a model with these numbers.
    """
    n_heads, n_groups = settings.count(heads), settings.count(groups)
    if n_heads % n_groups:
        raise InputError(
            f"{settings.settings.path}: {heads} is {n_heads}, which {groups} {n_groups} does not divide; transformers "
            "cannot run such a model either"
        )
    settings.settings.note(head_dim_key, head_dim)
    return Mamba2(
        n_heads=n_heads,
        n_groups=n_groups,
        head_dim=head_dim,
        key_dim=settings.count(state),
        kernel=settings.count(kernel),
    )


def refuse_limits_of_steps(settings: FamilySettings, key: str = "time_step_limit") -> None:
    """Refuses limits of the heads' steps, which no model has that was published, and llama.cpp does not know.

    Raises:
        UnsupportedError: there is one.
    """
    settings.ignore(key)
    limits = settings.settings.get(key, [0.0, math.inf])
    is_known = isinstance(limits, (list, tuple)) and len(limits) == 2
    if not is_known or limits[0] != 0 or limits[1] not in _NO_LIMIT:
        raise UnsupportedError(
            f"{settings.settings.named(key)} is {shown(limits)}; {settings.family.model_type} is supported only with "
            "[0.0, Infinity], that is without limits of the steps of Mamba-2's heads"
        )


def tensors(module: str, *, has_bias: bool) -> tuple[TensorSpec, ...]:
    """The tensors of the mixer.

    Args:
        module: the beginning of their names on the hub.
        has_bias: the convolution has a bias.
    """
    convolution = GgufTensor(f"{_GGUF}conv1d.weight", Squeezed())
    decay = GgufTensor(f"{_GGUF}a", Chain((NegativeExponential(), Reshaped(_OF_HEADS))))
    skip, norm = GgufTensor(f"{_GGUF}d", Reshaped(_OF_HEADS)), GgufTensor(f"{_GGUF}norm.weight", Reshaped(("G", "g")))
    bias = TensorSpec(
        Role.CONVOLUTION_BIAS, f"{module}conv1d.bias", ("X",), GgufTensor(f"{_GGUF}conv1d.bias"), Kind.VECTOR
    )
    return (
        TensorSpec(Role.MIXER_INPUT, f"{module}in_proj.weight", ("M", "D"), GgufTensor(f"{_GGUF}in.weight")),
        TensorSpec(Role.CONVOLUTION, f"{module}conv1d.weight", ("X", "1", "W"), convolution, Kind.CONVOLUTION),
        *((bias,) if has_bias else ()),
        TensorSpec(Role.DECAY_LOGARITHM, f"{module}A_log", ("N",), decay, Kind.VECTOR),
        TensorSpec(Role.DECAY_BIAS, f"{module}dt_bias", ("N",), GgufTensor(f"{_GGUF}dt.bias"), Kind.VECTOR),
        TensorSpec(Role.MIXER_SKIP, f"{module}D", ("N",), skip, Kind.VECTOR),
        TensorSpec(Role.MIXER_NORM, f"{module}norm.weight", ("Y",), norm, Kind.NORM),
        TensorSpec(Role.MIXER_OUTPUT, f"{module}out_proj.weight", ("D", "Y"), GgufTensor(f"{_GGUF}out.weight")),
    )


def gguf_keys(spec: ModelSpec) -> dict[str, GgufValue]:
    """The keys of the mixer."""
    found = _mixer(spec)
    assert found is not None, "a model without such layers is refused"
    return {
        "ssm.conv_kernel": found.kernel,
        "ssm.state_size": found.key_dim,
        "ssm.group_count": found.n_groups,
        "ssm.inner_size": found.width,
        "ssm.time_step_rank": found.n_heads,
    }


def from_keys(keys: GgufKeys, *, heads: str, groups: str, head_dim: str, state: str, kernel: str) -> dict[str, int]:
    """The settings of the mixer, made of a file's keys: the inverse of :func:`gguf_keys`.

    The arguments are the names of the settings, as for :func:`mixer`.
    """
    n_heads = keys.count("ssm.time_step_rank")
    return {
        heads: n_heads,
        groups: keys.count("ssm.group_count"),
        head_dim: keys.count("ssm.inner_size") // max(1, n_heads),
        state: keys.count("ssm.state_size"),
        kernel: keys.count("ssm.conv_kernel"),
    }


def head_counts(spec: ModelSpec) -> tuple[int, ...]:
    """Key-value heads by layer, by which llama.cpp knows the layers that attend: the others have none."""
    n_kv_heads = parts.grouped_query(spec).n_kv_heads
    return tuple(n_kv_heads if layer.mixer.cached_values else 0 for layer in spec.layers)


def limits(spec: ModelSpec) -> str | None:
    """Says which part of a model llama.cpp's graph of such a layer cannot compute; None: none."""
    found = _mixer(spec)
    if found is None:
        return "graph needs a layer of Mamba-2, and this model has none"
    if not any(layer.mixer.cached_values for layer in spec.layers):
        return "graph needs a layer that attends, and this model has none"
    if found.kernel == 1:  # llama.cpp drops all axes of size 1
        return "graph needs a convolution over two tokens or more, and that of this model covers one"
    layer = next(layer for layer in spec.layers if layer.mixer == found)
    if Role.CONVOLUTION_BIAS not in layer.roles:
        return "graph adds a bias behind Mamba-2's convolution, and this model has none"
    return None


def _mixer(spec: ModelSpec) -> Mamba2 | None:
    return next((layer.mixer for layer in spec.layers if isinstance(layer.mixer, Mamba2)), None)
