"""The arms: each removes a share of the expert bytes in one way, and is trained in one way or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.quality.methods import Teacher
from compressors.model.description.roles import Role
from compressors.model.description.spec import MoeSize
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.integer_blocks import BlockType
from compressors.model.sources.student import ExpertMap, Student
from compressors.recover.scopes import Scope
from compressors.sensitivity import Quantizer, ggml_quantizer
from compressors.sensitivity.quantizers import blocks_quantizer
from compressors.shrink.allocation import allocate_globally
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from compressors.shrink.merge import REAM
from compressors.shrink.moe_block import Method
from compressors.shrink.prune import Prune
from compressors.shrink.replace import bases_by_layer, replacement_for
from compressors.shrink.replace.light_moe import LightMoE
from compressors.shrink.replace.selection import parts_of_change, replaced_by_layer
from compressors.shrink.slim.width import SlimWidth

__all__ = ["ARMS", "COARSER", "LIGHT", "NO_ANNEAL", "NO_GROUPING", "NO_SELECTION", "PLAIN", "REAP_BY_CHANGE", "SHARES"]
__all__ += ["Arm", "pruned_evenly", "removed"]

SHARES = (0.3, 0.5)
"""Shares of the expert bytes that are to go."""

_SAMPLE_BLOCKS = 16
_FADE = 0.5
_EXPERTS_RATE = 1e-3  # the best of a sweep on a selection split (benchmarks/results/recovery.md)
_ROUTER_RATE = 3e-3
_NORMS_RATE = 3e-4
_GOOD_START_RATE = 3e-4  # narrow experts and those chosen by their parts of the change start well; 1e-3 ruins them

_FEWER_BITS: Mapping[float, Quantizer] = {
    0.3: ggml_quantizer(GGMLQuantizationType.Q5_0),
    0.5: blocks_quantizer(BlockType(4, 64)),
}
"""All experts at 5.5 and 4.25 bits, 0.65 and 0.5 of 8.5 bits: as large as the others' at 8 bits, or smaller."""

Build = Callable[[Teacher, float], Student]


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        name: its name.
        build: makes the student.
        scope: what is trained; None: nothing.
        rate: the learning rate.
        fade: the part of the steps over which originals fade out.
        shares: the shares at which it is measured.
    """

    name: str
    build: Build
    scope: Scope | None = None
    rate: float = 0.0
    fade: float = 0.0
    shares: tuple[float, ...] = SHARES


def removed(student: Student) -> float:
    """The share of the experts' values that a student does without."""
    teacher = student.source.spec
    before = sum(layer.n_experts * layer.expert_parameters for layer in teacher.layers)
    left = 0
    for layer in student.spec.layers:
        n_whole = layer.n_experts
        if layer.bases is not None:
            n_whole -= len(layer.bases.replaced)
            left += sum(layer.bases.n_values(*layer.dimensions(tensor)) for tensor in layer.expert_tensors)
        left += n_whole * layer.expert_parameters
    return 1 - left / before


def _light(*, selects: bool, groups: bool) -> Build:
    def build(teacher: Teacher, share: float) -> Student:
        spec, numbers = teacher.spec, replacement_for(share, teacher.spec)
        counts = _even(numbers.n_replaced, spec.n_layers)
        if selects:
            counts = replaced_by_layer(teacher.statistics, numbers.n_replaced, numbers.n_bases)
        bases = bases_by_layer(counts, numbers.n_bases)
        methods = [
            LightMoE(count, n_bases, numbers.rank, selects, groups) if count else None
            for count, n_bases in zip(counts, bases, strict=True)
        ]
        return _compressed(teacher, [spec.layers[0].moe] * spec.n_layers, methods)

    return build


def _fewer(method: Callable[[int], Method], teacher: Teacher, share: float) -> Student:
    """Layers keep numbers of experts that differ by one at most."""
    spec = teacher.spec
    counts = _even(round(spec.n_layers * spec.n_experts * (1 - share)), spec.n_layers)
    sizes = [MoeSize(count, spec.expert_width) for count in counts]
    return _compressed(teacher, sizes, [method(count) for count in counts])


def pruned_evenly(teacher: Teacher, n_kept: int) -> Student:
    """REAP with the same number of experts in each layer."""
    sizes = [MoeSize(n_kept, teacher.spec.expert_width)] * teacher.spec.n_layers
    return _compressed(teacher, sizes, [Prune("reap", n_kept)] * teacher.spec.n_layers)


def _pruned_by_change(teacher: Teacher, share: float) -> Student:
    """REAP with the layers' numbers by LightMoE's rule: the experts with the least parts of the change go."""
    spec = teacher.spec
    n_kept = round(spec.n_layers * spec.n_experts * (1 - share))
    counts = allocate_globally(parts_of_change(teacher.statistics), n_kept, spec.top_k)
    return _compressed(
        teacher, [MoeSize(count, spec.expert_width) for count in counts], [Prune("reap", count) for count in counts]
    )


def _narrower(teacher: Teacher, share: float) -> Student:
    spec, width = teacher.spec, round(teacher.spec.expert_width * (1 - share))
    return _compressed(teacher, [MoeSize(spec.n_experts, width)] * spec.n_layers, [SlimWidth(width)] * spec.n_layers)


def _coarser(teacher: Teacher, share: float) -> Student:
    """All experts at fewer bits."""
    original = Student.teacher(teacher.source)
    return original.with_overlay(dict(_quantized(original, _FEWER_BITS[share])))


def _quantized(student: Student, quantize: Quantizer) -> Iterator[tuple[str, torch.Tensor]]:
    for index, layer in enumerate(student.spec.layers):
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            for expert in range(layer.n_experts):
                name = student.name(role, index, expert)
                yield name, quantize(student.expert(role, index, expert).float(), None, name).to(student.expert_dtype)


def _compressed(teacher: Teacher, sizes: Sequence[MoeSize], methods: Sequence[Method | None]) -> Student:
    targets = [
        LayerTarget(layer, size, () if method is None else (method,), keeps_parts=True)
        for layer, (size, method) in enumerate(zip(sizes, methods, strict=True))
    ]
    compression = LayerwiseCompression(
        teacher.source, targets, teacher.statistics, teacher.tokens_BT, n_sample_blocks=_SAMPLE_BLOCKS
    )
    layers = list(compression.run())
    overlay = {name: tensor for layer in layers for name, tensor in layer.overlay.items()}
    experts = ExpertMap(teacher.spec.n_experts, tuple(layer.map for layer in layers))
    return Student(teacher.source, experts).with_overlay(overlay)


def _even(total: int, n_layers: int) -> list[int]:
    return [total // n_layers + (layer < total % n_layers) for layer in range(n_layers)]


LIGHT, PLAIN, NO_ANNEAL = "LightMoE", "plain replacing", "LightMoE without anneal"
NO_SELECTION, NO_GROUPING = "LightMoE without selection", "LightMoE without grouping"
COARSER = "all experts at fewer bits"
_REAP, _REAM, _SLIM = "REAP", "REAM", "SlimWidth"
REAP_BY_CHANGE = "REAP, layers as in LightMoE"


def _arms() -> Iterator[Arm]:
    light, plain = _light(selects=True, groups=True), _light(selects=False, groups=True)
    ungrouped = _light(selects=True, groups=False)
    prune, merge = partial(_fewer, partial(Prune, "reap")), partial(_fewer, REAM)
    parts, experts = Scope.replaced_experts(), Scope.all_experts()
    trained = [
        Arm(LIGHT, light, parts, _GOOD_START_RATE, _FADE),
        Arm(PLAIN, plain, parts, _EXPERTS_RATE),
        Arm(NO_ANNEAL, light, parts, _GOOD_START_RATE),
        Arm(f"{_REAP}, experts trained", prune, experts, _EXPERTS_RATE),
        Arm(f"{_SLIM}, experts trained", _narrower, experts, _GOOD_START_RATE),
        Arm(f"{_REAP}, Router KD", prune, Scope.routers(), _ROUTER_RATE),
        Arm(f"{_REAM}, experts trained", merge, experts, _EXPERTS_RATE),
        Arm(f"{REAP_BY_CHANGE}, experts trained", _pruned_by_change, experts, _GOOD_START_RATE),
        Arm(f"{COARSER}, norms trained", _coarser, Scope.routers_and_norms(), _NORMS_RATE),
        Arm(NO_SELECTION, plain, parts, _EXPERTS_RATE, _FADE, (0.5,)),
        Arm(NO_GROUPING, ungrouped, parts, _GOOD_START_RATE, _FADE, (0.5,)),
    ]
    untrained = [
        Arm(LIGHT, light), Arm(PLAIN, plain), Arm(_REAP, prune), Arm(_SLIM, _narrower), Arm(_REAM, merge),
        Arm(REAP_BY_CHANGE, _pruned_by_change), Arm(COARSER, _coarser), Arm(NO_GROUPING, ungrouped, shares=(0.5,)),
    ]  # fmt: skip
    yield from (replace(arm, name=f"{arm.name}, not trained") for arm in untrained[:1])
    yield from trained[:5]
    yield from (replace(arm, name=f"{arm.name}, not trained") for arm in untrained[1:])
    yield from trained[5:]


ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _arms()}
"""The arms by name, the most telling first, so that a run that is cut off is still useful."""
