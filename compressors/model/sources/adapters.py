"""Low-rank adapters of experts, as an overlay keeps them: merged into the matrices below when one is read.

An adapter's two factors are a hundredth of its matrix: a student that was taught by adapters needs no copy of its
experts on the disk. Hu et al., "LoRA" (arXiv 2106.09685): W + B A, without its scale.

Letters: P matrices that were trained together (gate and up, or up alone; down), R rank, I inputs, O outputs of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec

if TYPE_CHECKING:
    import torch

__all__ = ["AdaptedExperts", "Without", "adapter_names", "adapter_tensors", "factors_of", "holds_adapter"]
__all__ += ["holds_adapters"]

_A, _B = ".adapter_a", ".adapter_b"


@dataclass(frozen=True)
class _Matrix:
    """A matrix with an adapter."""

    role: Role
    layer: int
    expert: int
    first: str  # the name of the first matrix that was trained together with it, which the factors are named after
    part: int  # its number among these


def adapter_names(first: str) -> tuple[str, str]:
    """The names of A and of B of an adapter that is named after this matrix."""
    return first + _A, first + _B


def adapter_tensors(first: str, a_PRI: torch.Tensor, b_POR: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of an overlay that hold an adapter, of one expert's matrices of which the first has this name."""
    return dict(zip(adapter_names(first), (a_PRI, b_POR), strict=True))


def factors_of(overlay: Mapping[str, torch.Tensor], first: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors A [P, R, I] and B [P, O, R] of an overlay's adapter that is named after this matrix."""
    return overlay[first + _A], overlay[first + _B]


def holds_adapter(overlay: Mapping[str, torch.Tensor], first: str) -> bool:
    """True if this overlay has an adapter that is named after this matrix."""
    return first + _A in overlay


def holds_adapters(overlay: Mapping[str, torch.Tensor]) -> bool:
    """True if a matrix has an adapter in this overlay."""
    return any(name.endswith(_A) for name in overlay)


class AdaptedExperts(Mapping[str, "torch.Tensor"]):
    """An overlay as tensors by name, adapters merged in storage dtype when their matrix is asked for.

    Args:
        overlay: tensors and adapters.
        spec: the student.
        name: gives the name of an expert's matrix from role, layer and expert.
        stored: reads the matrix below, from the same.
    """

    def __init__(
        self,
        overlay: Mapping[str, torch.Tensor],
        spec: ModelSpec,
        name: Callable[[Role, int, int], str],
        stored: Callable[[Role, int, int], torch.Tensor],
    ) -> None:
        self._overlay = overlay
        self._stored = stored
        self._matrices: dict[str, _Matrix] = {}
        for index, layer in enumerate(spec.layers):
            if layer.routed is None:
                continue
            for roles in (layer.routed.input_roles, (Role.EXPERT_DOWN,)):
                for expert in range(layer.n_experts):
                    first = name(roles[0], index, expert)
                    if holds_adapter(overlay, first):
                        found = {
                            name(role, index, expert): _Matrix(role, index, expert, first, part)
                            for part, role in enumerate(roles)
                        }
                        self._matrices |= found
        self._others = [key for key in overlay if not key.endswith((_A, _B))]

    def __getitem__(self, name: str) -> torch.Tensor:
        matrix = self._matrices.get(name)
        if matrix is None:
            return self._overlay[name]
        stored_OI = self._stored(matrix.role, matrix.layer, matrix.expert)
        a_PRI, b_POR = factors_of(self._overlay, matrix.first)
        merged: torch.Tensor = stored_OI.float() + (b_POR @ a_PRI)[matrix.part]
        return merged.to(stored_OI.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._matrices or name in self._overlay

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        yield from self._matrices

    def __len__(self) -> int:
        return len(self._others) + len(self._matrices)


class Without(Mapping[str, "torch.Tensor"]):
    """An overlay without some of its tensors.

    Args:
        overlay: all of them.
        hidden: the names of those that are not seen.
    """

    def __init__(self, overlay: Mapping[str, torch.Tensor], hidden: frozenset[str]) -> None:
        self._overlay = overlay
        self._hidden = hidden

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._hidden:
            raise KeyError(name)
        return self._overlay[name]

    def __contains__(self, name: object) -> bool:
        return name not in self._hidden and name in self._overlay

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._overlay if name not in self._hidden)

    def __len__(self) -> int:
        return sum(1 for _ in self)
