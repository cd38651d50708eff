"""The recipe's ``compress`` choice: its result as a description, its checks, and its words.

The steps are always taken in this order: blocks go (Block Drop), MoE sub-layers go (Layer Drop), experts become fewer
(pruning or merging), experts become narrower, experts are rewritten as factors or replaced. Any may be left out. A
dense student's layers end as one feed-forward each; it can only be combined with dropped blocks and narrower experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.spec import ModelSpec, MoeSize
from compressors.model.errors import InputError
from compressors.shrink.dense import check_dense
from compressors.shrink.needs import Needs
from compressors.shrink.registry import LIGHT_MOE, METHODS, SLIM, expert_counts
from compressors.shrink.replace import Replacement, placed, spread
from compressors.shrink.slim import check_width
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refuse_unless_held
from exporter.planning.recipe import CompressChoice, Recipe
from exporter.planning.resulting_spec import condensed_size, layers_with_experts, resulting_spec

__all__ = [
    "by_layer",
    "changes_experts",
    "check_compression",
    "described_compression",
    "expected_spec",
    "only_narrows",
    "runs_text",
    "shrinks",
]


def expected_spec(choice: CompressChoice, teacher: ModelSpec) -> ModelSpec:
    """The student's description; where statistics decide which layers shrink, it assumes the last ones.

    Files of this description have exactly the student's bytes if its layers are alike; if they differ, each may be
    padded by a page more or less.
    """
    n_moe = len(layers_with_experts(teacher)) - choice.drop_blocks - choice.drop_moe_layers
    widths = by_layer(choice.width, n_moe, teacher.expert_width)
    experts = by_layer(choice.experts, n_moe, teacher.n_experts)
    bases = _expected_bases(choice, experts)
    sizes = [MoeSize(*size) for size in zip(experts, widths, bases, strict=True)]
    if choice.allocation == "global" and n_moe > 1 and teacher.top_k < experts[0] < teacher.n_experts:
        # stands for any distribution: one layer keeps one more, another one less
        sizes[:2] = [replace(size, n_experts=size.n_experts + one) for size, one in zip(sizes, (1, -1), strict=False)]
    if choice.student == "dense":
        condensed = {width: condensed_size(teacher, width) for width in set(widths)}
        sizes = [condensed[width] for width in widths]
    return resulting_spec(
        teacher,
        sizes,
        drop_blocks=choice.drop_blocks,
        drop_moe_layers=choice.drop_moe_layers,
        mtp=MoeSize(experts[-1], widths[-1]),
    )


def _expected_bases(choice: CompressChoice, experts: Sequence[int]) -> Sequence[SharedBases | None]:
    """The bases of each layer with experts, where files keep them apart."""
    if not choice.apart or choice.edit_size is None:
        return [None] * len(experts)
    if choice.edit == LIGHT_MOE.name:
        return _bases_of_replaced(choice, experts)
    base, n_bases = (0, 1) if choice.edit == "d2-moe" else (SharedBases.ZERO, 0)
    return [SharedBases((base,) * n_experts, n_bases, choice.edit_size) for n_experts in experts]


def _bases_of_replaced(choice: CompressChoice, experts: Sequence[int]) -> Sequence[SharedBases | None]:
    """The bases of each layer: those of a choice by layer, or any distribution while statistics have not decided.

    Raises:
        InputError: the numbers are not possible.
    """
    assert choice.edit_size is not None, "the recipe checks it"
    if not isinstance(choice.replaced, tuple) or not isinstance(choice.bases, tuple):
        return spread(Replacement(choice.n_replaced, choice.n_bases, choice.edit_size), experts)
    return placed(choice.replaced, choice.bases, choice.edit_size, experts)


def check_compression(recipe: Recipe, teacher: ModelSpec) -> None:
    """Refuses choices that the method, the containers or stock transformers cannot carry out, before any work.

    Raises:
        InputError: a number is not possible for this model; the message names the field.
        UnsupportedError: an artifact cannot hold the result.
    """
    choice = recipe.compress
    if choice.student == "dense":
        _check_dense_recipe(recipe, teacher)
    n_moe = _checked_layers(choice, teacher)
    counts = expert_counts(choice.method, teacher)
    _check_numbers("experts", choice.experts, n_moe, min(counts), max(counts))
    _check_groups(choice, teacher, counts)
    _check_numbers("width", choice.width, n_moe, 1, teacher.expert_width)
    _check_numbers("edit_size", choice.edit_size, n_moe, 1, _largest_edit(choice, teacher, n_moe))
    if choice.edit == LIGHT_MOE.name:
        _check_replacement(choice, teacher, n_moe)
    if "gguf" in recipe.artifacts:
        for width in by_layer(choice.width, n_moe, teacher.expert_width):
            check_width(width, teacher.expert_width, for_gguf=choice.width is not None)
    if choice.method == "none" and set(by_layer(choice.experts, n_moe, teacher.n_experts)) != {teacher.n_experts}:
        raise InputError(
            f"compress.experts: {choice.experts} of {teacher.n_experts} experts are to stay, but compress.method is "
            "none: name the method by which they become fewer, such as reap"
        )
    if choice.allocation == "global" and (choice.method == "none" or METHODS[choice.method].score is None):
        scored = ", ".join(name for name, method in METHODS.items() if method.score is not None)
        raise InputError(
            f"compress.allocation: global needs a criterion whose scores are known in advance ({scored}); "
            f"{choice.method} chooses within each layer"
        )
    spec = expected_spec(choice, teacher)
    if spec.mtp is not None and set(recipe.containers) == {Container.ONNX}:
        raise InputError(
            "--keep-mtp: ONNX files never have the layer for MTP, which llama.cpp alone can run: leave --keep-mtp out, "
            "or write a GGUF file too"
        )
    for container in recipe.containers:
        refuse_unless_held(spec, container)


def _check_replacement(choice: CompressChoice, teacher: ModelSpec, n_moe: int) -> None:
    """Refuses replaced experts that are not the original's, and numbers that are not possible."""
    others = {
        "method": choice.method != "none",
        "allocation": choice.allocation != "layer",
        "width": choice.width is not None,
        "sequential": choice.sequential,
    }
    unfit = [f"compress.{field}" for field, is_set in others.items() if is_set]
    if unfit:
        raise InputError(
            f"{', '.join(unfit)}: {LIGHT_MOE.name} lets original experts fade out, so none may go, be "
            "merged or be narrowed before: leave this out, or take another edit"
        )
    try:
        _bases_of_replaced(choice, by_layer(choice.experts, n_moe, teacher.n_experts))
    except InputError as error:
        raise InputError(f"compress.replaced and compress.bases: {error}") from None


def _checked_layers(choice: CompressChoice, teacher: ModelSpec) -> int:
    """Checks how many layers go; returns the number of layers that keep experts."""
    n_layers = len(layers_with_experts(teacher)) - choice.drop_blocks
    if n_layers < 1:
        raise InputError(_out_of_range("drop_blocks", choice.drop_blocks, 0, len(layers_with_experts(teacher)) - 1))
    n_moe = n_layers - choice.drop_moe_layers
    if n_moe < 1:
        raise InputError(_out_of_range("drop_moe_layers", choice.drop_moe_layers, 0, n_layers - 1))
    return n_moe


def changes_experts(choice: CompressChoice) -> bool:
    """True if experts get weights of their own, which the overlay holds."""
    rewritten = choice.width is not None or choice.edit_size is not None or choice.student == "dense"
    return rewritten or (choice.method != "none" and METHODS[choice.method].changes_weights)


def only_narrows(choice: CompressChoice) -> bool:
    """True if each expert with other weights has some of the neurons of one of the original's, and nothing else."""
    rewritten = choice.edit_size is not None or choice.student == "dense"
    merged = choice.method != "none" and METHODS[choice.method].changes_weights
    return choice.width is not None and not rewritten and not merged


def shrinks(choice: CompressChoice, teacher: ModelSpec) -> bool:
    """True if the student has other layers than the original before anything is taught."""
    return changes_experts(choice) or expected_spec(choice, teacher) != teacher


def runs_text(choice: CompressChoice, teacher: ModelSpec) -> bool:
    """True if compressing takes text through the model, because the sums of calibration do not suffice."""
    if choice.sequential or choice.consecutive_blocks:
        return True
    fewest = min(by_layer(choice.experts, 1, teacher.n_experts))
    narrowest = min(by_layer(choice.width, 1, teacher.expert_width))
    names = {
        choice.method: fewest < teacher.n_experts,
        SLIM.name: narrowest < teacher.expert_width,
        choice.edit: choice.edit_size is not None,
    }
    return any(METHODS[name].needs is Needs.INPUTS for name, is_used in names.items() if is_used)


def described_compression(choice: CompressChoice, teacher: ModelSpec) -> str:
    """Describes the choice: ``5 of 6 layers, 20 of 32 experts per layer (reap)``."""
    n_layers = teacher.n_layers - choice.drop_blocks
    parts = [f"{n_layers} of {teacher.n_layers} layers"] if choice.drop_blocks else []
    if choice.drop_moe_layers:
        n_moe = len(layers_with_experts(teacher)) - choice.drop_blocks - choice.drop_moe_layers
        parts.append(f"experts in {n_moe} of {n_layers} layers")
    if choice.student == "dense":
        parts.append(f"{teacher.top_k} of {teacher.n_experts} experts per layer as one dense feed-forward")
    else:
        experts = ", ".join(map(str, choice.experts)) if isinstance(choice.experts, tuple) else choice.experts
        method = "" if choice.method == "none" else f" ({choice.method})"
        parts.append(f"{experts} of {teacher.n_experts} experts per layer{method}")
    if choice.width is not None:
        widths = ", ".join(map(str, choice.width)) if isinstance(choice.width, tuple) else choice.width
        parts.append(f"{widths} of {teacher.expert_width} neurons per expert")
    if choice.edit == LIGHT_MOE.name:
        apart = "" if choice.apart else ", multiplied out"
        parts.append(
            f"{choice.n_replaced} experts in all on {choice.n_bases} bases with adapters of rank {choice.edit_size} "
            f"({choice.edit}{apart})"
        )
    elif choice.edit_size is not None:
        parts.append(f"{choice.edit} of size {choice.edit_size}" + (", kept apart" if choice.apart else ""))
    return ", ".join(parts)


def _check_dense_recipe(recipe: Recipe, teacher: ModelSpec) -> None:
    """Refuses choices that a dense student cannot have, or that would not change it."""
    check_dense(teacher)
    choice, recover = recipe.compress, recipe.recover
    if recover.after_quantizing is not None or any(rung.scope == "router" for rung in recover.rungs):
        raise InputError(
            "recover: compress.student is dense, which leaves no routers to teach: leave out after_quantizing and "
            "rungs whose scope is router"
        )
    fields = {
        "method": choice.method != "none",
        "experts": set(by_layer(choice.experts, 1, teacher.n_experts)) != {teacher.n_experts},
        "drop_moe_layers": choice.drop_moe_layers > 0,
        "allocation": choice.allocation != "layer",
        "protect_super_experts": choice.protect_super_experts,
        "edit": choice.edit != "none",
    }
    unfit = [f"compress.{field}" for field, is_set in fields.items() if is_set]
    if unfit:
        raise InputError(
            f"{', '.join(unfit)}: compress.student is dense, so the {teacher.top_k} best of all {teacher.n_experts} "
            "experts of each layer become one feed-forward; leave these choices as they are in a recipe that "
            "--student dense --dry-run writes (drop_blocks and width may change)"
        )


def by_layer(value: int | tuple[int, ...] | None, n_layers: int, default: int) -> Sequence[int]:
    """The number of each layer, where a choice gives one for each, one for all, or none, which means the default."""
    return value if isinstance(value, tuple) else [default if value is None else value] * n_layers


def _check_numbers(field: str, value: int | tuple[int, ...] | None, n_layers: int, lowest: int, highest: int) -> None:
    if isinstance(value, tuple) and len(value) != n_layers:
        raise InputError(
            f"compress.{field}: {len(value)} numbers for {n_layers} layers with experts; give one for each, "
            "or one for all"
        )
    for number in by_layer(value, n_layers, default=highest):
        if not lowest <= number <= highest:
            raise InputError(_out_of_range(field, number, lowest, highest))


def _check_groups(choice: CompressChoice, teacher: ModelSpec, counts: range) -> None:
    """Refuses numbers of experts that do not leave the groups that routers choose from first equal in size."""
    n_groups = -counts.step
    kept = by_layer(choice.experts, 1, teacher.n_experts)
    if n_groups > 1 and (choice.allocation == "global" or not set(kept) <= set(counts)):
        raise InputError(
            f"compress.experts: the routers of {teacher.model_type} choose among {n_groups} groups of experts, which "
            f"must stay equal in size: give a multiple of {n_groups}, with compress.allocation layer"
        )


def _largest_edit(choice: CompressChoice, teacher: ModelSpec, n_moe: int) -> int:
    """The full rank of the narrowest experts; for MoBE, the fewest experts of any layer."""
    if choice.edit == "mobe" and choice.allocation == "global":
        return teacher.top_k
    if choice.edit == "mobe":
        return min(by_layer(choice.experts, n_moe, teacher.n_experts))
    return min(*by_layer(choice.width, n_moe, teacher.expert_width), teacher.expert_size)


def _out_of_range(field: str, number: int, lowest: int, highest: int) -> str:
    return f"compress.{field}: {number} is not possible for this model; give a number from {lowest} to {highest}"
