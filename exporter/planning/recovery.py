"""The recovery ladder: chooses the rungs that a machine can climb, and translates a recipe's rung for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import Kind, TensorSpec
from compressors.model.errors import InputError
from compressors.recover.schedule import RATES_HIDDEN_SIZE, UPDATES_PER_BATCH, Schedule
from compressors.recover.scopes import BlockLength, Scope
from compressors.recover.training_memory import refuse_too_large
from compressors.shrink.registry import LIGHT_MOE
from exporter.planning.recipe import CompressChoice, RecoverChoice, RungChoice

__all__ = [
    "CALIBRATION_BLOCKS",
    "RECOVERIES",
    "WRITTEN_ITEMSIZE",
    "Machine",
    "RefusedRung",
    "after_quantizing_name",
    "check_after_quantizing",
    "choose_ladder",
    "is_after_quantizing",
    "schedule_of",
    "scope_of",
    "trained_roles",
    "tuning_rung",
    "wish_for",
]

_BESIDE_CODES = ", beside the codes of "

CALIBRATION_BLOCKS = 320
"""Blocks of the calibration text that statistics and recovery see: 163,840 tokens."""

_BLOCKS_PER_STEP = 8  # as published
_SMALL_STEP = 2
"""Blocks in a step where small steps cost no more: four times as many steps help more than longer ones. They cost more
if a model does not stay in memory, as each step reads it, and if a student writes the texts, as fewer are written at a
time."""

_LOSSES: Mapping[str, Sequence[str]] = {
    "router": ("kd", "next-token", "router-logits", "ka", "sar"),
    "top-experts": ("kd", "next-token", "ka", "sar"),
    "experts": ("kd", "next-token", "ka", "sar"),
    "adapters": ("kd", "next-token", "ka", "sar"),
    "replaced": ("kd", "next-token"),
    "norms": ("kd", "next-token"),
    "all": ("kd", "next-token"),
}

RECOVERIES = (
    *("auto", "none", "router:published"),
    *_LOSSES,
    *(f"{scope}:{loss}" for scope, losses in _LOSSES.items() for loss in losses),
)
"""Values of ``--recover``: the ladder, nothing, the published schedule, or one rung, ``SCOPE`` or ``SCOPE:LOSS``."""

_RATES = {"router": 3e-3, "top-experts": 1e-3, "experts": 1e-3, "adapters": 3e-3, "replaced": 3e-4}
"""Learning rates chosen on a selection split (docs/recovery.md), for a model of ``RATES_HIDDEN_SIZE``."""

_FADE = 0.5
"""Part of the steps over which originals fade out beside the experts that replace them (docs/lightmoe.md)."""

_SCOPES = {
    "router": Scope.routers(),
    "experts": Scope.all_experts(),
    "replaced": Scope.replaced_experts(),
    "norms": Scope.routers_and_norms(),
    "scales": Scope.block_scales(),
    "all": Scope.everything(),
}

WRITTEN_ITEMSIZE = 4
"""Bytes of a written file's weight during computation."""

_TOP_EXPERTS = 8  # in each layer, as in the smallest wider scope of arXiv 2609.06076
_ADAPTER_RANKS = (8, 4, 2, 1)
_STREAMED_BATCHES_PER_ROUND = 8  # for a live teacher that is read from the disk for each round


@dataclass(frozen=True)
class Machine:
    """The resources that training may use."""

    memory_bytes: int
    calibration_blocks: int  # blocks that the text yields
    models_stay: bool  # True if models stay in memory once they are read


@dataclass(frozen=True)
class RefusedRung:
    """A rung that was not tried."""

    rung: str
    loss: str
    why: str


def choose_ladder(
    wish: str, student: ModelSpec, itemsize: int, machine: Machine, seed: int
) -> tuple[RecoverChoice, tuple[RefusedRung, ...]]:
    """Chooses the rungs that a value of ``--recover`` means for this student on this machine.

    ``auto`` trains the routers, and then routers and experts together; for a dense student, only the feed-forwards. A
    rung whose training does not fit the memory is replaced by adapters of the largest rank that fits.

    Args:
        wish: one of :data:`RECOVERIES`.
        student: the compressed model.
        itemsize: bytes of a stored weight.
        machine: the resources that training may use.
        seed: seed of the order of blocks, and of the adapters' initial values.

    Returns:
        The recipe's choice, and the rungs that were refused.
    """
    rungs: list[RungChoice] = []
    refused: list[RefusedRung] = []
    for rung in _wanted(wish, student, machine):
        candidates = [rung]
        if rung.scope in ("top-experts", "experts", "all"):
            candidates += [_adapters(rung, rank, student) for rank in _ADAPTER_RANKS]
        for candidate in candidates:
            reason = _obstacle(candidate, student, itemsize, machine.memory_bytes)
            if reason is None:
                rungs.append(candidate)
                break
            refused.append(RefusedRung(scope_of(candidate).name_in(student), candidate.loss, reason))
    return RecoverChoice(rungs=tuple(rungs), seed=seed), tuple(refused)


def wish_for(wish: str, compress: CompressChoice) -> str:
    """Replaces ``auto`` by ``all`` where experts of a MoE student are narrower, or by what keeps bases shared.

    Other values stay.

    Narrow experts start well, because their down projections compensate for the cut neurons: they get one rung, of all
    tensors, at a rate by their divergence (:mod:`exporter.planning.rates`). The rate that pruned experts need would
    ruin them.
    """
    if wish == "auto" and compress.apart:
        return "replaced" if compress.edit == LIGHT_MOE.name else "router"
    is_narrow = compress.width is not None and compress.student == "moe"
    return "all" if wish == "auto" and is_narrow else wish


def tuning_rung(student: ModelSpec, machine: Machine, block_lengths: Sequence[BlockLength]) -> RungChoice | None:
    """The rung beside written files: block scales, norms and routers, without scales where these do not fit the memory.

    Args:
        student: the compressed model.
        machine: the resources that training may use.
        block_lengths: block lengths of each file (:func:`~exporter.estimating.planned_types.planned_block_length`).

    Returns:
        None if not even norms can be trained.
    """
    for scope in ("scales", "norms"):
        rung = _rung(scope, "kd", student, machine)
        try:
            for block_length in block_lengths:
                refuse_too_large(scope_of(rung), student, WRITTEN_ITEMSIZE, machine.memory_bytes, block_length)
        except InputError:
            continue
        return rung
    return None


def check_after_quantizing(choice: RecoverChoice, student: ModelSpec) -> None:
    """Refuses to train routers that no file has.

    Raises:
        InputError: the student is dense.
    """
    rung = choice.after_quantizing
    if rung is not None and rung.scope == "router" and not student.written.n_experts:
        raise InputError(
            "the recipe's after_quantizing teaches the routers of the written files, but those of a dense student have "
            "none: set it to null, or its scope to norms or scales"
        )


def after_quantizing_name(rung: RungChoice, student: ModelSpec, files: str = "each file") -> str:
    """The name, in plan and report, of the rung that tunes these written files."""
    return scope_of(rung).name_in(student) + _BESIDE_CODES + files


def is_after_quantizing(name: str) -> bool:
    """True if a rung's name is an :func:`after_quantizing_name`."""
    return _BESIDE_CODES in name


def scope_of(rung: RungChoice) -> Scope:
    """The scope of the tensors that a rung trains."""
    if rung.scope == "adapters":
        assert rung.rank is not None, "the recipe checks it"
        return Scope.adapters(rung.rank)
    if rung.scope == "top-experts":
        assert rung.experts is not None, "the recipe checks it"
        return Scope.most_used(rung.experts)
    return _SCOPES[rung.scope]


def schedule_of(choice: RecoverChoice, rung: RungChoice, n_blocks: int) -> Schedule:
    """A rung's schedule, with the number of blocks that the time limit allows.

    Its rate is 0 where the rung leaves that to the student's divergence.
    """
    return Schedule(
        n_blocks,
        rung.learning_rate or 0.0,
        min(rung.blocks_per_step, n_blocks),
        seed=choice.seed,
        fade_ratio=rung.fade,
        updates_per_batch=UPDATES_PER_BATCH if rung.loss == "ka" else 1,
    )


def trained_roles(name: str, spec: ModelSpec) -> frozenset[Role]:
    """Roles whose tensors a rung changes.

    Args:
        name: the rung's name in plan or report.
        spec: the student.
    """
    parts = [is_trained for part, is_trained in _TRAINED.items() if part in name]
    return frozenset(tensor.role for tensor, _ in spec.places if any(is_trained(tensor) for is_trained in parts))


def _is_of_mixer(tensor: TensorSpec) -> bool:
    return tensor.kind is Kind.MATRIX and not tensor.role.is_feed_forward


def _is_of_expert(tensor: TensorSpec) -> bool:
    return tensor.is_per_expert


_TRAINED: Mapping[str, Callable[[TensorSpec], bool]] = {
    "router": lambda tensor: tensor.kind is Kind.ROUTER,
    "norms": lambda tensor: tensor.kind is Kind.NORM,
    "attention": _is_of_mixer,
    "block scales": lambda tensor: _is_of_mixer(tensor) or _is_of_expert(tensor),
    "experts": _is_of_expert,
    "adapters": _is_of_expert,
    "bases and adapters": _is_of_expert,
    "feed-forwards": _is_of_expert,
}
"""Functions that tell whether a tensor is trained, by a part of a rung's name (:meth:`Scope.name_in`)."""


def _wanted(wish: str, student: ModelSpec, machine: Machine) -> Sequence[RungChoice]:
    if wish == "none":
        return []
    if wish == "router:published":
        published = Schedule.published(min(Schedule.PUBLISHED_BLOCKS, machine.calibration_blocks))
        return [
            RungChoice(
                scope="router",
                blocks=published.n_blocks,
                blocks_per_step=min(published.blocks_per_step, published.n_blocks),
                learning_rate=published.learning_rate,
            )
        ]
    if wish == "auto":
        scopes = ["router", "experts"] if student.written.n_experts else ["experts"]
        return [_rung(scope, "kd", student, machine) for scope in scopes]
    scope, _, loss = wish.partition(":")
    return [_rung(scope, loss or "kd", student, machine)]


def _rung(scope: str, loss: str, student: ModelSpec, machine: Machine) -> RungChoice:
    per_round = 1 if machine.models_stay else _STREAMED_BATCHES_PER_ROUND
    small_steps = loss not in ("ka", "sar") and machine.models_stay
    per_step = _SMALL_STEP if small_steps else _BLOCKS_PER_STEP
    return RungChoice(
        scope=scope,  # type: ignore[arg-type]  # one of RECOVERIES
        experts=min(_TOP_EXPERTS, student.n_experts) if scope == "top-experts" else None,
        rank=max(_ADAPTER_RANKS) if scope == "adapters" else None,
        loss=loss,  # type: ignore[arg-type]
        batches_per_round=per_round if loss in ("ka", "sar") else None,
        blocks=min(CALIBRATION_BLOCKS, machine.calibration_blocks),
        blocks_per_step=min(per_step, machine.calibration_blocks),
        learning_rate=_rate(scope, student) if scope in _RATES else None,
        fade=_FADE if scope == "replaced" else 0.0,
    )


def _adapters(rung: RungChoice, rank: int, student: ModelSpec) -> RungChoice:
    changes = {"scope": "adapters", "experts": None, "rank": rank, "learning_rate": _rate("adapters", student)}
    return rung.model_copy(update=changes)


def _rate(scope: str, student: ModelSpec) -> float:
    return _RATES[scope] * RATES_HIDDEN_SIZE / student.hidden_size


def _obstacle(rung: RungChoice, student: ModelSpec, itemsize: int, memory_bytes: int) -> str | None:
    """The reason why a rung cannot be trained within this memory; None if it can, as routers alone always can."""
    if rung.scope == "router":
        return None
    try:
        refuse_too_large(scope_of(rung), student, itemsize, memory_bytes)
    except InputError as error:
        return str(error)
    return None
