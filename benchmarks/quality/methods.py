"""The arms of the comparison: each removes a share of a teacher's expert parameters, in one way.

An arm builds a student with the code that the compress stage runs. Recipes name the same methods; the others (the
published arms without a gain in size, the removal error's global allocation) are built here from their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from benchmarks.arms import Awq, Gptq, RoundToNearest, SparseGpt, Wanda
from benchmarks.arms.accounting import ExpertShape, d2_moe_size, mobe_size, rank_for_share, svd_size
from compressors.calibration.statistics import LayerStatistics
from compressors.model.description.roles import Role
from compressors.model.description.spec import NO_MOE, ModelSpec, MoeSize
from compressors.model.errors import InputError
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.shrink.allocation import allocate_globally, super_experts
from compressors.shrink.criteria import CRITERIA, CRITERION_NAMES, REMOVAL_ERROR
from compressors.shrink.decompose import ActivationSvd, D2Moe, Mobe
from compressors.shrink.drop import block_similarities, moe_similarities, most_similar, window_similarities
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from compressors.shrink.merge import REAM, HCSMoE, MSMoE
from compressors.shrink.moe_block import CompressedBlock, Evidence, Method, MoeBlock, Needs
from compressors.shrink.prune import Prune, scores
from compressors.shrink.slim import GGUF_WIDTH_MULTIPLE
from compressors.shrink.slim.width import SlimWidth
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refusal

__all__ = ["ARMS", "FREQUENCY", "SAMPLE_BLOCKS", "SHARES", "TEACHER", "Arm", "Shrunk", "Teacher"]

SHARES = (0.25, 0.5)
"""Shares of the expert parameters that are to go."""

SAMPLE_BLOCKS = 32
"""Calibration blocks whose states methods see that need more than sums."""

MOBE_STEPS = 200
"""Adam steps of MoBE, published with 10,000 to 15,000: as many as a processor can afford here."""

FREQUENCY = "frequency"
TEACHER = "teacher"


@dataclass(frozen=True)
class Teacher:
    """The inputs of every arm."""

    source: Source
    statistics: Sequence[LayerStatistics]
    tokens_BT: torch.Tensor  # calibration text

    @property
    def spec(self) -> ModelSpec:
        """The teacher's."""
        return self.source.spec

    @property
    def expert_shape(self) -> ExpertShape:
        """The sizes of each layer's experts."""
        return ExpertShape(self.spec.n_experts, self.spec.hidden_size, self.spec.expert_width, self.spec.top_k)

    @property
    def sample_BT(self) -> torch.Tensor:
        """The blocks whose states methods see."""
        return self.tokens_BT[:SAMPLE_BLOCKS]


@dataclass(frozen=True)
class Shrunk:
    """The result of an arm."""

    student: Student
    setting: str  # the number that removes the share
    removed: float  # share of the expert parameters that is gone, as counted
    smaller: str  # which files get smaller


Build = Callable[[Teacher, float], Shrunk]


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    name: str
    kind: str
    build: Build
    shares: tuple[float, ...] = SHARES  # 0: a reference that removes no parameters


def _shrunk(student: Student, setting: str) -> Shrunk:
    """A student whose files are as large as its own experts."""
    spec, teacher = student.spec, student.source.spec
    left, before = (
        sum(layer.n_experts * layer.expert_parameters for layer in model.layers) for model in (spec, teacher)
    )
    removed = 1 - left / before
    files = "GGUF, ONNX" if refusal(spec, Container.GGUF) is None else "ONNX"
    if spec.expert_width % GGUF_WIDTH_MULTIPLE:
        files += ", unquantized"
    return Shrunk(student, setting, removed, files)


def _compressed(teacher: Teacher, targets: Sequence[LayerTarget], *, sequential: bool = False) -> Student:
    compression = LayerwiseCompression(
        teacher.source,
        targets,
        teacher.statistics,
        teacher.tokens_BT,
        n_sample_blocks=SAMPLE_BLOCKS,
        sequential=sequential,
    )
    layers: list[LayerMap] = []
    overlay: dict[str, torch.Tensor] = {}
    for layer in compression.run():
        layers.append(layer.map)
        overlay |= layer.overlay
    return Student(teacher.source, ExpertMap(teacher.spec.n_experts, tuple(layers))).with_overlay(overlay)


def _everywhere(teacher: Teacher, size: MoeSize, *methods: Method, sequential: bool = False) -> Student:
    targets = [LayerTarget(layer, size, methods) for layer in range(teacher.spec.n_layers)]
    return _compressed(teacher, targets, sequential=sequential)


def _whole(teacher: Teacher, *methods: Method) -> Student:
    """Experts keep their number and their width."""
    return _everywhere(teacher, MoeSize(teacher.spec.n_experts, teacher.spec.expert_width), *methods)


def _experts_left(teacher: Teacher, share: float) -> int:
    return round(teacher.spec.n_experts * (1 - share))


def _fewer(method: Callable[[int], Method], *, sequential: bool = False) -> Build:
    """Pruning and merging: every layer keeps the same number of experts."""

    def build(teacher: Teacher, share: float) -> Shrunk:
        n_experts = _experts_left(teacher, share)
        size = MoeSize(n_experts, teacher.spec.expert_width)
        student = _everywhere(teacher, size, method(n_experts), sequential=sequential)
        return _shrunk(student, f"{n_experts} of {teacher.spec.n_experts} experts")

    return build


@dataclass
class _RecordScores:
    """Shrinks nothing: it writes down each layer's scores."""

    criterion: str
    found: list[torch.Tensor]
    needs: ClassVar[Needs] = Needs.INPUTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        self.found.append(scores(self.criterion, block, evidence))
        return CompressedBlock.unchanged(block)


def _global(criterion: str) -> Build:
    """The lowest scores of the whole model go; layers keep different numbers."""

    def build(teacher: Teacher, share: float) -> Shrunk:
        if criterion == REMOVAL_ERROR:
            recorder = _RecordScores(criterion, [])
            _whole(teacher, recorder)
            found = recorder.found
        else:
            found = [CRITERIA[criterion](layer) for layer in teacher.statistics]
        n_kept = _experts_left(teacher, share) * teacher.spec.n_layers
        counts = allocate_globally(found, n_kept, teacher.spec.top_k)
        targets = [
            LayerTarget(layer, MoeSize(count, teacher.spec.expert_width), (Prune(criterion, count),))
            for layer, count in enumerate(counts)
        ]
        return _shrunk(_compressed(teacher, targets), f"{', '.join(map(str, counts))} experts")

    return build


def _super_experts_kept(teacher: Teacher, share: float) -> Shrunk:
    n_experts = _experts_left(teacher, share)
    protected = super_experts(teacher.statistics)
    targets = [
        LayerTarget(layer, MoeSize(n_experts, teacher.spec.expert_width), (Prune("reap", n_experts, experts),))
        for layer, experts in enumerate(protected)
    ]
    n_protected = sum(map(len, protected))
    return _shrunk(
        _compressed(teacher, targets), f"{n_experts} of {teacher.spec.n_experts} experts, {n_protected} protected"
    )


def _rows_kept(method: Callable[[int], Method]) -> Build:
    """Merging as published: every router row stays, as an alias of its group's merged expert."""

    def build(teacher: Teacher, share: float) -> Shrunk:
        merged = _fewer(method)(teacher, share)
        aliases = Student.teacher(teacher.source).with_overlay(dict(_aliases(merged.student)))
        return Shrunk(aliases, merged.setting, merged.removed, "no: every row needs an expert")

    return build


def _aliases(merged: Student) -> Iterable[tuple[str, torch.Tensor]]:
    """Each teacher expert's name with its group's merged weights; experts that stand alone are the teacher's own."""
    for index, layer in enumerate(merged.experts.layers):
        for expert, group in enumerate(layer.groups):
            for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
                weights = merged.overlay.get(merged.name(role, index, expert))
                if weights is not None:
                    yield from ((merged.name(role, index, member), weights) for member in group)


def _narrower(teacher: Teacher, share: float) -> Shrunk:
    width = round(teacher.spec.expert_width * (1 - share))
    student = _everywhere(teacher, MoeSize(teacher.spec.n_experts, width), SlimWidth(width))
    return _shrunk(student, f"width {width} of {teacher.spec.expert_width}")


def _fewer_and_narrower(teacher: Teacher, share: float) -> Shrunk:
    """Half of the share goes with whole experts, the rest with neurons."""
    n_experts = _experts_left(teacher, share / 2)
    width = int(teacher.spec.n_experts * teacher.spec.expert_width * (1 - share)) // n_experts
    student = _everywhere(teacher, MoeSize(n_experts, width), Prune("reap", n_experts), SlimWidth(width))
    return _shrunk(student, f"{n_experts} experts, width {width}")


_FACTORS = "no: written multiplied out"


def _factored(student: Student, teacher: Teacher, parameters: int, setting: str) -> Shrunk:
    """``parameters``: of one layer's factors."""
    return Shrunk(student, setting, 1 - parameters / teacher.expert_shape.parameters, _FACTORS)


def _svd(teacher: Teacher, share: float) -> Shrunk:
    size = svd_size(teacher.expert_shape)
    rank = rank_for_share(share, size, teacher.expert_shape)
    return _factored(_whole(teacher, ActivationSvd(rank)), teacher, size.parameters(rank), f"rank {rank}")


def _d2_moe(teacher: Teacher, share: float) -> Shrunk:
    size = d2_moe_size(teacher.expert_shape)
    rank = rank_for_share(share, size, teacher.expert_shape)
    return _factored(_whole(teacher, D2Moe(rank)), teacher, size.parameters(rank), f"base and rank {rank}")


def _mobe(teacher: Teacher, share: float) -> Shrunk:
    """A quarter as many bases as experts: at the published rank, the width, gate and up can hardly be halved."""
    shape = teacher.expert_shape
    n_bases, kept = shape.n_experts // 4, int(shape.parameters * (1 - share))
    ranks = [rank for rank in range(1, shape.full_rank + 1) if mobe_size(shape, rank).parameters(n_bases) <= kept]
    if not ranks:
        raise InputError(f"no rank of {n_bases} bases removes a share of {share:g}")
    student = _whole(teacher, Mobe(n_bases, ranks[-1], steps=MOBE_STEPS))
    parameters = mobe_size(shape, ranks[-1]).parameters(n_bases)
    return _factored(student, teacher, parameters, f"{n_bases} bases, rank {ranks[-1]}, {MOBE_STEPS} steps")


def _sparse(method: Callable[[float], Method], setting: str) -> Build:
    def build(teacher: Teacher, share: float) -> Shrunk:
        return Shrunk(_whole(teacher, method(share)), setting.format(share), share, "no: zeros are stored")

    return build


def _quantized(method: Method) -> Build:
    def build(teacher: Teacher, share: float) -> Shrunk:
        return Shrunk(_whole(teacher, method), "4 bits in groups of 32", share, "by their types: bits, not parameters")

    return build


def _unchanged(teacher: Teacher, share: float) -> Shrunk:
    return Shrunk(Student.teacher(teacher.source), "", share, "")


def _layers_to_drop(teacher: Teacher, share: float) -> int:
    """The nearest number; of two equally near the larger."""
    return int(share * teacher.spec.n_layers + 0.5)


def _drop_moe_layers(teacher: Teacher, share: float) -> Shrunk:
    n_dropped = _layers_to_drop(teacher, share)
    dropped = most_similar(moe_similarities(teacher.statistics), n_dropped, "MoE layers")
    size = MoeSize(teacher.spec.n_experts, teacher.spec.expert_width)
    targets = [LayerTarget(layer, NO_MOE if layer in dropped else size) for layer in range(teacher.spec.n_layers)]
    return _shrunk(_compressed(teacher, targets), f"without experts in {_listed(dropped)}")


def _drop_blocks(teacher: Teacher, share: float) -> Shrunk:
    n_dropped = _layers_to_drop(teacher, share)
    return _without_blocks(teacher, most_similar(block_similarities(teacher.statistics), n_dropped, "blocks"))


def _drop_consecutive_blocks(teacher: Teacher, share: float) -> Shrunk:
    n_dropped = _layers_to_drop(teacher, share)
    similarities = window_similarities(StreamedModel(Student.teacher(teacher.source)), teacher.sample_BT, n_dropped)
    (first,) = most_similar(similarities, 1, "windows")
    return _without_blocks(teacher, range(first, first + n_dropped))


def _without_blocks(teacher: Teacher, dropped: Sequence[int]) -> Shrunk:
    size = MoeSize(teacher.spec.n_experts, teacher.spec.expert_width)
    targets = [LayerTarget(layer, size) for layer in range(teacher.spec.n_layers) if layer not in dropped]
    return _shrunk(_compressed(teacher, targets), f"without {_listed(dropped)} and attention")


def _listed(layers: Sequence[int]) -> str:
    return f"layers {', '.join(map(str, layers))}"


_MERGING: Mapping[str, Callable[[int], Method]] = {"M-SMoE": MSMoE, "HC-SMoE": HCSMoE, "REAM": REAM}

ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(TEACHER, "reference", _unchanged, (0.0,)),
        *(Arm(criterion, "prune", _fewer(partial(Prune, criterion))) for criterion in CRITERION_NAMES),
        Arm("reap, super-experts kept", "prune", _super_experts_kept),
        Arm("reap, sequential", "prune", _fewer(partial(Prune, "reap"), sequential=True)),
        *(
            Arm(f"{criterion}, global", "prune", _global(criterion))
            for criterion in (FREQUENCY, "expert-drop", REMOVAL_ERROR)
        ),
        *(Arm(name, "merge", _fewer(method)) for name, method in _MERGING.items()),
        Arm("REAM, sequential", "merge", _fewer(REAM, sequential=True)),
        *(Arm(f"{name}, router rows kept", "merge", _rows_kept(method)) for name, method in _MERGING.items()),
        Arm("SlimWidth", "slim", _narrower),
        Arm("reap + SlimWidth", "slim", _fewer_and_narrower),
        Arm("Wanda", "sparsity", _sparse(Wanda, "{:.0%} zeros")),
        Arm("SparseGPT", "sparsity", _sparse(SparseGpt, "{:.0%} zeros")),
        Arm("Wanda 2:4", "sparsity", _sparse(partial(Wanda, pattern="2:4"), "2:4"), (0.5,)),
        Arm("SparseGPT 2:4", "sparsity", _sparse(partial(SparseGpt, pattern="2:4"), "2:4"), (0.5,)),
        Arm("activation SVD", "decompose", _svd),
        Arm("D2-MoE", "decompose", _d2_moe),
        Arm("MoBE", "decompose", _mobe),
        Arm("Layer Drop", "drop", _drop_moe_layers),
        Arm("Block Drop", "drop", _drop_blocks),
        Arm("Block Drop, consecutive", "drop", _drop_consecutive_blocks),
        Arm("round to nearest", "reference", _quantized(RoundToNearest()), (0.0,)),
        Arm("AWQ", "reference", _quantized(Awq()), (0.0,)),
        Arm("GPTQ", "reference", _quantized(Gptq()), (0.0,)),
    )
}
"""The arms by name; frequency pruning, with which the others are compared, comes first after the teacher."""
