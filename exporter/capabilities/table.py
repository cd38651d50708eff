"""Asks the rules of all containers."""

from __future__ import annotations

from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError
from exporter.capabilities import gguf, onnx, saved_student
from exporter.capabilities.rules import Container, Rule

__all__ = ["TABLE", "refusal", "refuse_unless_held"]

TABLE: tuple[Rule, ...] = (*gguf.RULES, *onnx.RULES, *saved_student.RULES)
"""Everything that a container cannot hold."""

_OTHER = {Container.GGUF: Container.ONNX, Container.ONNX: Container.GGUF}


def refusal(spec: ModelSpec, container: Container) -> str | None:
    """Says why a container cannot hold a model, and what to use instead; None: it can."""
    reason, other = _reason(spec, container), _OTHER.get(container)
    if reason is None or other is None or _reason(spec, other) is not None:
        return reason
    return f"{reason}; use --formats {other}"


def _reason(spec: ModelSpec, container: Container) -> str | None:
    """The first refusal of a container's rules, without an advice."""
    sentences = (rule.refusal(spec) for rule in TABLE if rule.container is container)
    return next((sentence for sentence in sentences if sentence is not None), None)


def refuse_unless_held(spec: ModelSpec, container: Container) -> None:
    """Refuses a model that a container cannot hold.

    Raises:
        UnsupportedError: it cannot; the message says why, and what to use instead.
    """
    sentence = refusal(spec, container)
    if sentence is not None:
        raise UnsupportedError(sentence)
