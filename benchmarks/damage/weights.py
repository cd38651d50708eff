"""Damage to weights: every role, whole or one expert, row or value of it, in four ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from compressors.model.description.roles import Role
from compressors.model.sources.student import Student

__all__ = ["WeightDamage", "weight_damages"]

Overlay = dict[str, torch.Tensor]
_LAYER, _EXPERT, _ROW = 1, 3, 5


@dataclass(frozen=True)
class WeightDamage:
    """A change to weights, and the tensors that replace a student's own."""

    what: str
    names: tuple[str, ...]  # one of which a symptom must have
    overlay: Overlay


def weight_damages(student: Student) -> Iterator[WeightDamage]:
    """Yields the damages of the second layer and of what all layers share."""
    for role in dict.fromkeys(tensor.role for tensor, _ in student.spec.written.places):
        if role.is_expert:
            yield from _of_experts(student, role)
        else:
            yield from _of_tensor(student, role, None if role.is_global else _LAYER)


def _of_experts(student: Student, role: Role) -> Iterator[WeightDamage]:
    values = [student.expert(role, _LAYER, expert).float() for expert in range(student.spec.n_experts)]
    names = [student.name(role, _LAYER, expert) for expert in range(len(values))]
    shifted = values[1:] + values[:1]
    for kind, change in _changes(None).items():
        all_of_them = shifted if change is None else [change(one) for one in values]
        says = (role.value, f"expert {_EXPERT} of layer {_LAYER}", f"of layer {_LAYER} is zero")
        yield WeightDamage(f"{role.value}, all: {kind}", says, dict(zip(names, all_of_them, strict=True)))
        one, other = values[_EXPERT], values[_EXPERT + 1]
        overlay = {names[_EXPERT]: other if change is None else change(one)}
        if change is None:
            overlay[names[_EXPERT + 1]] = one
        yield WeightDamage(f"{role.value}, one expert: {kind}", says, overlay)
    for kind, change in _changes(_ROW).items():
        assert change is not None
        yield WeightDamage(f"{role.value}, one row: {kind}", (role.value,), {names[_EXPERT]: change(values[_EXPERT])})


def _of_tensor(student: Student, role: Role, layer: int | None) -> Iterator[WeightDamage]:
    values, name = student.tensor(role, layer).float(), student.name(role, layer)
    neighbour = values.roll(1, 0) if layer is None else student.tensor(role, 0).float()
    if role is Role.FINAL_NORM:
        neighbour = student.tensor(Role.ATTENTION_NORM, _LAYER).float()
    for kind, change in _changes(None).items():
        yield WeightDamage(
            f"{role.value}: {kind}", (role.value,), {name: neighbour if change is None else change(values)}
        )
    part = "one value" if values.dim() == 1 else "one row"
    for kind, change in _changes(_ROW).items():
        assert change is not None
        yield WeightDamage(f"{role.value}, {part}: {kind}", (role.value,), {name: change(values)})


def _changes(row: int | None) -> dict[str, Callable[[torch.Tensor], torch.Tensor] | None]:
    """The changes by name; None is an exchange with a neighbour, which for a row is the row beside it."""
    generator = torch.Generator().manual_seed(0)

    def noisy(values: torch.Tensor) -> torch.Tensor:
        size = values.square().mean().sqrt()
        return values + 0.5 * size * torch.randn(values.shape, generator=generator)

    whole: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "zero": torch.zeros_like,
        "noise of 50 %": noisy,
        "x 1.05": lambda values: 1.05 * values,
    }
    if row is None:
        return {**whole, "exchanged with a neighbour": None}

    def only(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def changed(values: torch.Tensor) -> torch.Tensor:
            values = values.clone()
            values[row] = change(values[row : row + 1])[0]
            return values

        return changed

    def exchanged(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[[row, row + 1]] = values[[row + 1, row]]
        return values

    return {**{kind: only(change) for kind, change in whole.items()}, "exchanged with a neighbour": exchanged}
