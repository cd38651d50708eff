"""Describes the faults of a file's weights: a sentence for each tensor, expert or group of rows.

Layers, experts and rows are counted from 0, as in the files; a row of the embedding is a token, shown with its text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from compressors.model.description.roles import Role
from validate.files.weight_comparison import Damage, Fault, Unit, WeightComparison

__all__ = ["TokenText", "coarse_symptoms", "weight_symptoms"]

TokenText = Callable[[int], str | None]
"""The text of a token by its id; None if the tokenizer has no such token."""

_COARSE, _COARSER = 0.2, 2.5  # the least relative error of a 2-bit tensor, absolute and as a multiple of the others'
_NOT_COARSE_BUT_ANOTHER = 0.8
_NAMED = 3  # the most rows, or experts, that a sentence names
_VOCABULARY_ROLES = (Role.TOKEN_EMBEDDING, Role.HEAD)


def weight_symptoms(damage: Sequence[Damage], token_text: TokenText | None = None) -> list[str]:
    """Returns sentences about damaged tensors; ``token_text`` names rows of the embedding."""
    whole = [entry for entry in damage if entry.unit.row is None]
    rows = [entry for entry in damage if entry.unit.row is not None]
    elsewhere = [entry for entry in whole if entry.fault is Fault.HOLDS_ANOTHER]
    others = [entry for entry in whole if entry.fault not in (Fault.HOLDS_ANOTHER, Fault.ZERO)]
    zero = [entry for entry in whole if entry.fault is Fault.ZERO]
    return [*_zeroed(zero), *_mixed_up(elsewhere), *_off(others), *_rows(rows, token_text)]


def coarse_symptoms(comparison: WeightComparison) -> list[str]:
    """Returns sentences about tensors of about 2 bits in a file of more bits, which make the file needlessly bad."""
    by_tensor: dict[tuple[int | None, Role], list[float]] = defaultdict(list)
    for unit, error in comparison.errors.items():
        if (unit.role, unit.layer) in comparison.matrices and error <= _NOT_COARSE_BUT_ANOTHER:
            by_tensor[unit.layer, unit.role].append(error)
    errors = {tensor: float(np.median(values)) for tensor, values in by_tensor.items()}
    usual = float(np.median(list(errors.values()) or [0.0]))
    return [
        f"{_place(layer)}{role.value} is much coarser than the rest: relative error {error:.2g} against {usual:.2g}"
        for (layer, role), error in errors.items()
        if error > max(_COARSE, _COARSER * usual)
    ]


def _zeroed(damage: Iterable[Damage]) -> list[str]:
    roles: dict[tuple[int | None, int | None, bool], list[str]] = defaultdict(list)
    for entry in damage:
        unit = entry.unit
        roles[unit.layer, unit.index, unit.role.is_expert and unit.index is not None].append(unit.role.value)
    symptoms = []
    for (layer, index, is_expert), names in roles.items():
        if is_expert:
            symptoms.append(f"expert {index} of layer {layer} is zero ({', '.join(names)})")
        else:
            row = "" if index is None else f" row {index}"
            symptoms += [f"{_place(layer)}{name}{row} is zero" for name in dict.fromkeys(names)]
    return symptoms


def _mixed_up(damage: Sequence[Damage]) -> list[str]:
    """Describes units that hold another one of the original: of the same layer and role, another role or layer."""
    exchanged: dict[int | None, list[Damage]] = defaultdict(list)
    permuted: dict[tuple[int | None, Role], list[tuple[Unit, Unit]]] = defaultdict(list)
    layers: dict[tuple[int | None, int | None], list[str]] = defaultdict(list)
    for entry in damage:
        unit, holds = entry.unit, entry.holds
        assert holds is not None
        if holds.layer != unit.layer:
            layers[unit.layer, holds.layer].append(unit.role.value)
        elif holds.role is not unit.role:
            exchanged[unit.layer].append(entry)
        else:
            permuted[unit.layer, unit.role].append((unit, holds))
    symptoms = []
    for layer, entries in exchanged.items():
        names = " and ".join(sorted({entry.unit.role.value for entry in entries}))
        experts = len({entry.unit.index for entry in entries})
        count = f" ({experts} experts)" if entries[0].unit.role.is_expert else ""
        symptoms.append(f"{_place(layer)}{names} projections are exchanged{count}")
    for (layer, role), pairs in permuted.items():
        unit, holds = pairs[0]
        what = "rows of its router" if role is Role.ROUTER else f"{role.value} projections"
        symptoms.append(
            f"{_place(layer)}{len(pairs)} {what} are permuted (number {unit.index} is the original's {holds.index})"
        )
    return symptoms + _swapped(layers)


def _swapped(layers: dict[tuple[int | None, int | None], list[str]]) -> list[str]:
    symptoms = []
    for (layer, source), names in layers.items():
        where = "the whole model" if source is None else f"layer {source}"
        if layer is None or source is None or (source, layer) not in layers:
            count = "" if len(names) == 1 else f" ({len(names)} experts or rows)"
            for role in dict.fromkeys(names):
                symptoms.append(f"{_place(layer)}{role} is that of {where}{count if len(set(names)) == 1 else ''}")
        elif layer < source:
            both = len(names) + len(layers[source, layer])
            symptoms.append(f"layers {layer} and {source} are swapped ({both} tensors, experts and router rows apart)")
    return symptoms


def _off(damage: Iterable[Damage]) -> list[str]:
    """Describes units that differ from the original's more than their type explains; groups experts in a sentence."""
    alike: dict[tuple[int | None, Role, Fault], list[Damage]] = defaultdict(list)
    for entry in damage:
        alike[entry.unit.layer, entry.unit.role, entry.fault].append(entry)
    return [f"{_place(layer)}{_named(entries)} {_verdict(entries)}" for (layer, _, _), entries in alike.items()]


def _named(entries: Sequence[Damage]) -> str:
    role, index = entries[0].unit.role, entries[0].unit.index
    if index is None:
        return role.value
    numbers = _listed([str(entry.unit.index) for entry in entries])
    kind = "row" if role is Role.ROUTER else "expert"
    return f"{role.value} of {kind}{'' if len(entries) == 1 else 's'} {numbers}".replace("router of", "router,")


def _verdict(entries: Sequence[Damage]) -> str:
    worst = max(entries, key=lambda entry: entry.relative_error)
    error = f"relative error {worst.relative_error:.2g}"
    match worst.fault:
        case Fault.SCALED:
            return f"is {worst.scale:.3g} times the original's"
        case Fault.CHANGED:
            return f"is not the original's, though stored as {worst.type_name} ({error})"
        case Fault.TOO_FAR:
            usual = f"usual {worst.usual_error:.2g}"
            return f"is further from the original's than {worst.type_name} makes it ({error}, {usual})"
        case _:
            return f"does not resemble the original's ({error})"


def _rows(damage: Iterable[Damage], token_text: TokenText | None) -> list[str]:
    """Describes rows of one tensor, or of one expert, with the same fault in one sentence."""
    alike: dict[tuple[Unit, Fault], list[Damage]] = defaultdict(list)
    for entry in damage:
        unit = entry.unit
        alike[Unit(unit.role, unit.layer, unit.index, part=unit.part), entry.fault].append(entry)
    symptoms = []
    for (unit, fault), entries in alike.items():
        names = [_row_name(entry.unit, token_text) for entry in entries]
        where = unit.role.value + ("" if unit.index is None else f" of expert {unit.index}")
        where += "" if unit.part is None else f", part {unit.part}"
        if fault is Fault.ZERO:
            verdict = "zero"
        elif fault is Fault.HOLDS_ANOTHER and entries[0].holds is not None:
            verdict = f"another's: {names[0]} holds the original's {_row_name(entries[0].holds, token_text)}"
        else:
            verdict = _verdict(entries).removeprefix("is ")
        subject = names[0] if len(names) == 1 else f"{len(names)} rows ({_listed(names)})"
        verb = "" if verdict.startswith("does") else "is " if len(names) == 1 else "are "
        symptoms.append(f"{_place(unit.layer)}{where}: {subject} {verb}{verdict}")
    return symptoms


def _row_name(unit: Unit, token_text: TokenText | None) -> str:
    assert unit.row is not None
    if unit.role not in _VOCABULARY_ROLES:
        return f"row {unit.row}"
    text = None if token_text is None else token_text(unit.row)
    return f"token {unit.row}" if text is None else f"token {unit.row} {text!r}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _place(layer: int | None) -> str:
    return "" if layer is None else f"layer {layer}: "
