"""One beginning of held-out text, continued by the original and by the files, so that a person sees that they write.

Its place among the beginnings that every model continued is fixed, so nobody chose it for what the files write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from validate.report import facts
from validate.report.facts import Report, find

__all__ = ["Continuation", "continuation"]

_ORIGINAL = "original"


@dataclass(frozen=True)
class Continuation:
    """A prompt and the texts after it."""

    prompt: str
    temperature: float  # at which tokens are drawn, with the same random numbers for every model
    texts: Mapping[str, str]  # by the name of the model

    @property
    def how(self) -> str:
        """Says how the tokens were chosen."""
        return f"tokens drawn with the same random numbers for each, at temperature {self.temperature:g}"


def continuation(reports: Mapping[str, Report]) -> Continuation | None:
    """The texts after one prompt; None if the original or all files wrote none, or prompts differ.

    Args:
        reports: the reports of all outputs, by name, or one whose name is empty.
    """
    examples: dict[str, Mapping[str, Any]] = {}
    for name, report in reports.items():
        for row in (facts.validation_row(report, "teacher"), *facts.shipped_rows(report)):
            example = find(row, "generation", "example")
            if example is not None and "text" in example:  # reports of earlier versions have another one
                examples[_name(name, row, reports)] = example
    if _ORIGINAL not in examples or len(examples) < 2 or len({example["prompt"] for example in examples.values()}) != 1:
        return None
    texts = {name: example["text"] for name, example in examples.items()}
    first = examples[_ORIGINAL]
    return Continuation(first["prompt"], first["temperature"], texts)


def _name(part: str, row: Mapping[str, Any], reports: Mapping[str, Report]) -> str:
    """The name of the file, with the output that it lies in where a file of that kind lies in others too."""
    if row["artifact"] == "teacher":
        return _ORIGINAL
    name = facts.artifact_name(row["artifact"])
    kinds = [other["format"] for report in reports.values() for other in report["artifacts"]]
    return name if kinds.count(row["artifact"]) < 2 else f"{name} {part}"
