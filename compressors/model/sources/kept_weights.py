"""The tensors that a student has from its source: those of the layers and experts that it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressors.model.description.roles import Role
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.sources.source import Source

if TYPE_CHECKING:
    import torch

    from compressors.model.sources.student import ExpertMap

__all__ = ["KeptWeights"]


class KeptWeights:
    """The source's tensors that a student keeps; implements :class:`~compressors.model.sources.weights.Weights`.

    Args:
        source: the teacher's checkpoint.
        experts: the layers and experts that the student keeps.
    """

    def __init__(self, source: Source, experts: ExpertMap) -> None:
        self._source = source
        self._experts = experts

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the experts."""
        return self._source.dtype

    def dtype_of(self, role: Role, layer: int | None) -> torch.dtype:
        """Storage dtype of the tensors of a role outside of experts."""
        return self._source.dtype_of(role, self._layer(layer))

    def tensor(self, role: Role, layer: int | None) -> torch.Tensor:
        """The tensor of a role outside of experts; what a router has by experts, it has of those that are kept."""
        tensor = self._source.tensor(role, self._layer(layer))
        axis = self._experts_axis(role, layer)
        if layer is None or axis is None:
            return tensor
        import torch

        return tensor.index_select(axis, torch.tensor(self._experts.blocks[layer].kept))

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`, without reading the others."""
        if self._experts_axis(role, layer) is not None:
            return self.tensor(role, layer)[rows]
        return self._source.rows(role, self._layer(layer), rows)

    def _experts_axis(self, role: Role, layer: int | None) -> int | None:
        return self._source.spec.tensor(role, self._layer(layer)).experts_axis

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, contiguous, with one expert's gate [F, D], up [F, D] or down [D, F] projection."""
        came_from = self._experts.blocks[layer]
        self._source.read_expert(role, came_from.source, came_from.kept[expert], out)

    def whole_expert(self, role: Role, layer: int, expert: int) -> torch.Tensor:
        """One expert's matrix as wide as the source has it, in storage dtype, in new memory."""
        import torch

        source = self._experts.blocks[layer].source
        out = torch.empty(self._source.spec.dimensions(role, source), dtype=self.dtype)
        self.read_expert(role, layer, expert, out)
        return out

    def stored_types(self, role: Role, layer: int | None) -> tuple[GGMLQuantizationType, ...]:
        """ggml's types in which the source holds a tensor; none if it is stored otherwise, or not all of it is kept."""
        if self._experts_axis(role, layer) is not None:
            return ()  # its rows or columns are others
        return self._source.stored_types(role, self._layer(layer))

    def stored_rows(self, role: Role, layer: int | None, part: int, rows: slice, expert: int | None) -> torch.Tensor:
        """Rows of a part in its type of :meth:`stored_types`, uint8 [rows, bytes]."""
        came_from = None if layer is None else self._experts.blocks[layer]
        if came_from is not None and expert is not None:
            expert = came_from.kept[expert]
        return self._source.stored_rows(role, self._layer(layer), part, rows, expert)

    def _layer(self, layer: int | None) -> int | None:
        return None if layer is None else self._experts.blocks[layer].source
