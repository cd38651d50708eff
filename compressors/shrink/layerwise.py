"""Takes a model through compressing methods, one decoder layer at a time.

One-shot: every layer is judged by the teacher's states of the calibration text. Sequential: each layer is judged by
the states that come out of the compressed layers in front of it (as REAM and llm-compressor do).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from compressors.calibration.statistics import LayerStatistics, StatisticsCollector
from compressors.model.description.gate_order import gates_first, in_turn
from compressors.model.description.roles import Role
from compressors.model.description.spec import NO_MOE, LayerSpec, MoeSize
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.layers import LayerReader, LayerWeights
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.mtp import run_mtp
from compressors.model.running.routers import RoutedCall, watching
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.adapters import adapter_tensors
from compressors.model.sources.narrowed import narrowed_tensors
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.shrink.merge import merged_statistics
from compressors.shrink.moe_block import (
    CompressedBlock,
    Evidence,
    KeptNeurons,
    Method,
    MoeBlock,
    Needs,
    SharedParts,
)

__all__ = ["CompressedLayer", "LayerTarget", "LayerwiseCompression"]


@dataclass(frozen=True)
class LayerTarget:
    """The target for one of the teacher's decoder layers."""

    source: int  # the teacher's layer
    size: MoeSize  # the size of its experts in the end
    methods: tuple[Method, ...] = ()  # applied in turn
    keeps_parts: bool = False  # experts that the last method made of bases and adapters stay apart in the overlay

    @property
    def needs(self) -> Needs:
        """The evidence that its methods need."""
        return max((method.needs for method in self.methods), default=Needs.STATISTICS)

    def placeholder(self, size: MoeSize) -> LayerMap:
        """A map of the layer to experts of this size, chosen arbitrarily."""
        return LayerMap(self.source, tuple((expert,) for expert in range(size.n_experts)), size.expert_width or None)


@dataclass(frozen=True)
class CompressedLayer:
    """The result for one layer."""

    map: LayerMap
    overlay: dict[str, torch.Tensor]  # the tensors that changed, by their name in the student


class LayerwiseCompression:
    """Applies the targets' methods to a checkpoint.

    Args:
        source: the teacher.
        targets: the student's layers, in order, the one for MTP last; the teacher's others are dropped.
        statistics: the teacher's statistics by layer; sequential mode gathers its own.
        tokens_BT: calibration text: all of it in sequential mode, else a sample if a method needs inputs.
        n_sample_blocks: the number of first blocks that give the inputs for methods.
        sequential: see above.
        limit: memory that this process may use.
        dtype: the dtype in which layers run; methods compute in float32.
        device: the device on which layers compute.
    """

    def __init__(
        self,
        source: Source,
        targets: Sequence[LayerTarget],
        statistics: Sequence[LayerStatistics],
        tokens_BT: torch.Tensor,
        *,
        n_sample_blocks: int,
        sequential: bool = False,
        limit: MemoryLimit | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self._targets = targets
        self._statistics = statistics
        self._tokens_BT = tokens_BT if sequential else tokens_BT[:n_sample_blocks]
        self._n_sample_blocks = n_sample_blocks
        self._sequential = sequential
        self._limit = limit
        self._dtype = dtype
        self._device = device
        whole = [NO_MOE if target.size == NO_MOE else source.spec.blocks[target.source].moe for target in targets]
        self._before = self._student(source, whole)

    def run(self) -> Iterator[CompressedLayer]:
        """Yields every layer of the student when it is done.

        Raises:
            InputError: a method's fields do not fit the layer, or a weight or a state is not finite.
        """
        if self._sequential or max(target.needs for target in self._targets) == Needs.INPUTS:
            yield from self._run_with_text()
        else:
            yield from self._run_without_text()

    def _run_without_text(self) -> Iterator[CompressedLayer]:
        """Reads only the layers whose weights a method looks at."""
        looked_at = [index for index, target in enumerate(self._targets) if target.needs >= Needs.WEIGHTS]
        read = LayerReader(self._before, n_resident=0, read_ahead=False, check_finite=True).visit(looked_at)
        for index in range(len(self._targets)):
            weights = next(read)[1] if index in looked_at else self._without_values(index)
            yield self._compress(index, weights, self._teacher_statistics(index), _Inputs())[0]

    def _run_with_text(self) -> Iterator[CompressedLayer]:
        model = StreamedModel(self._before, limit=self._limit, check_finite=True, device=self._device)
        after = self._model_of_final_sizes() if self._sequential else None
        (states,) = model.first_states([TokenGroup(self._tokens_BT, dtype=self._dtype)])
        for index, weights in model.weights(range(len(self._targets))):
            inputs = _MoeInputs(self._before, self._n_sample_blocks * self._tokens_BT.shape[1])
            if index == self._before.spec.n_layers:
                yield self._compress_mtp(model, weights, states, inputs)
                continue
            if after is None:
                model.run(index, weights, states, states, [inputs.observe])
                yield self._compress(index, weights, self._teacher_statistics(index), inputs.take())[0]
                continue
            collector = StatisticsCollector(self._before.spec, self._device)
            model.run(index, weights, states, None, [inputs.observe, collector.observe])
            layer, block = self._compress(index, weights, collector.take(index), inputs.take())
            _advance(after, index, weights, block, states)
            yield layer

    def _compress_mtp(
        self, model: StreamedModel, weights: LayerWeights, states: HiddenStates, inputs: _MoeInputs
    ) -> CompressedLayer:
        """Compresses the layer for MTP by the states behind the decoder layers."""
        collector, index = StatisticsCollector(self._before.spec, self._device), self._before.spec.n_layers
        run_mtp(model, weights, self._tokens_BT, states, observers=[inputs.observe, collector.observe])
        statistics = collector.take(index) if self._sequential else self._teacher_statistics(index)
        return self._compress(index, weights, statistics, inputs.take())[0]

    def _compress(
        self, index: int, weights: LayerWeights, statistics: LayerStatistics, inputs: _Inputs
    ) -> tuple[CompressedLayer, MoeBlock | None]:
        """Applies the methods to a layer; the block is None where there are no routed experts."""
        target, original = self._targets[index], self._before.spec.blocks[index]
        if target.size == NO_MOE:
            return CompressedLayer(LayerMap(target.source, ()), {}), None
        result = CompressedBlock.unchanged(_block(original, weights))
        for method in target.methods:
            merged = merged_statistics(statistics, result.groups)
            evidence = Evidence(merged, inputs.of_experts_TD, inputs.of_router_TD)
            result = _then(result, method(result.block, evidence))
        size = MoeSize(result.block.n_experts, result.block.width)
        assert size == target.size, f"layer {target.source} became {size}, not {target.size}"
        width = None if size.expert_width == original.expert_width else size.expert_width
        parts = result.parts if target.keeps_parts else None
        shared = None if parts is None else parts.shared
        overlay = self._overlay(index, result, frozenset() if shared is None else frozenset(shared.replaced))
        if parts is not None:
            overlay |= self._overlay_of_parts(index, parts)
        return CompressedLayer(LayerMap(target.source, result.groups, width, shared), overlay), result.block

    def _without_values(self, index: int) -> LayerWeights:
        """A layer without values, for methods that look at no weight."""
        layer = self._before.spec.blocks[index]
        with torch.device("meta"):
            return LayerWeights(
                torch.empty(layer.n_experts, layer.expert_input_rows, layer.expert_size),
                torch.empty(layer.n_experts, layer.expert_size, layer.expert_width),
                {
                    tensor.role: torch.empty(layer.dimensions(tensor))
                    for tensor in layer.shared_tensors
                    if tensor.experts_axis is not None
                },
            )

    def _overlay(self, index: int, result: CompressedBlock, in_parts: frozenset[int]) -> dict[str, torch.Tensor]:
        """Returns the changed tensors: routers stay float32; experts, but those ``in_parts``, go to storage dtype."""
        student, block, dtype = self._before, result.block, self._before.source.dtype
        overlay: dict[str, torch.Tensor] = {}
        if result.router_changed:
            overlay |= {student.name(role, index): values.contiguous() for role, values in _of_router(block).items()}
        if result.changed_experts:
            overlay |= {student.name(role, index): values.to(dtype) for role, values in _expert_biases(block).items()}
            overlay |= {student.name(role, index): values.contiguous() for role, values in _scales(block).items()}
        for expert in sorted(result.changed_experts - in_parts):
            kept = result.narrowed.get(expert)
            if kept is not None:
                overlay |= narrowed_tensors(
                    student.name(Role.EXPERT_DOWN, index, expert),
                    kept.neurons,
                    kept.correction_RM,
                    block.down(expert).to(dtype) if kept.has_own_down else None,
                )
                continue
            projections = dict(zip(self._input_roles(index), block.input_matrices(expert), strict=True))
            projections[Role.EXPERT_DOWN] = block.down(expert)
            overlay |= {
                student.name(role, index, expert): values.to(dtype).contiguous() for role, values in projections.items()
            }
        return overlay

    def _overlay_of_parts(self, index: int, parts: SharedParts) -> dict[str, torch.Tensor]:
        """Returns the bases in storage dtype, and the adapters of the experts that stand on them, float32."""
        student, of_inputs = self._before, self._input_roles(index)
        overlay = {
            student.base_name(role, index, base): matrix.contiguous()
            for base, matrices in enumerate(parts.bases)
            for role, matrix in zip((*of_inputs, Role.EXPERT_DOWN), matrices, strict=True)
        }
        for expert, (*pairs, down) in parts.adapters.items():
            for role, of_role in ((of_inputs[0], pairs), (Role.EXPERT_DOWN, [down])):
                factors = (torch.stack(factor) for factor in zip(*of_role, strict=True))
                overlay |= adapter_tensors(student.name(role, index, expert), *factors)
        return overlay

    def _input_roles(self, index: int) -> tuple[Role, ...]:
        routed = self._before.spec.blocks[index].routed
        assert routed is not None, f"layer {index} has no experts"
        return routed.input_roles

    def _teacher_statistics(self, index: int) -> LayerStatistics:
        return self._statistics[self._targets[index].source]

    def _student(self, source: Source, sizes: Sequence[MoeSize]) -> Student:
        layers = [target.placeholder(size) for target, size in zip(self._targets, sizes, strict=True)]
        mtp = layers.pop() if layers[-1].source == source.spec.n_layers else None
        return Student(source, ExpertMap(source.spec.n_experts, tuple(layers), mtp))

    def _model_of_final_sizes(self) -> StreamedModel:
        """A model with decoder layers of the student's sizes, which runs with given weights."""
        student = self._student(self._before.source, [target.size for target in self._targets])
        return StreamedModel(student, device=self._device)


def _block(layer: LayerSpec, weights: LayerWeights) -> MoeBlock:
    """A layer's router and routed experts."""
    assert layer.routed is not None
    vectors = {role: values.float() for role, values in weights.others.items() if role in _BLOCK_ROLES}
    gate_up_bias_EF = vectors.get(Role.EXPERT_GATE_UP_BIAS)
    return MoeBlock(
        vectors[Role.ROUTER],
        weights.gate_up_EFD,
        weights.down_EDF,
        layer.routed.top_k,
        layer.routed.routing,
        layer.routed.glu,
        vectors.get(Role.ROUTER_BIAS),
        vectors.get(Role.SELECTION_BIAS),
        None if gate_up_bias_EF is None else gates_first(gate_up_bias_EF),
        vectors.get(Role.EXPERT_DOWN_BIAS),
        vectors.get(Role.EXPERT_SCALE),
    )


_ROUTER_ROLES = (Role.ROUTER, Role.ROUTER_BIAS, Role.SELECTION_BIAS)
_BLOCK_ROLES = (*_ROUTER_ROLES, Role.EXPERT_GATE_UP_BIAS, Role.EXPERT_DOWN_BIAS, Role.EXPERT_SCALE)


def _of_router(block: MoeBlock) -> dict[Role, torch.Tensor]:
    """The tensors of a block's router by role, float32."""
    tensors = (block.router_ED, block.router_bias_E, block.selection_bias_E)
    return {role: tensor for role, tensor in zip(_ROUTER_ROLES, tensors, strict=True) if tensor is not None}


def _expert_biases(block: MoeBlock) -> dict[Role, torch.Tensor]:
    """The experts' biases by role, in the order of files; none where the experts have none."""
    if block.gate_up_bias_EF is None or block.down_bias_ED is None:
        return {}
    biases = {Role.EXPERT_GATE_UP_BIAS: in_turn(block.gate_up_bias_EF), Role.EXPERT_DOWN_BIAS: block.down_bias_ED}
    return {role: values.contiguous() for role, values in biases.items()}


def _scales(block: MoeBlock) -> dict[Role, torch.Tensor]:
    """The experts' scales by role, float32; none where there are none."""
    return {} if block.expert_scale_E is None else {Role.EXPERT_SCALE: block.expert_scale_E}


def _then(first: CompressedBlock, second: CompressedBlock) -> CompressedBlock:
    """Joins two methods' results; the second one's numbers are those of the first one's experts."""
    groups = tuple(tuple(member for one in group for member in first.groups[one]) for group in second.groups)
    changed = {
        number
        for number, group in enumerate(second.groups)
        if number in second.changed_experts or first.changed_experts.intersection(group)
    }
    router_changed = first.router_changed or second.router_changed
    narrowed = _narrowed(first, second)
    return CompressedBlock(second.block, groups, frozenset(changed), router_changed, second.parts, narrowed)


def _narrowed(first: CompressedBlock, second: CompressedBlock) -> dict[int, KeptNeurons]:
    """The experts that one of two methods made narrower, and the other left as they were, by their last number."""
    found: dict[int, KeptNeurons] = {}
    for number, group in enumerate(second.groups):
        before = group[0]
        if number in second.narrowed and len(group) == 1 and before not in first.changed_experts:
            found[number] = second.narrowed[number]
        if before in first.narrowed and len(group) == 1 and number not in second.changed_experts:
            found[number] = first.narrowed[before]
    return found


def _advance(
    model: StreamedModel, index: int, weights: LayerWeights, block: MoeBlock | None, states: HiddenStates
) -> None:
    """Takes the states through the layer with its compressed block."""
    if block is not None:
        others = weights.others | _of_router(block) | _expert_biases(block) | _scales(block)
        dtype = weights.gate_up_EFD.dtype
        weights = LayerWeights(block.gate_up_EFD.to(dtype), block.down_EDF.to(dtype), others)
    model.run(index, weights, states, states)


@dataclass(frozen=True)
class _Inputs:
    """The inputs of a layer's experts and router, float32 [T, D]."""

    of_experts_TD: torch.Tensor | None = None
    of_router_TD: torch.Tensor | None = None  # None: the same


class _MoeInputs:
    """Keeps the inputs of router and experts for the first tokens, in float32."""

    def __init__(self, student: Student, n_tokens: int) -> None:
        self._student = student
        self._n_missing = n_tokens
        self._of_experts: list[torch.Tensor] = []
        self._of_router: list[torch.Tensor] = []  # where it reads other values

    @contextmanager
    def observe(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Watches one layer while it runs."""
        routed = self._student.spec.blocks[index].routed
        if routed is None:
            yield
            return

        def see(call: RoutedCall) -> None:
            self._of_experts.append(call.hidden_TD[: self._n_missing].to("cpu", torch.float32, copy=True))
            if not routed.router_reads_the_same:
                self._of_router.append(call.router_input_TD[: self._n_missing].to("cpu", torch.float32, copy=True))
            self._n_missing -= len(self._of_experts[-1])

        with watching(layer, routed, see):
            yield

    def take(self) -> _Inputs:
        """Returns the inputs; there are none where there are no routed experts."""
        found = (torch.cat(parts) if parts else None for parts in (self._of_experts, self._of_router))
        return _Inputs(*found)
