"""A student: a source checkpoint, a map of the layers and experts that it keeps, and an overlay of changed tensors.

Pruning writes no expert: the student reads the survivors from the source. Every reader of a student, the streamed
torch reference and both writers included, goes through :class:`Student`. The teacher is the student that keeps
everything and changes nothing (:meth:`Student.teacher`).
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressors.model.description.family import Family
from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.spec import NO_MOE, ModelSpec, MoeSize
from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.weight_file import StoredTensors
from compressors.model.sources.adapters import AdaptedExperts, Without, factors_of, holds_adapter, holds_adapters
from compressors.model.sources.kept_weights import KeptWeights
from compressors.model.sources.narrowed import NarrowedExperts, holds_narrowed
from compressors.model.sources.source import Source
from compressors.model.sources.weights import Weights

if TYPE_CHECKING:
    import torch

__all__ = ["ExpertMap", "LayerMap", "Student"]


@dataclass(frozen=True)
class LayerMap:
    """The parts of one decoder layer of the teacher that the student keeps."""

    source: int  # the teacher's layer
    groups: tuple[tuple[int, ...], ...]
    """[student expert]: the teacher's experts that it stands for, first the one that it comes from. Pruning keeps
    groups of one, merging makes larger ones; without any the layer has lost its MoE sub-layer."""
    width: int | None = None  # each expert's width; None: the teacher's. One expert for all may be as wide as its group
    shared: SharedBases | None = None  # the experts that are a shared base and an adapter; None: none is

    @property
    def kept(self) -> tuple[int, ...]:
        """The teacher's expert that each of the student's comes from."""
        return tuple(group[0] for group in self.groups)


@dataclass(frozen=True)
class ExpertMap:
    """The layers and experts of the teacher that the student keeps; the order is the student's numbering."""

    n_teacher_experts: int
    layers: tuple[LayerMap, ...]
    mtp: LayerMap | None = None  # of the layer that predicts one more token; its source is behind the teacher's layers

    @classmethod
    def identity(cls, spec: ModelSpec) -> ExpertMap:
        """Keeps everything."""
        return cls.keeping(spec.n_experts, [range(layer.n_experts) for layer in spec.blocks], n_layers=spec.n_layers)

    @classmethod
    def keeping(cls, n_teacher_experts: int, kept: Sequence[Sequence[int]], n_layers: int | None = None) -> ExpertMap:
        """Keeps all layers, and these experts of each.

        Args:
            n_teacher_experts: the number of the teacher's experts.
            kept: the experts that stay, by layer.
            n_layers: the number of decoder layers, behind which one more token is predicted; None: all are such.
        """
        layers = [LayerMap(layer, tuple((expert,) for expert in experts)) for layer, experts in enumerate(kept)]
        behind = layers[len(layers) if n_layers is None else n_layers :]
        return cls(n_teacher_experts, tuple(layers[: len(layers) - len(behind)]), *behind)

    @property
    def blocks(self) -> tuple[LayerMap, ...]:
        """All layers in the order of files (:attr:`ModelSpec.blocks`)."""
        return self.layers if self.mtp is None else (*self.layers, self.mtp)

    def of_itself(self) -> ExpertMap:
        """Returns the map from the student to itself, which keeps all experts."""
        kept = [range(len(layer.groups)) for layer in self.blocks]
        return ExpertMap.keeping(self.n_teacher_experts, kept, len(self.layers))

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        """[L][student expert]: the teacher's expert that it comes from."""
        return tuple(layer.kept for layer in self.layers)

    def check_against(self, spec: ModelSpec) -> None:
        """Checks that these are layers and experts of this model.

        Raises:
            ValueError: the number of experts is another, or a layer or expert occurs twice or does not exist.
        """
        sources = [layer.source for layer in self.layers]
        if self.n_teacher_experts != spec.n_experts or not sources:
            raise ValueError(f"the map is for {len(sources)} layers of {self.n_teacher_experts} experts")
        if sources != sorted(set(sources)) or not set(sources) <= set(range(spec.n_layers)):
            raise ValueError(f"the map names the layers {sources}")
        if self.mtp is not None and (spec.mtp is None or self.mtp.source != spec.n_layers or not self.mtp.groups):
            raise ValueError(f"the map has a layer for MTP, {self.mtp.source}, which the model has not")
        for layer in self.blocks:
            members = [expert for group in layer.groups for expert in group]
            if () in layer.groups or len(set(members)) < len(members) or not set(members) <= set(range(spec.n_experts)):
                raise ValueError(f"layer {layer.source} keeps the experts {[list(group) for group in layer.groups]}")
            widest = spec.blocks[layer.source].expert_width * (len(members) if len(layer.groups) == 1 else 1)
            if layer.width is not None and not 1 <= layer.width <= widest:
                raise ValueError(f"layer {layer.source} has experts of width {layer.width}")
            if layer.shared is not None:
                layer.shared.check_against(len(layer.groups))

    def spec_of(self, teacher: ModelSpec) -> ModelSpec:
        """The student's description."""
        sizes = [
            MoeSize(len(layer.groups), layer.width or teacher.blocks[layer.source].expert_width, layer.shared)
            if layer.groups
            else NO_MOE
            for layer in self.blocks
        ]
        of_mtp = None if self.mtp is None else sizes.pop()
        return teacher.with_sizes(sizes, [layer.source for layer in self.layers], of_mtp)

    def student_of(self, layer: int) -> torch.Tensor:
        """int64 [teacher experts]: the student's expert that stands for each teacher expert, -1 for a dropped one."""
        import torch

        table = torch.full((self.n_teacher_experts,), -1, dtype=torch.int64)
        for expert, group in enumerate(self.layers[layer].groups):
            table[list(group)] = expert
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON or YAML file."""
        layers = [
            {"source": layer.source, "groups": [list(group) for group in layer.groups], "width": layer.width}
            | ({} if layer.shared is None else {"shared": layer.shared.to_json()})
            for layer in self.blocks
        ]
        mtp = {} if self.mtp is None else {"mtp": layers.pop()}
        return {"teacher_experts": self.n_teacher_experts, "layers": layers, **mtp}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExpertMap:
        """The inverse of :meth:`to_json`."""
        layers = [
            LayerMap(
                int(layer["source"]),
                tuple(map(tuple, layer["groups"])),
                layer["width"],
                SharedBases.from_json(layer["shared"]) if "shared" in layer else None,
            )
            for layer in (*data["layers"], *([data["mtp"]] if "mtp" in data else []))
        ]
        mtp = layers.pop() if "mtp" in data else None
        return cls(int(data["teacher_experts"]), tuple(layers), mtp)


class Student:
    """The compressed model as a set of tensors by role, numbered as the student numbers its experts.

    Tensors come in storage dtype (overlay tensors in theirs, float32 for routers).

    Args:
        source: the teacher's checkpoint.
        experts: the layers and experts that it keeps.
        overlay: tensors by their name in the student; they go before all others.
        weights: the source of the other tensors; None: the checkpoint.
    """

    def __init__(
        self,
        source: Source,
        experts: ExpertMap,
        overlay: Mapping[str, torch.Tensor] | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.source = source
        self.experts = experts
        self.overlay: Mapping[str, torch.Tensor] = {} if overlay is None else overlay
        self.spec: ModelSpec = experts.spec_of(source.spec)
        self._weights: Weights = KeptWeights(source, experts) if weights is None else weights

    @classmethod
    def teacher(cls, source: Source) -> Student:
        """The original model."""
        return cls(source, ExpertMap.identity(source.spec))

    @classmethod
    def load(cls, source: Source, expert_map: Path, overlays: Sequence[Path] = ()) -> Student:
        """Opens a student from its expert map (JSON) and its overlays (safetensors); the first that has a tensor wins.

        Raises:
            InputError: a file is missing or damaged.
        """
        try:
            experts = ExpertMap.from_json(json.loads(expert_map.read_text(encoding="utf-8")))
            experts.check_against(source.spec)
            student = cls(source, experts)
            for path in reversed(overlays):
                student = student.with_overlay(StoredTensors(path))
        except (OSError, ValueError, KeyError, TypeError, InputError) as error:
            raise InputError(
                f"the student in {expert_map.parent} cannot be read ({error}); remove the folder"
            ) from None
        return student

    @property
    def is_original(self) -> bool:
        """True if it keeps everything and changes nothing."""
        of_source = isinstance(self._weights, KeptWeights)
        return of_source and self.experts == ExpertMap.identity(self.source.spec) and not self.overlay

    @property
    def family(self) -> Family:
        """The architecture."""
        return self.source.family

    def name(self, role: Role, layer: int | None = None, expert: int | None = None) -> str:
        """The Hugging Face name of a tensor in the student's numbering; overlays use it as their key."""
        return self.spec.tensor(role, layer).name.format(layer=layer, expert=expert)

    def base_name(self, role: Role, layer: int, base: int) -> str:
        """The name in overlays of a matrix that experts of a layer share (:class:`SharedBases`)."""
        return self.spec.tensor(role, layer).name.format(layer=layer, expert=f"bases.{base}")

    def shared(self, layer: int) -> SharedBases | None:
        """The experts of a layer that are a shared base and an adapter; None: none is, or no longer.

        A written file's numbers, and an overlay that has one of these experts whole, put other matrices in their place.
        """
        shared = self.experts.blocks[layer].shared
        if shared is None or not all(self._is_factored(layer, expert) for expert in shared.replaced):
            return None
        return shared

    def base(self, role: Role, layer: int, base: int) -> torch.Tensor:
        """A base's gate [F, D], up [F, D] or down [D, F] projection, in storage dtype."""
        return self.overlay[self.base_name(role, layer, base)]

    def adapter(self, role: Role, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The float32 factors A [R, I] and B [O, R] of one that stands on a base: its matrix is the base plus B A."""
        roles = self._trained_together(role, layer)
        a_PRI, b_POR = factors_of(self.overlay, self.name(roles[0], layer, expert))
        return a_PRI[roles.index(role)], b_POR[roles.index(role)]

    def _trained_together(self, role: Role, layer: int) -> tuple[Role, ...]:
        routed = self.spec.blocks[layer].routed
        assert routed is not None, f"layer {layer} has no experts"
        return (role,) if role is Role.EXPERT_DOWN else routed.input_roles

    def _is_factored(self, layer: int, expert: int) -> bool:
        """True if the matrices of an expert come from the overlay that has its adapters."""
        maps = self.overlay.maps if isinstance(self.overlay, ChainMap) else [self.overlay]
        down = self.name(Role.EXPERT_DOWN, layer, expert)
        above = next((overlay for overlay in maps if down in overlay), None)
        return above is not None and holds_adapter(above, down)

    def _under_adapter(self, overlay: Mapping[str, torch.Tensor], role: Role, layer: int, expert: int) -> torch.Tensor:
        """The matrix that an overlay's adapter is added to: the expert's base if it stands on one, else its own."""
        shared = self.experts.blocks[layer].shared
        base = None if shared is None else shared.base_of[expert]
        if base is None:
            return self.expert(role, layer, expert)
        if base == SharedBases.ZERO:
            import torch

            return torch.zeros(self.spec.dimensions(role, layer), dtype=self.expert_dtype)
        name = self.base_name(role, layer, base)
        return overlay[name] if name in overlay else self.overlay[name]

    def tensor(self, role: Role, layer: int | None = None) -> torch.Tensor:
        """The tensor of a role outside of experts; router rows are the surviving experts' [E, D].

        A tied head is the embedding, as the student has it.
        """
        if role is Role.HEAD and self.spec.tied_embeddings:
            role = Role.TOKEN_EMBEDDING
        name = self.name(role, layer)
        return self.overlay[name] if name in self.overlay else self._weights.tensor(role, layer)

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`, without reading the others."""
        if role is Role.HEAD and self.spec.tied_embeddings:
            role = Role.TOKEN_EMBEDDING
        if self.name(role, layer) in self.overlay:
            return self.tensor(role, layer)[rows]
        return self._weights.rows(role, layer, rows)

    def expert(self, role: Role, layer: int, expert: int) -> torch.Tensor:
        """One expert's gate [F, D], up [F, D] or down [D, F] projection."""
        name = self.name(role, layer, expert)
        if name in self.overlay:
            return self.overlay[name]
        import torch

        out = torch.empty(self.spec.dimensions(role, layer), dtype=self.expert_dtype)
        self._weights.read_expert(role, layer, expert, out)
        return out

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, contiguous and of the expert's shape, with the values that :meth:`expert` returns."""
        name = self.name(role, layer, expert)
        if name in self.overlay:
            out.copy_(self.overlay[name])
        else:
            self._weights.read_expert(role, layer, expert, out)

    def stored_types(
        self, role: Role, layer: int | None, expert: int | None = None
    ) -> tuple[GGMLQuantizationType, ...]:
        """ggml's types in which the source holds a tensor that the student has unchanged.

        There is one for each part that a GGUF file has of it; none if it is stored in another way, or was changed.

        Args:
            role: the role of the tensor.
            layer: its layer.
            expert: the expert that must be unchanged; None: all experts of the layer must be, where it is theirs.
        """
        names = self._names(role, layer) if expert is None else [self.name(role, layer, expert)]
        if not isinstance(self._weights, KeptWeights) or any(name in self.overlay for name in names):
            return ()
        return self._weights.stored_types(role, layer)

    def stored_rows(
        self, role: Role, layer: int | None, part: int, rows: slice, expert: int | None = None
    ) -> torch.Tensor:
        """Rows of a part in its type of :meth:`stored_types`, uint8 [rows, bytes].

        The arguments are those of :meth:`~compressors.model.sources.source.Source.stored_rows`.
        """
        assert isinstance(self._weights, KeptWeights), "only what the source stores is asked for"
        return self._weights.stored_rows(role, layer, part, rows, expert)

    def _names(self, role: Role, layer: int | None) -> list[str]:
        """The names of a role's tensors in a layer: all experts', or the one."""
        if layer is None or not self.spec.tensor(role, layer).is_per_expert:
            return [self.name(role, layer)]
        return [self.name(role, layer, expert) for expert in range(self.spec.blocks[layer].n_experts)]

    @property
    def expert_dtype(self) -> torch.dtype:
        """Storage dtype of the experts."""
        return self._weights.dtype

    def dtype(self, role: Role, layer: int | None = None, expert: int | None = None) -> torch.dtype:
        """Storage dtype of a tensor."""
        name = self.name(role, layer, expert)
        if name in self.overlay:
            return self.overlay[name].dtype
        return self.expert_dtype if role.is_expert else self._weights.dtype_of(role, layer)

    def with_overlay(self, overlay: Mapping[str, torch.Tensor]) -> Student:
        """The same student with these tensors in place of its own, and with adapters on top of them.

        Tensors are read from the overlay, narrower experts put together, and adapters merged, when they are asked for.
        Adapters of an expert that stands on a base take the place of those that it had.
        """
        if holds_narrowed(overlay):
            assert isinstance(self._weights, KeptWeights), "only the source's experts are made narrower"
            overlay = NarrowedExperts(overlay, self.spec, self.name, self._weights.whole_expert)
        if holds_adapters(overlay):
            overlay = AdaptedExperts(overlay, self.spec, self.name, partial(self._under_adapter, overlay))
        below = self.overlay.maps if isinstance(self.overlay, ChainMap) else [self.overlay]
        both = ChainMap(overlay, *below)  # type: ignore[arg-type]  # nothing is written to it
        return Student(self.source, self.experts, both, self._weights)

    def with_originals(self) -> Student:
        """The same student with the source's own experts in place of those that stand on bases."""
        names = {
            self.name(tensor.role, index, expert)
            for index, layer in enumerate(self.spec.blocks)
            if layer.bases is not None
            for tensor in layer.expert_tensors
            for expert in layer.bases.replaced
        }
        return Student(self.source, self.experts, Without(self.overlay, frozenset(names)), self._weights)

    def as_written(self, weights: Weights) -> Student:
        """The same student with a file's numbers in place of all its own, its overlay included."""
        return Student(self.source, self.experts, weights=weights)
