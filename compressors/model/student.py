"""A student: a source checkpoint, the experts that are kept, and an overlay of the tensors whose values changed.

Pruning writes no expert: the student reads the survivors from the source. Every reader of a student, the streamed
torch reference and both writers included, goes through :class:`Student`. The teacher is the student that keeps
everything and changes nothing (:meth:`Student.teacher`).
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError
from compressors.model.families import Family, Role
from compressors.model.shape import MoeShape
from compressors.model.weight_file import StoredTensors

__all__ = ["ExpertMap", "Student"]


@dataclass(frozen=True)
class ExpertMap:
    """For each layer the teacher's experts that survive; their order is the student's numbering."""

    n_teacher_experts: int
    kept: tuple[tuple[int, ...], ...]  # [L][student expert] -> teacher expert

    @classmethod
    def identity(cls, shape: MoeShape) -> ExpertMap:
        """Keeps every expert."""
        return cls(shape.n_experts, (tuple(range(shape.n_experts)),) * shape.n_layers)

    @property
    def n_experts(self) -> int:
        """Experts in each layer of the student.

        Raises:
            ValueError: the layers differ; ask for each layer instead.
        """
        counts = {len(layer) for layer in self.kept}
        if len(counts) != 1:
            raise ValueError(f"the layers keep different numbers of experts: {sorted(counts)}")
        return counts.pop()

    def check_against(self, shape: MoeShape) -> None:
        """Checks that these are experts of a model of this shape.

        Raises:
            ValueError: another number of layers or experts, or a layer that keeps none, one twice or one there is not.
        """
        if (len(self.kept), self.n_teacher_experts) != (shape.n_layers, shape.n_experts):
            raise ValueError(f"the map is for {len(self.kept)} layers of {self.n_teacher_experts} experts")
        for layer, kept in enumerate(self.kept):
            if not kept or len(set(kept)) < len(kept) or not set(kept) <= set(range(shape.n_experts)):
                raise ValueError(f"layer {layer} keeps the experts {list(kept)}")

    @property
    def is_identity(self) -> bool:
        """Whether nothing was dropped."""
        return all(layer == tuple(range(self.n_teacher_experts)) for layer in self.kept)

    def student_of(self, layer: int) -> torch.Tensor:
        """int64 [teacher experts]: the student's expert that stands for each teacher expert, -1 for a dropped one."""
        table = torch.full((self.n_teacher_experts,), -1, dtype=torch.int64)
        table[list(self.kept[layer])] = torch.arange(len(self.kept[layer]))
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON or YAML file."""
        return {"teacher_experts": self.n_teacher_experts, "kept": [list(layer) for layer in self.kept]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExpertMap:
        """The inverse of :meth:`to_json`."""
        return cls(int(data["teacher_experts"]), tuple(tuple(layer) for layer in data["kept"]))


class Student:
    """The compressed model as a set of tensors by role, numbered as the student numbers its experts.

    Tensors come in storage dtype (overlay tensors in theirs, float32 for routers).
    """

    def __init__(
        self, source: Checkpoint, experts: ExpertMap, overlay: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.source = source
        self.experts = experts
        self.overlay: Mapping[str, torch.Tensor] = {} if overlay is None else overlay
        self.shape: MoeShape = source.shape.with_experts(experts.n_experts)

    @classmethod
    def teacher(cls, source: Checkpoint) -> Student:
        """The original model."""
        return cls(source, ExpertMap.identity(source.shape))

    @classmethod
    def load(cls, source: Checkpoint, expert_map: Path, overlay: Path | None = None) -> Student:
        """Opens a student from its expert map (JSON) and its overlay (safetensors), if it has one.

        Raises:
            InputError: a file is missing or damaged.
        """
        try:
            experts = ExpertMap.from_json(json.loads(expert_map.read_text(encoding="utf-8")))
            experts.check_against(source.shape)
            tensors = None if overlay is None else StoredTensors(overlay)
        except (OSError, ValueError, KeyError, TypeError, InputError) as error:
            raise InputError(
                f"the student in {expert_map.parent} cannot be read ({error}); remove the folder"
            ) from None
        return cls(source, experts, tensors)

    @property
    def family(self) -> Family:
        """The architecture's row in the table of families."""
        return self.source.family

    def name(self, role: Role, layer: int | None = None, expert: int | None = None) -> str:
        """The Hugging Face name of a tensor in the student's numbering; overlays use it as their key."""
        return self.family.names[role].format(layer=layer, expert=expert)

    def tensor(self, role: Role, layer: int | None = None) -> torch.Tensor:
        """The tensor of a role that is not an expert's; router rows are the surviving experts' [E, D].

        A tied head is the embedding, as the student has it.
        """
        if role is Role.HEAD and self.shape.tied_embeddings:
            role = Role.TOKEN_EMBEDDING
        name = self.name(role, layer)
        if name in self.overlay:
            return self.overlay[name]
        tensor = self.source.tensor(role, layer)
        if role is Role.ROUTER and layer is not None:
            return tensor[list(self.experts.kept[layer])]
        return tensor

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`, without reading the others."""
        if role is Role.HEAD and self.shape.tied_embeddings:
            role = Role.TOKEN_EMBEDDING
        if role is Role.ROUTER or self.name(role, layer) in self.overlay:
            return self.tensor(role, layer)[rows]
        return self.source.rows(role, layer, rows)

    def expert(self, role: Role, layer: int, expert: int) -> torch.Tensor:
        """One surviving expert's gate [F, D], up [F, D] or down [D, F] projection."""
        name = self.name(role, layer, expert)
        if name in self.overlay:
            return self.overlay[name]
        return self.source.expert(role, layer, self.experts.kept[layer][expert])

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, contiguous and of the expert's shape, with what :meth:`expert` would return."""
        name = self.name(role, layer, expert)
        if name in self.overlay:
            out.copy_(self.overlay[name])
        else:
            self.source.read_expert(role, layer, self.experts.kept[layer][expert], out)

    def with_overlay(self, overlay: Mapping[str, torch.Tensor]) -> Student:
        """The same student with these tensors in place of what it had."""
        both = ChainMap(dict(overlay), self.overlay)  # type: ignore[arg-type]  # it writes to the first map only
        return Student(self.source, self.experts, both)
