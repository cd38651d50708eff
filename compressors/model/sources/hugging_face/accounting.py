"""Accounts for every tensor of a checkpoint: it is a part of the model, skipped by a rule, or refused.

A tensor that nothing claims takes part in a computation that the description does not know: a shared expert, a bias.
Without it the model would be another one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from compressors.model.description.family import SkippedPart
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.hugging_face.float8 import scales_of
from compressors.model.sources.hugging_face.misfits import CLASSIFIER_HEAD

__all__ = ["is_scale_of_activations", "parts_read_past", "unclaimed"]

_IN_ANY_FAMILY = (
    SkippedPart(r"(.*\.)?rotary_emb\.inv_freq", "tables of the rotary embedding, which are computed"),
    SkippedPart(rf"(model\.)?{CLASSIFIER_HEAD}", "heads for other tasks than text"),
)
_OF_ACTIVATIONS = SkippedPart(
    r".*[._](act|activation|input|output|kv|[qkv])_scale", "scales with which activations and the cache become float8"
)
"""They are there beside float8 weights; a model that was not quantized may have other tensors of these names."""


def unclaimed(names: Collection[str], claimed: Collection[str], spec: ModelSpec, *, is_float8: bool) -> Iterator[str]:
    """Yields the names that neither the model nor a rule claims, in their order.

    Args:
        names: the names of a checkpoint's tensors.
        claimed: the names of the model's tensors.
        spec: the model.
        is_float8: True if weights are stored in float8.
    """
    of_model = {*claimed, spec.tensor(Role.HEAD).name}  # a head may stand beside a tied embedding
    others = [name for name in names if name not in of_model]
    of_scales = {scales_of(name, names) for name in of_model} if others else set()
    for name in others:
        if name not in of_scales and _rule(name, spec, is_float8) is None:
            yield name


def parts_read_past(
    names: Iterable[str], claimed: Collection[str], spec: ModelSpec, *, is_float8: bool
) -> dict[str, int]:
    """The parts of a checkpoint that are read past, in words and in the order of the rules: the tensors of each."""
    rules = (_rule(name, spec, is_float8) for name in names if name not in claimed)
    found = Counter(rule.name for rule in rules if rule is not None)
    return {rule.name: found[rule.name] for rule in _rules(spec, is_float8) if rule.name in found}


def is_scale_of_activations(name: str) -> bool:
    """True if a tensor of a checkpoint in float8 is a scale with which activations are quantized."""
    return re.fullmatch(_OF_ACTIVATIONS.pattern, name) is not None


def _rules(spec: ModelSpec, is_float8: bool) -> tuple[SkippedPart, ...]:
    return (*spec.family.skipped, *_IN_ANY_FAMILY, *((_OF_ACTIVATIONS,) if is_float8 else ()))


def _rule(name: str, spec: ModelSpec, is_float8: bool) -> SkippedPart | None:
    """The first rule that skips a tensor; None if there is none."""
    return next((rule for rule in _rules(spec, is_float8) if rule.takes(name, spec.n_layers)), None)
