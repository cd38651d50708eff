"""Narrower experts, as an overlay keeps them: the neurons that stay, put together from the source's own matrices.

Gate and up keep rows of the expert that they come from as they are, so their numbers are all that an overlay needs. The
down projection makes up for the neurons that went: its columns get a linear combination of theirs, whose factors take
less room than the columns where few neurons went (:mod:`compressors.shrink.slim.width`).

Letters: D hidden size, F neurons of the expert in the source, M those that stay, R those that went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec

if TYPE_CHECKING:
    import torch

__all__ = ["NarrowedExperts", "correction_is_smaller", "holds_narrowed", "narrowed_bytes", "narrowed_down"]
__all__ += ["narrowed_tensors"]

_NEURONS, _CORRECTION = ".neurons", ".correction"
_INDEX_BYTES, _FACTOR_BYTES = 4, 4
_ROWS_AT_ONCE = 512  # rows that are widened to float64 together


def correction_is_smaller(hidden_size: int, n_gone: int, itemsize: int) -> bool:
    """True if the factors [R, M] take less room than the down projection [D, M] whose values take ``itemsize`` each."""
    return n_gone * _FACTOR_BYTES < hidden_size * itemsize


def narrowed_bytes(hidden_size: int, width: int, n_kept: int, itemsize: int) -> int:
    """The most bytes that an overlay takes for an expert of this width of which ``n_kept`` neurons stay."""
    n_gone = width - n_kept
    of_neuron = min(n_gone * _FACTOR_BYTES, hidden_size * itemsize)
    return n_kept * (_INDEX_BYTES + of_neuron)


def narrowed_tensors(
    down: str, neurons: Sequence[int], correction_RM: torch.Tensor | None, down_DM: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The tensors of an overlay that hold a narrower expert.

    Args:
        down: the name of its down projection.
        neurons: the neurons that stay, in their order.
        correction_RM: float32, see :func:`narrowed_down`; None: there are none.
        down_DM: its down projection in storage dtype, where that is kept whole; None: it is put together.
    """
    import torch

    tensors = {down + _NEURONS: torch.tensor(neurons, dtype=torch.int32)}
    if correction_RM is not None:
        tensors[down + _CORRECTION] = correction_RM.contiguous()
    if down_DM is not None:
        tensors[down] = down_DM.contiguous()
    return tensors


def narrowed_down(
    down_DF: torch.Tensor, neurons: Sequence[int] | torch.Tensor, correction_RM: torch.Tensor | None
) -> torch.Tensor:
    """The down projection of a narrower expert: the columns that stay, plus combinations of those that went.

    Args:
        down_DF: the source's, float32.
        neurons: the neurons that stay, in ascending order.
        correction_RM: float32 factors of the columns that went, in ascending order; None: they are left out.

    Returns:
        float32 [D, M].
    """
    import torch

    stays_F = torch.zeros(down_DF.shape[1], dtype=torch.bool)
    stays_F[torch.as_tensor(neurons, dtype=torch.int64)] = True
    down_DM = down_DF[:, stays_F]
    if correction_RM is None:
        return down_DM
    gone_DR = down_DF[:, ~stays_F]
    for first in range(0, len(down_DM), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        down_DM[rows] = (down_DM[rows] + gone_DR[rows].double() @ correction_RM.double()).float()
    return down_DM


def holds_narrowed(overlay: Mapping[str, torch.Tensor]) -> bool:
    """True if this overlay has a narrower expert without its matrices."""
    return any(name.endswith(_NEURONS) for name in overlay)


class NarrowedExperts(Mapping[str, "torch.Tensor"]):
    """An overlay as tensors by name, with narrower experts put together when a matrix of theirs is asked for.

    Args:
        overlay: tensors, and narrower experts.
        spec: the student.
        name: gives the name of an expert's matrix from role, layer and expert.
        whole: reads the matrix that the source has, in storage dtype, from the same.
    """

    def __init__(
        self,
        overlay: Mapping[str, torch.Tensor],
        spec: ModelSpec,
        name: Callable[[Role, int, int], str],
        whole: Callable[[Role, int, int], torch.Tensor],
    ) -> None:
        self._overlay = overlay
        self._whole = whole
        self._made: dict[str, tuple[Role, int, int]] = {}  # the matrices that the overlay does not have
        self._down: dict[str, str] = {}  # the name of the down projection of the same expert
        narrowed = {key.removesuffix(_NEURONS) for key in overlay if key.endswith(_NEURONS)}
        for index, layer in enumerate(spec.blocks):
            for expert in range(layer.n_experts):
                down = name(Role.EXPERT_DOWN, index, expert)
                if down in narrowed:
                    places = {name(tensor.role, index, expert): tensor.role for tensor in layer.expert_tensors}
                    made = {matrix: role for matrix, role in places.items() if matrix not in overlay}
                    self._made |= {matrix: (role, index, expert) for matrix, role in made.items()}
                    self._down |= dict.fromkeys(made, down)
        self._others = [key for key in overlay if not key.endswith((_NEURONS, _CORRECTION))]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._made:
            return self._overlay[name]
        role, layer, expert = self._made[name]
        down = self._down[name]
        neurons_M, whole = self._overlay[down + _NEURONS].long(), self._whole(role, layer, expert)
        if role is not Role.EXPERT_DOWN:
            return whole[neurons_M]
        correction_RM = self._overlay.get(down + _CORRECTION)
        return narrowed_down(whole.float(), neurons_M, correction_RM).to(whole.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._made or name in self._overlay

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        yield from self._made

    def __len__(self) -> int:
        return len(self._others) + len(self._made)
