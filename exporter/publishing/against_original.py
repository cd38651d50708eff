"""Compares an export with the original: size, speed, trained parameters, and the last words that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compressors.model.description.spec import ModelSpec
from compressors.recover.scopes import BlockLength
from compressors.recover.training_memory import training_bytes
from exporter.planning.recipe import RecoverChoice, RungChoice
from exporter.planning.recovery import scope_of
from exporter.publishing.outputs import Artifact

__all__ = ["against_original", "with_choices"]


def against_original(
    artifacts: Mapping[str, Artifact],
    source_bytes: int,
    rows: Sequence[Mapping[str, Any]],
    trained: Iterable[tuple[RungChoice, Mapping[str, Any]]],
    student: ModelSpec,
    block_lengths: Sequence[BlockLength],
) -> dict[str, Any]:
    """Returns the comparison as plain data for JSON.

    Args:
        artifacts: the files, by format.
        source_bytes: bytes of the original's weights.
        rows: rows of the validation.
        trained: the rungs of recovery, each with its result.
        student: the student.
        block_lengths: one for each file, for rungs that train the scales of its blocks.
    """
    n_trained = max(
        (_parameters(rung, student, block_lengths) for rung, result in trained if result["accepted"]), default=0
    )
    by_artifact = {row["artifact"]: row for row in rows}
    return {
        "trained_parameters": n_trained,
        "trained_share": n_trained / student.parameters,
        "files": {
            name: {
                "size_ratio": artifact.bytes / source_bytes,
                "decode_speed_ratio": _speed_ratio(by_artifact[name]),
                "last_words_kept": (by_artifact[name]["cloze"] or {}).get("kept"),
            }
            for name, artifact in artifacts.items()
        },
    }


def with_choices(
    choice: RecoverChoice, tried: Sequence[Mapping[str, Any]]
) -> list[tuple[RungChoice, Mapping[str, Any]]]:
    """Pairs each result with its rung; the last rung has one result for each file that was trained by itself."""
    chosen = [*choice.rungs, *[choice.after_quantizing] * (len(tried) - len(choice.rungs))]
    return [(rung, result) for rung, result in zip(chosen, tried, strict=True) if rung is not None]


def _parameters(rung: RungChoice, student: ModelSpec, block_lengths: Sequence[BlockLength]) -> int:
    """Returns the number of trained values; a wider rung trains all that a narrower one did, and more."""
    scope = scope_of(rung)
    return max(training_bytes(scope, student, block_length).values for block_length in block_lengths)


def _speed_ratio(row: Mapping[str, Any]) -> float | None:
    """The decoding speed relative to the original's; None unless that was measured in the same runtime."""
    original = ((row["floor"] or {}).get("teacher") or {}).get("decode_tokens_per_second")
    speed = row["decode_tokens_per_second"]
    return None if speed is None or original is None else speed / original
