"""Finds the family of a model."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

from compressors.model import families
from compressors.model.description.family import Family
from compressors.model.errors import UnsupportedError

__all__ = ["families_of_architecture", "family_for", "supported_families"]


@cache
def supported_families() -> Mapping[str, Family]:
    """Returns the families by every ``model_type`` that they read: the ``FAMILY`` of each module of the package."""
    modules = [
        import_module(f"{families.__name__}.{module.name}") for module in pkgutil.iter_modules(families.__path__)
    ]
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    names = ((name, family) for family in found for name in (family.model_type, family.whole_model_type))
    return {name: family for name, family in names if name is not None}


def family_for(model_type: str, where: Path | None = None) -> Family:
    """The family of ``model_type``.

    Raises:
        UnsupportedError: there is none; the message lists the known ones.
    """
    found = supported_families()
    if model_type in found:
        return found[model_type]
    prefix = f"{where}: " if where else ""
    raise UnsupportedError(
        f"{prefix}model_type {model_type!r} is not a supported MoE family; supported are {', '.join(sorted(found))}"
    )


def families_of_architecture(architecture: str) -> tuple[Family, ...]:
    """The families whose GGUF files have this architecture and can be read."""
    found = dict.fromkeys(supported_families().values())
    return tuple(
        family for family in found if family.gguf.architecture == architecture and family.gguf.settings is not None
    )
