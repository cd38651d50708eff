"""Refuses a model of a family that is not supported: names the nearest supported ones, and what they lack.

It goes by ``config.json`` and the names of tensors in the weight files. Each family reads the settings as if they were
its own, so the comparison needs no table. torch is not imported: the answer is there in a fraction of a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.model.config.reading import EXPERT_COUNT_KEYS, WITHOUT_EFFECT
from compressors.model.config.settings import Settings
from compressors.model.description.family import Family
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import TensorSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families.refused import REASONS
from compressors.model.families.registry import supported_families
from compressors.model.files.json_file import read_json
from compressors.model.files.safetensors_header import read_header
from compressors.model.names import shown
from compressors.model.sources.hugging_face.foreign_folder import refuse_other_inputs
from compressors.model.sources.hugging_face.weight_folder import find_weights

__all__ = ["refuse_unknown_family"]

_MOST = 6  # names in a list
_NEAR = 0.8  # of the likeness of the nearest family: a second one that is so like it is named too
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_NO_SETTINGS = {
    *WITHOUT_EFFECT,
    *("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"),
    *("rope_parameters", "rope_scaling", "rope_theta"),  # families are tried with a plain one
}
_SCALES = re.compile(r".*[._](scale|scale_inv|scales|blocks)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_BEFORE_LAYERS = re.compile(r"^.*?\b(?=layers\.)|^model\.")


def refuse_unknown_family(folder: Path) -> None:
    """Refuses a folder whose model is of no supported family; one that lacks ``config.json`` is left to others.

    Raises:
        InputError: ``config.json`` cannot be read.
        UnsupportedError: the family is unknown; or the model takes more than text.
    """
    path = folder / "config.json"
    if not os.path.isfile(path):
        return
    refuse_other_inputs(folder)
    config = read_json(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type in supported_families():
        return
    kinds = _first_of_kinds(_tensor_names(folder))
    if model_type in REASONS or {*EXPERT_COUNT_KEYS} & {*config} or any("expert" in kind for kind in kinds):
        raise UnsupportedError(" ".join(_sentences(path, config, kinds)))


def _tensor_names(folder: Path) -> list[str]:
    """The names of the tensors, from the index or the headers; none where they cannot be read."""
    try:
        weights = find_weights(folder)
        names = weights.index or (name for file in weights.files for name in read_header(file))
        return [name for name in names if _SCALES.fullmatch(name) is None]
    except InputError:
        return []


def _first_of_kinds(names: Iterable[str]) -> dict[str, str]:
    """The kinds of tensors, each with the name of the one in the first layer that has it."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: ([int(number) for number in _NUMBER.findall(name)], name)):
        found.setdefault(_kind(name), name)
    return found


def _kind(name: str) -> str:
    """The name of a tensor with a star for every number, without what stands before the layers."""
    name = _BEFORE_LAYERS.sub("", name, count=1)
    return _NUMBER.sub("*", name).removesuffix(".weight")


def _sentences(path: Path, config: Mapping[str, Any], kinds: Mapping[str, str]) -> Iterator[str]:
    model_type = str(config["model_type"])
    reason = f": {REASONS[model_type]}" if model_type in REASONS else ""
    yield f"{path}: model_type {shown(model_type)} is not a supported MoE family{reason}."
    families = {family.model_type: family for family in supported_families().values()}
    likenesses = [_Likeness(family, path, config, kinds) for _, family in sorted(families.items())]
    nearest, second, *_ = likenesses = sorted(likenesses, key=lambda each: -each.share)
    near = [nearest, second] if second.share >= _NEAR * nearest.share else [nearest]
    yield f"Nearest of the supported ones: {' and '.join(map(str, near))}."
    yield from _missing(nearest, likenesses[1:])


def _missing(nearest: _Likeness, others: Sequence[_Likeness]) -> Iterator[str]:
    """Says in sentences what the nearest family lacks."""
    name = nearest.family.model_type
    for what, lacking in (("tensors", _Likeness.lacking_tensors), ("settings", _Likeness.lacking_settings)):
        elsewhere = {each: _who_has(each, what, others) for each in lacking(nearest)}
        if unknown := [each for each, owner in elsewhere.items() if owner is None]:
            yield f"No supported family has the {what} {_listed(unknown)}."
        if known := [f"{each} ({owner} has it)" for each, owner in elsewhere.items() if owner is not None]:
            yield f"{name} lacks the {what} {_listed(known)}."
    if needed := nearest.needed_tensors():
        yield f"{name} needs the tensors {_listed(needed)}, which are not there."
    if nearest.objections:
        yield f"{name} refuses it: {_listed(nearest.objections)}."
    if nearest.knows_everything:
        yield f"By its names it is a {name}: if it is one, write that model_type into config.json."


class _Trial(Settings):
    """Settings that a family reads as if they were its own: what it refuses is noted, and it reads on.

    Attributes:
        objections: the reasons of its refusals.
    """

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        super().__init__(raw, path)
        self.objections: list[str] = []

    def refuse(self, error: InputError) -> None:
        """Notes the refusal."""
        self.objections.append(str(error).removeprefix(f"{self.path}: "))

    def read_by(self, family: Family) -> ModelSpec | None:
        """The model as the family reads it; None where it cannot read on."""
        assert family.read is not None, "families in the registry are read"
        try:
            return family.read(self)
        except InputError as error:
            self.refuse(error)
            return None


class _Likeness:
    """The likeness of a model to those of a family.

    Args:
        family: the family.
        path: the model's ``config.json``.
        config: its settings.
        kinds: the kinds of its tensors, each with a name.
    """

    def __init__(self, family: Family, path: Path, config: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
        self.family = family
        own = {"model_type": family.model_type, "rope_parameters": _PLAIN_ROPE, "rope_scaling": None}
        trial, by_default = _Trial({**config, **own}, path), _Trial(own, path)
        spec = trial.read_by(family)
        some_spec = spec or by_default.read_by(family)
        self.objections = list(dict.fromkeys(trial.objections))
        self.asked = trial.asked | by_default.asked
        self._settings = [key for key in config if key not in _NO_SETTINGS]
        self.claimed = set() if some_spec is None else _claimed(some_spec)
        n_layers = 0 if some_spec is None else some_spec.n_layers
        self._kinds = [
            kind for kind, name in kinds.items() if not any(part.takes(name, n_layers) for part in family.skipped)
        ]
        self._can_read = spec is not None
        there = {*self._kinds}
        needed = [] if some_spec is None else [_names(tensor) for tensor in _tensors(some_spec)]
        self._needed = list(dict.fromkeys(names[0] for names in needed if not there.intersection(names)))

    def __str__(self) -> str:
        """The family, and how much of the model it knows."""
        settings = f"{len(self._settings) - len(self.lacking_settings())} of the {len(self._settings)} settings"
        if not self._kinds:
            return f"{self.family.model_type} ({settings})"
        kinds = f"{len(self._kinds) - len(self.lacking_tensors())} of the {len(self._kinds)} kinds of tensors"
        return f"{self.family.model_type} ({kinds} and {settings})"

    @property
    def share(self) -> float:
        """The share of settings that the family knows, and of kinds of tensors that both have, together 2 at most."""
        settings = 1 - len(self.lacking_settings()) / max(1, len(self._settings))
        both = len(self._kinds) - len(self.lacking_tensors())
        return settings + both / max(1, len(self._kinds) + len(self._needed))

    @property
    def knows_everything(self) -> bool:
        """True if the model has the family's tensors and no others, and no setting that the family does not know."""
        differences = (*self.lacking_tensors(), *self.lacking_settings(), *self.needed_tensors(), *self.objections)
        return bool(self._kinds) and not differences

    def lacking_tensors(self) -> list[str]:
        """The kinds of tensors that the family has no place for."""
        return [kind for kind in self._kinds if kind not in self.claimed]

    def lacking_settings(self) -> list[str]:
        """The settings that the family does not ask for."""
        return [key for key in self._settings if key not in self.asked]

    def needed_tensors(self) -> list[str]:
        """The kinds of tensors that the family needs and the model lacks, where the family can read the settings."""
        return self._needed if self._can_read and self._kinds else []


def _tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    yield from spec.written.tensors
    for layer in dict.fromkeys(spec.layers):
        yield from layer.tensors


def _names(tensor: TensorSpec) -> list[str]:
    """The kinds of tensors that may hold a tensor of the family: its own, or that of all experts."""
    templates = [tensor.name, *([] if tensor.fused is None else [tensor.fused.name])]
    return [_kind(template.format(layer=0, expert=0)) for template in templates]


def _claimed(spec: ModelSpec) -> set[str]:
    head = _kind(spec.tensor(Role.HEAD).name)  # may stand beside a tied embedding
    return {head, *(name for tensor in _tensors(spec) for name in _names(tensor))}


def _who_has(name: str, what: str, others: Iterable[_Likeness]) -> str | None:
    """The nearest of the other families that has a tensor or a setting; None if there is none."""
    has = (each.family.model_type for each in others if name in (each.claimed if what == "tensors" else each.asked))
    return next(has, None)


def _listed(names: Sequence[str]) -> str:
    plain = [name.removeprefix("layers.*.") for name in names]
    more = f" and {len(plain) - _MOST} more" if len(plain) > _MOST else ""
    return ", ".join(plain[:_MOST]) + more
