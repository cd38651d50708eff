"""Predicts, before a weight is read, whether a structure fits, and its approximate divergence from the original.

Sensitivities and losses that ship with the package stand in for those of the model; the search measures both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressors.model.errors import UnsupportedError
from compressors.model.files.storage_type import StorageType
from compressors.model.sources.source import Source
from compressors.sensitivity import TypeTable, default_table
from exporter.planning.compression import check_compression, described_compression, expected_spec
from exporter.planning.recipe import CompressChoice, Recipe
from exporter.searching.fitting import Fitted, fit, smallest
from exporter.searching.no_fit import nothing_fits
from exporter.searching.structures import expected_loss, whole
from exporter.searching.units import LAST_RESORT, units_of
from exporter.searching.untyped_file import UntypedFile

__all__ = [
    "STRUCTURES_FROM",
    "Outlook",
    "best_fit",
    "outlook_of",
    "outlooks",
    "outlooks_of_all",
    "refuse_unless_something_fits",
    "untyped_file_of",
]

STRUCTURES_FROM = 0.05
"""Predicted divergence, nats, from which structures smaller than the original are considered. The best of them, half of
every expert's width, starts at 0.07 after training (docs/quantization.md)."""


_SMALLEST = 2  # the number of structures whose exact needs are computed; apart from tensors they hardly differ


@dataclass(frozen=True)
class Outlook:
    """A structure whose file fits."""

    compress: CompressChoice
    untyped: UntypedFile
    fitted: Fitted
    divergence: float  # from the original, nats: a guess


def outlooks_of_all(
    recipe: Recipe, checkpoint: Source, structures: Sequence[CompressChoice], artifacts: Sequence[str]
) -> dict[str, list[Outlook]]:
    """The structures that fit for each artifact, the most promising first; there is at least one.

    Raises:
        BudgetError, UnsupportedError: as in :func:`refuse_unless_something_fits`.
    """
    first = {artifact: outlook_of(recipe, artifact, checkpoint, structures[0]) for artifact in artifacts}
    if None in first.values():
        refuse_unless_something_fits(recipe, checkpoint, structures, artifacts)
    return {artifact: outlooks(recipe, artifact, checkpoint, structures, first[artifact]) for artifact in artifacts}


def outlooks(
    recipe: Recipe,
    artifact: str,
    checkpoint: Source,
    structures: Sequence[CompressChoice],
    known: Outlook | None = None,
) -> list[Outlook]:
    """The structures that fit, the most promising first.

    Structures smaller than the original are left out where the original is good enough.

    Args:
        recipe: gives budget, quantizer and source.
        artifact: gguf or onnx.
        checkpoint: the original.
        structures: structures to choose from; the original, if it is one of them, is the first.
        known: the outlook of one of them, if it was looked at before.
    """
    found: list[Outlook] = []
    for choice in structures:
        is_known = known is not None and known.compress == choice
        outlook = known if is_known else outlook_of(recipe, artifact, checkpoint, choice)
        if outlook is not None:
            found.append(outlook)
            if choice == whole(checkpoint.spec) and outlook.divergence <= STRUCTURES_FROM:
                break
    return sorted(found, key=lambda outlook: outlook.divergence)


def refuse_unless_something_fits(
    recipe: Recipe, checkpoint: Source, structures: Sequence[CompressChoice], artifacts: Sequence[str]
) -> None:
    """Refuses a budget that an artifact meets with no structure, by arithmetic on sizes alone.

    Raises:
        BudgetError: the message names the smallest budget that would work for all artifacts.
        UnsupportedError: a container can hold none of the structures.
    """
    if all(_holds_the_first(recipe, artifact, checkpoint, structures) for artifact in artifacts):
        return
    needs = {artifact: _least(recipe, artifact, checkpoint, structures) for artifact in artifacts}
    if max(n_bytes for n_bytes, _ in needs.values()) <= recipe.budget.bytes:
        return
    least = {
        artifact: (n_bytes, described_compression(choice, checkpoint.spec))
        for artifact, (n_bytes, choice) in needs.items()
    }
    raise nothing_fits(recipe.budget, least)


def _holds_the_first(recipe: Recipe, artifact: str, checkpoint: Source, structures: Sequence[CompressChoice]) -> bool:
    """True if the structure that changes least fits with its smallest types: then no other needs to be looked at."""
    try:
        untyped = untyped_file_of(recipe, artifact, checkpoint, structures[0])
        return smallest(untyped, units_of(untyped, checkpoint.storage_type)) <= recipe.budget.bytes
    except UnsupportedError:
        return False


def _least(
    recipe: Recipe, artifact: str, checkpoint: Source, structures: Sequence[CompressChoice]
) -> tuple[int, CompressChoice]:
    """The fewest bytes that a structure needs, and the structure, among those with the fewest bytes of tensors."""
    possible: list[tuple[int, CompressChoice, UntypedFile]] = []
    refusal: UnsupportedError | None = None
    for choice in structures:
        try:
            untyped = untyped_file_of(recipe, artifact, checkpoint, choice)
            units = units_of(untyped, checkpoint.storage_type)
        except UnsupportedError as error:
            refusal = refusal or error
            continue
        n_bytes = sum(min(candidate.n_bytes for candidate in unit.candidates) for unit in units)
        possible.append((n_bytes, choice, untyped))
    if not possible:
        assert refusal is not None, "there are structures"
        raise refusal
    possible.sort(key=lambda entry: entry[0])
    needs = [
        (smallest(untyped, units_of(untyped, checkpoint.storage_type)), choice)
        for _, choice, untyped in possible[:_SMALLEST]
    ]
    return min(needs, key=lambda need: need[0])


def untyped_file_of(recipe: Recipe, artifact: str, checkpoint: Source, choice: CompressChoice) -> UntypedFile:
    """The artifact of a structure.

    Raises:
        UnsupportedError: the container cannot hold it.
    """
    check_compression(recipe.with_only(artifact, choice), checkpoint.spec)
    return UntypedFile(
        artifact,
        checkpoint,
        recipe.source.model,
        expected_spec(choice, checkpoint.spec),
        recipe.budget,
        recipe.threads,
        recipe.file(artifact),
    )


def best_fit(untyped: UntypedFile, table: TypeTable, seconds: float | None = None) -> Fitted | None:
    """The best types that fit, if possible without those of the last resort; None if none fit.

    The arguments are those of :func:`~exporter.searching.fitting.fit`.
    """
    for allowed in (table.without(LAST_RESORT), table):
        if all(unit.options for unit in allowed.units):
            fitted = fit(untyped, allowed, seconds=seconds)
            if fitted is not None:
                return fitted
    return None


def outlook_of(recipe: Recipe, artifact: str, checkpoint: Source, choice: CompressChoice) -> Outlook | None:
    """A structure with the types that are expected to be best; None if none fit, or the container cannot hold it."""
    try:
        untyped = untyped_file_of(recipe, artifact, checkpoint, choice)
        table = _default_table(untyped, checkpoint.storage_type)
    except UnsupportedError:
        return None
    fitted = best_fit(untyped, table)
    if fitted is None:
        return None
    return Outlook(choice, untyped, fitted, expected_loss(choice, checkpoint.spec) + fitted.allocation.divergence)


def _default_table(untyped: UntypedFile, weights: StorageType) -> TypeTable:
    return default_table(untyped.spec, units_of(untyped, weights))
