"""Runs a student with few decoder layers' weights in memory at a time, forward and backward.

transformers' own modules do the arithmetic. They are built on the meta device, which holds no weights; a layer gets its
weights from the student, works on all token blocks, and lets them go. A pass computes in float32, the reference, or
in bfloat16 where that is asked for; routers are float32 in both. Experts stay in storage dtype and are converted one
at a time (:mod:`compressors.model.running.experts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from compressors.model.description.gate_order import gates_first
from compressors.model.description.roles import Role
from compressors.model.predictions.head_inputs import finished_logits, head_parts
from compressors.model.running.expert_choice import ExpertChoice, choosing
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.layers import LayerReader, LayerWeights, layer_bytes, refuse_not_finite
from compressors.model.running.masks import SinglePositions, layer_mask
from compressors.model.running.memory import (
    MemoryLimit,
    Placement,
    blocks_at_once,
    give_back_freed,
    place,
    position_chunks,
    positions_at_once,
)
from compressors.model.running.not_finite import not_finite_error
from compressors.model.running.skeleton import Skeleton
from compressors.model.running.trained_experts import TrainedExperts, scaled
from compressors.model.sources.student import Student

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["LayerObserver", "StreamedModel", "TokenGroup", "TrainableTensors", "factors_name"]

TrainableTensors = Mapping[tuple[Role, int | None], torch.Tensor]
"""Tensors by role and layer, without experts; the layer of the final norm is None."""

LayerObserver = Callable[[int, nn.Module], AbstractContextManager[Any]]


def factors_name(role: Role) -> str:
    """The name of the factors of a role's matrix among the trained tensors."""
    return f"{role} factors"


@dataclass(frozen=True)
class TokenGroup:
    """Token blocks that are streamed together, and the observers that watch the layers while they run."""

    tokens_BT: torch.Tensor  # int64; every row is a sequence of its own
    observers: Sequence[LayerObserver] = ()  # each is called with (layer index, layer) and returns a context
    dtype: torch.dtype = torch.float32  # the dtype of the arithmetic


class StreamedModel:
    """A student that runs layer by layer.

    Args:
        student: the source of the weights.
        trainable: float32 tensors that stand in for the student's; gradients reach them.
        factors: float32 [rows, blocks of a row]; they multiply the blocks of matrices, and gradients reach them.
        trained_experts: tensors that stand in for experts' weights, by layer.
        limit: memory that this process may use. It decides how many layers stay in memory after the first visit, and
            whether hidden states lie there or on disk. None: hidden states stay in memory, layers do not.
        check_finite: refuse NaN and infinite weights when a layer is read.
        device: the device on which layers compute; their weights travel there one layer at a time.
        choice: replaces the routers' top-k; it may be changed between passes.

    Raises:
        InputError: with ``check_finite``, a tensor holds a value that is not finite.
    """

    def __init__(
        self,
        student: Student,
        *,
        trainable: TrainableTensors | None = None,
        factors: TrainableTensors | None = None,
        trained_experts: Mapping[int, TrainedExperts] | None = None,
        limit: MemoryLimit | None = None,
        check_finite: bool = False,
        device: torch.device | None = None,
        choice: ExpertChoice | None = None,
    ) -> None:
        self.student = student
        self.spec = student.spec
        self.choice = choice
        self.trainable = dict(trainable or {})
        self.factors = dict(factors or {})
        self.trained_experts = dict(trained_experts or {})
        self.device = device or torch.device("cpu")
        self.limit = limit
        self._check_finite = check_finite
        self._placement: Placement | None = None
        self._reader: LayerReader | None = None
        self._skeleton = Skeleton(student.source.config, student.spec)
        for index, trained in self.trained_experts.items():
            routed = self.spec.layers[index].routed
            assert routed is not None, f"layer {index} has no experts to train"
            experts = self._skeleton.layers[index].get_submodule(routed.experts_module)
            experts.trained = trained  # type: ignore[assignment]
        self._indices = {layer: index for index, layer in enumerate(self._skeleton.layers)}
        if self._skeleton.rotary is not None:
            self._skeleton.rotary.to(self.device)
        self._final_norm_weight = self._read(Role.FINAL_NORM).to(self.device)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states that enter the first layer: [B, T, D]. Reads the rows it needs.

        They are in storage dtype, or in float32 where the model scales them.
        """
        used, positions = tokens_BT.unique(return_inverse=True)
        rows = torch.cat([self._read_rows(token) for token in used.tolist()])
        scale = self.spec.embedding_scale
        return rows[positions] if scale == 1.0 else rows[positions].float() * scale

    @contextmanager
    def layer(self, index: int, weights: LayerWeights, dtype: torch.dtype = torch.float32) -> Iterator[nn.Module]:
        """Yields decoder layer ``index`` with these weights, computing in ``dtype``; drops the weights on leaving."""
        module = self._skeleton.layers[index]
        module.load_state_dict(self._skeleton.state(index, weights, dtype, self.device), assign=True, strict=True)
        module.requires_grad_(False)
        try:
            if self.choice is not None and self.spec.blocks[index].routed is not None:
                with choosing(self.choice, self.spec.blocks[index], index, module):
                    yield module
            else:
                yield module
        finally:
            module.to_empty(device="meta")

    def run_layer(
        self,
        layer: nn.Module,
        hidden_BTD: torch.Tensor,
        place: int | SinglePositions = 0,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """The layer's output for these hidden states, causal within each row: [B, T, D].

        With a cache of the keys and values of earlier positions, the states are those of one position, or the first.

        Args:
            layer: the layer, with its weights.
            hidden_BTD: the states that enter it.
            place: the position of the first state of every row, or the position of each row's only state.
            cache: keys, values and states of earlier positions.
        """
        first_position = place if isinstance(place, int) else place.positions_B[:, None]
        positions = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None] + first_position
        rotary = self._skeleton.position_embeddings(self._indices[layer], hidden_BTD, positions)
        mixer = self.spec.blocks[self._indices[layer]].mixer
        mask = layer_mask(mixer, place, hidden_BTD, is_causal_by_itself=self._skeleton.is_causal_by_itself)
        others: dict[str, Any] = {"attention_mask": mask, self._skeleton.cache_argument: cache}
        if rotary is not None:
            others["position_embeddings"] = rotary
        trained = self._stand_ins(layer, hidden_BTD.dtype)
        output: torch.Tensor = (
            functional_call(layer, trained, hidden_BTD, others) if trained else layer(hidden_BTD, **others)
        )
        return output

    def blocks_at_once(self, dtype: torch.dtype) -> int:
        """Token blocks in one call of a layer; fewer where tokens use more experts than the router's top-k."""
        n_blocks = blocks_at_once(dtype)
        return n_blocks if self.choice is None else max(1, n_blocks * self.spec.top_k // self.choice.n_chosen)

    def reserve(self, sizes: Iterable[int]) -> int | None:
        """Keeps memory for arrays beside a layer, of the first of these sizes that fits: its index, None if none does.

        Further layers stay in memory only if they fit too. Call it before the first pass.
        """
        for index, n_bytes in enumerate(sizes):
            self._placement = None
            if self._place(n_bytes).spill is None:
                return index
        return None

    @torch.no_grad()
    def stream(
        self,
        groups: Sequence[TokenGroup],
        progress: Callable[[int], None] | None = None,
    ) -> list[HiddenStates]:
        """Takes all token blocks of all groups through all layers; each layer is read once.

        Args:
            groups: token blocks, each group with the observers that watch it.
            progress: called with 1 for each finished layer.

        Returns:
            For each group the hidden states after the last layer, before the final norm.

        Raises:
            NotFiniteError: a value is not finite; the message names the layer, and the expert that made it.
        """
        hidden = self.first_states(groups)
        for index in self.advance(groups, hidden, range(self.spec.n_layers)):
            assert index < self.spec.n_layers
            if progress is not None:
                progress(1)
        return hidden

    def first_states(
        self, groups: Sequence[TokenGroup], n_kept: int = 1, *, named: bool = False, spilled: bool = False
    ) -> list[HiddenStates]:
        """The hidden states that enter the first layer; ``n_kept`` such arrays fit the limit, or lie on disk.

        With ``spilled`` they lie on disk wherever there is a limit.
        """
        sizes = [(*group.tokens_BT.shape, self.spec.hidden_size) for group in groups]
        n_bytes = sum(
            blocks * tokens * size * group.dtype.itemsize
            for (blocks, tokens, size), group in zip(sizes, groups, strict=True)
        )
        spill = self._place(n_kept * n_bytes).spill
        if spilled and self.limit is not None:
            spill = self.limit.spill
        return [
            self._embedded(group.tokens_BT, HiddenStates(size, group.dtype, spill, named=named))
            for size, group in zip(sizes, groups, strict=True)
        ]

    @torch.no_grad()
    def advance(self, groups: Sequence[TokenGroup], hidden: Sequence[HiddenStates], layers: range) -> Iterator[int]:
        """Takes the hidden states through these layers, in place; yields each layer's index when it is done.

        The errors are those of :meth:`stream`.
        """
        for index, weights in self._visit(layers):
            for group, states in zip(groups, hidden, strict=True):
                self.run(index, weights, states, states, group.observers)
            yield index

    def weights(self, layers: Sequence[int]) -> Iterator[tuple[int, LayerWeights]]:
        """Yields each layer with its weights, which are valid until the next one is asked for."""
        return self._visit(layers)

    @torch.no_grad()
    def run(
        self,
        index: int,
        weights: LayerWeights,
        source: HiddenStates,
        target: HiddenStates | None,
        observers: Sequence[LayerObserver] = (),
    ) -> None:
        """Runs one layer with these weights over all blocks.

        Args:
            index: the layer's position, which decides its sizes.
            weights: the weights that it computes with.
            source: the states that enter, and the dtype of the arithmetic.
            target: takes its outputs; it may be ``source``. None: they are not kept.
            observers: as in :class:`TokenGroup`.

        Raises:
            NotFiniteError: a value is not finite; the message names the layer, and the expert that made it.
        """
        with self.layer(index, weights, source.dtype) as layer, ExitStack() as stack:
            for observe in observers:
                stack.enter_context(observe(index, layer))
            self._run_all(index, layer, source, target)

    def logits_in_chunks(self, hidden: HiddenStates, positions: slice) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits at these positions of every block, a bounded number at a time.

        Yields:
            (which of the chosen positions, counted through all blocks; their logits, float32 [n, V]).
        """
        for part, _, logits in self.predictions_in_chunks(hidden, positions):
            yield part, logits

    def predictions_in_chunks(
        self, hidden: HiddenStates, positions: slice
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Inputs of the head and logits at these positions of every block, a bounded number at a time.

        Yields:
            (which of the chosen positions, counted through all blocks; inputs [n, D]; logits, float32 [n, V]).
        """
        n_positions = positions.stop - positions.start
        blocks_at_once = max(1, positions_at_once(self.spec.vocab_size) // n_positions)
        with self.head(hidden.dtype) as head:
            for blocks in hidden.groups(blocks_at_once):
                states = hidden.read(blocks)[:, positions].flatten(0, 1)
                for start, part in position_chunks(states, self.spec.vocab_size):
                    first, part = blocks.start * n_positions + start, part.to(self.device)
                    yield slice(first, first + len(part)), self.head_inputs(part).cpu(), head(part).float().cpu()

    @contextmanager
    def head(self, dtype: torch.dtype) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Final norm and head as a function from hidden states [N, D] to logits [N, V] in ``dtype``."""
        if self._reader is not None:
            self._reader.release()  # makes room for the head
        matrix_VD = self._read_head(dtype)
        yield lambda states_ND: finished_logits(functional.linear(self.head_inputs(states_ND), matrix_VD), self.spec)

    def head_inputs(self, states_ND: torch.Tensor) -> torch.Tensor:
        """The inputs of the head: the states after the last layer, normed."""
        norm, trained = self._skeleton.final_norm, self.trainable.get((Role.FINAL_NORM, None))
        weight = self._final_norm_weight if trained is None else trained
        output: torch.Tensor = functional_call(norm, {"weight": weight.to(states_ND.dtype)}, states_ND)
        return output

    def release(self) -> None:
        """Drops all weights; another pass reads them again, and decides again where weights and states lie."""
        self._reader = self._placement = None
        if self.limit is not None:
            give_back_freed()

    def trained(self, layer: int | None) -> dict[tuple[str, int | None], torch.Tensor]:
        """The trainable tensors of a layer, or outside of the layers for None, by name and layer."""
        found: dict[tuple[str, int | None], torch.Tensor] = {
            (role, of): tensor for (role, of), tensor in self.trainable.items() if of == layer
        }
        found |= {(factors_name(role), of): tensor for (role, of), tensor in self.factors.items() if of == layer}
        experts = None if layer is None else self.trained_experts.get(layer)
        return found | ({} if experts is None else {(name, layer): tensor for name, tensor in experts.tensors.items()})

    def _stand_ins(self, module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors that stand in for a layer's weights, by name; autograd needs new ones for each call."""
        index = self._indices.get(module)
        found = {}
        for (role, layer), tensor in self.trainable.items():
            if layer is not None and layer == index:
                described = self.spec.tensor(role, layer)
                tensor = gates_first(tensor) if described.alternates else tensor
                found[described.in_layer] = tensor.to(torch.float32 if described.runs_in_float32 else dtype)
        for (role, layer), factors_RK in self.factors.items():
            if layer is not None and layer == index:
                name = self.spec.tensor(role, layer).in_layer
                found[name] = scaled(module.get_parameter(name), factors_RK).to(dtype)
        return found

    def _embedded(self, tokens_BT: torch.Tensor, states: HiddenStates) -> HiddenStates:
        for blocks in states.groups(blocks_at_once(states.dtype)):
            states.write(blocks, self.embed(tokens_BT[blocks]).to(states.dtype))
        return states

    def _run_all(self, index: int, layer: nn.Module, source: HiddenStates, target: HiddenStates | None) -> None:
        """Writes the layer's output into ``target``, which may be ``source``."""
        for blocks in source.groups(self.blocks_at_once(source.dtype)):
            rows = source.read(blocks).to(self.device)
            output = self.run_layer(layer, rows)
            if not torch.isfinite(output.sum(dtype=torch.float32)) and not torch.isfinite(output).all():
                raise not_finite_error(self.student, index, layer, rows, self.run_layer)
            if target is not None:
                target.write(blocks, output.to("cpu"))

    def _place(self, hidden_bytes: int) -> Placement:
        """The placement of weights and hidden states; the first call decides it for all later ones."""
        if self._placement is None:
            self._placement = place(self.limit, self.spec, layer_bytes(self.student), hidden_bytes)
        return self._placement

    def _visit(self, order: Sequence[int]) -> Iterator[tuple[int, LayerWeights]]:
        if self._reader is None:
            placement = self._place(0)
            self._reader = LayerReader(
                self.student,
                n_resident=placement.n_resident,
                read_ahead=placement.read_ahead,
                check_finite=self._check_finite,
            )
        for index, weights in self._reader.visit(order):
            yield index, weights
            if self.limit is not None:
                give_back_freed()

    def _read(self, role: Role) -> torch.Tensor:
        tensor = self.student.tensor(role)
        if self._check_finite:
            refuse_not_finite(self.student, tensor, role)
        return tensor

    def _read_rows(self, token: int) -> torch.Tensor:
        return self.student.rows(Role.TOKEN_EMBEDDING, None, slice(token, token + 1))

    def _read_head(self, dtype: torch.dtype) -> torch.Tensor:
        """Reads the head in ``dtype``, [V, D], in parts, so that it is in memory only once."""
        matrix_VD = torch.empty(self.spec.vocab_size, self.spec.hidden_size, dtype=dtype)
        for rows in head_parts(len(matrix_VD)):
            matrix_VD[rows] = self.student.rows(Role.HEAD, None, rows)
        if self._check_finite:
            refuse_not_finite(self.student, matrix_VD, Role.HEAD)
        return matrix_VD.to(self.device)
