"""Accounts for every tensor of a checkpoint: it is a part of the model, skipped by a rule, or refused.

A tensor that nothing claims takes part in a computation that the description does not know: a shared expert, a bias.
Without it the model would be another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from compressors.model.description.family import SkippedPart
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.hugging_face.block_scaled import BlockScaled
from compressors.model.sources.hugging_face.misfits import CLASSIFIER_HEAD

__all__ = ["parts_read_past", "unclaimed"]

_IN_ANY_FAMILY = (
    SkippedPart(r"(.*\.)?rotary_emb\.inv_freq", "tables of the rotary embedding, which are computed"),
    SkippedPart(rf"(model\.)?{CLASSIFIER_HEAD}", "heads for other tasks than text"),
)


def unclaimed(names: Iterable[str], claimed: Collection[str], spec: ModelSpec) -> Iterator[str]:
    """Yields the names that neither the model nor a rule claims, in their order.

    Args:
        names: the names of a checkpoint's tensors.
        claimed: the names of the model's tensors.
        spec: the model.
    """
    of_model = {*claimed, spec.tensor(Role.HEAD).name}  # a head may stand beside a tied embedding
    with_scales = {*of_model, *map(BlockScaled.scales_of, of_model)}
    for name in names:
        if name not in with_scales and _rule(name, spec) is None:
            yield name


def parts_read_past(names: Iterable[str], claimed: Collection[str], spec: ModelSpec) -> dict[str, int]:
    """The parts of a checkpoint that are read past, in words and in the order of the rules: the tensors of each."""
    found = Counter(rule.name for name in names if name not in claimed and (rule := _rule(name, spec)) is not None)
    return {rule.name: found[rule.name] for rule in _rules(spec) if rule.name in found}


def _rules(spec: ModelSpec) -> tuple[SkippedPart, ...]:
    return (*spec.family.skipped, *_IN_ANY_FAMILY)


def _rule(name: str, spec: ModelSpec) -> SkippedPart | None:
    """The first rule that skips a tensor; None if there is none."""
    return next((rule for rule in _rules(spec) if rule.takes(name, spec.n_layers)), None)
