"""The recipe: every choice that determines the output, as a YAML file that a person can read and edit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from compressors.calibration.chats import is_chats
from compressors.calibration.splits import BlockCounts
from compressors.model.errors import InputError
from compressors.model.files.gguf.kv_types import KvType
from compressors.model.files.integer_blocks import ProductInputs
from compressors.model.names import shown
from compressors.model.running.arithmetic import Arithmetic
from compressors.shrink.registry import APART, EDITS, EXPERT_METHODS, LIGHT_MOE
from exporter.capabilities.rules import Container
from exporter.planning.yaml_file import read_yaml
from exporter.processes.team import MOST_THREADS
from validate.runtimes.cost import LEAST_CONTEXT

__all__ = [
    "BudgetChoice",
    "BudgetKind",
    "CompressChoice",
    "ExpertMethod",
    "FileChoice",
    "KvType",
    "Quantizer",
    "Recipe",
    "RecoverChoice",
    "RungChoice",
    "RungLoss",
    "SourceChoice",
    "Student",
    "TextChoice",
    "load_recipe",
    "recipe_yaml",
]


if TYPE_CHECKING:
    ExpertMethod = str
    ExpertEdit = str
else:
    ExpertMethod = Literal["none", *EXPERT_METHODS]
    ExpertEdit = Literal["none", *EDITS]

BudgetKind = Literal["total", "file"]
"""The bytes that a budget counts: the memory at run time, or the size of the file."""

Student = Literal["moe", "dense"]
"""The kind of model that is built: a smaller MoE, or a dense model (:mod:`compressors.shrink.dense`)."""

Quantizer = Literal["feedback", "kernel"]
"""The way codes are chosen: with error feedback, or by ggml's kernels alone (:mod:`compressors.quantize`)."""

RungLoss = Literal["kd", "next-token", "router-logits", "ka", "sar"]
"""Objectives of :mod:`compressors.recover`."""


Count = Annotated[int, Field(gt=0, lt=2**31)]
"""A number of things; the bound is that of the integers in the files."""

CountOrNone = Annotated[int, Field(ge=0, lt=2**31)]
"""A number of things of which there may be none."""


class _Part(BaseModel):
    """A part of a recipe. Unknown keys are refused: a misspelt choice must not pass for the default."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)  # most commands need few parts


def _without_unsaid(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that are among these defaults."""
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


class SourceChoice(_Part):
    """The original model."""

    model: str
    identity: str | None = None  # SHA-256 over config.json and the headers of the weight files; null: any
    keep_mtp: bool = False  # the layer that predicts one more token stays, for llama.cpp; absent: false

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what most recipes do not say, so that theirs are as they always were."""
        return _without_unsaid(serialized(self), {"keep_mtp": False})


class BudgetChoice(_Part):
    """The budget that the result must fit."""

    bytes: int = Field(gt=0, le=10**30)
    kind: BudgetKind
    context: int = Field(ge=LEAST_CONTEXT, lt=2**31)  # tokens
    kv_type: KvType


class MixedText(_Part):
    """One of several calibration texts, or chats."""

    file: str  # its name; the end says whether it holds chats
    weight: float = Field(gt=0, allow_inf_nan=False)

    @property
    def effect(self) -> tuple[bool, float]:
        """The part that determines the output: whether the lines are chats, and the weight."""
        return is_chats(Path(self.file)), self.weight


class TextChoice(_Part):
    """The number of blocks that each split gives, and the hash of the text; null allows any text."""

    calibration_blocks: Count
    selection_blocks: Count
    heldout_chunks_per_file: Count
    calibration_sha256: str | None = None
    selection_sha256: str | None = None
    heldout_sha256: str | None = None
    mix: tuple[MixedText, ...] = ()  # the calibration texts; absent: one plain text, or a folder

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what most recipes do not say."""
        values: dict[str, Any] = serialized(self)
        return values if self.mix else {name: value for name, value in values.items() if name != "mix"}

    @property
    def blocks(self) -> BlockCounts:
        """The numbers of blocks."""
        return BlockCounts(self.calibration_blocks, self.selection_blocks, self.heldout_chunks_per_file)


class CompressChoice(_Part):
    """The parts to remove, in the order of the fields; :mod:`exporter.planning.compression` explains each."""

    drop_blocks: int = Field(default=0, ge=0)  # whole decoder layers
    consecutive_blocks: bool = False  # the dropped layers are neighbours
    drop_moe_layers: int = Field(default=0, ge=0)  # MoE sub-layers of the layers that are left
    method: ExpertMethod = "none"  # how experts become fewer
    experts: Count | tuple[Count, ...]  # number left in each layer; a list has one for each layer that is left
    allocation: Literal["layer", "global"] = "layer"  # global: as many in total, in the layers with high scores
    protect_super_experts: bool = False
    width: Count | tuple[Count, ...] | None = None  # each expert's width; null: as it is
    edit: ExpertEdit = "none"  # how experts are rewritten
    edit_size: Count | None = None  # the rank; for mobe the number of bases
    replaced: Count | tuple[CountOrNone, ...] | None = None
    """For lightmoe: the number of experts that it replaces, in all layers together, or one for each layer."""
    bases: Count | tuple[CountOrNone, ...] | None = None  # for lightmoe: the number of their bases, likewise
    apart: bool = False  # bases and low-rank parts stay apart, which ONNX can hold; false: they are multiplied out
    student: Student = "moe"  # dense: each layer's experts become one feed-forward
    sequential: bool = False  # layers are judged on the outputs of the compressed layers before them
    sample_blocks: Count = 32  # for methods that need states, not only sums

    @model_validator(mode="after")
    def _is_consistent(self) -> CompressChoice:
        if (self.edit == "none") != (self.edit_size is None):
            raise ValueError("edit and edit_size go together: give both or neither")
        if {self.replaced is None, self.bases is None} != {self.edit != LIGHT_MOE.name}:
            raise ValueError(
                f"replaced and bases belong to edit {LIGHT_MOE.name}: give both with it, and not otherwise"
            )
        if isinstance(self.replaced, tuple) != isinstance(self.bases, tuple):
            raise ValueError("replaced and bases must both be one number, or both have one for each layer")
        if self.apart and self.edit not in APART:
            raise ValueError(
                f"apart is for experts of bases and low-rank parts: edit must be one of {', '.join(APART)}"
            )
        if self.allocation == "global" and not isinstance(self.experts, int):
            raise ValueError("allocation is global, so experts must be one number, the mean of all layers")
        return self

    @property
    def n_replaced(self) -> int:
        """The number of replaced experts, in all layers together."""
        return _total(self.replaced)

    @property
    def n_bases(self) -> int:
        """The number of their bases, in all layers together."""
        return _total(self.bases)

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what most recipes do not say, so that theirs are as they always were."""
        return _without_unsaid(serialized(self), {"replaced": None, "bases": None, "apart": False})


def _total(value: int | tuple[int, ...] | None) -> int:
    return sum(value) if isinstance(value, tuple) else value or 0


class RungChoice(_Part):
    """A rung of the recovery ladder: the trained tensors, the objective, and the length (docs/recovery.md)."""

    scope: Literal["router", "top-experts", "experts", "adapters", "replaced", "norms", "scales", "all"]
    experts: Count | None = None  # for top-experts: the number in each layer, those that most tokens choose
    rank: Count | None = None  # the rank of adapters
    loss: RungLoss = "kd"
    batches_per_round: Count | None = None  # for ka and sar: batches that are written, then judged, together
    blocks: Count
    blocks_per_step: Count
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # null: by the student's divergence
    fade: float = Field(default=0.0, ge=0, lt=1)  # for replaced: the part of the steps over which originals fade out

    @model_validator(mode="after")
    def _is_consistent(self) -> RungChoice:
        if (self.scope == "top-experts") != (self.experts is not None):
            raise ValueError("experts says how many top-experts are trained: give it with that scope, and no other")
        if (self.scope == "adapters") != (self.rank is not None):
            raise ValueError("rank is the adapters': give it with that scope, and no other")
        if (self.loss in ("ka", "sar")) != (self.batches_per_round is not None):
            raise ValueError("batches_per_round belongs to ka and sar: give it with these losses, and no other")
        if self.loss == "router-logits" and self.scope != "router":
            raise ValueError("the loss router-logits looks at routers alone: its scope must be router")
        if self.scope in ("norms", "scales", "all") and self.loss not in ("kd", "next-token"):
            raise ValueError("a live teacher shares the student's final norm, which this scope trains: take kd")
        if self.fade and self.scope != "replaced":
            raise ValueError("fade is about originals of replaced experts: its scope must be replaced")
        if self.learning_rate is None and self.scope not in ("norms", "scales", "all"):
            raise ValueError("learning_rate is a number with this scope; null is for norms, scales and all")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what most recipes do not say, so that theirs are as they always were."""
        return _without_unsaid(serialized(self), {"fade": 0.0})


class RecoverChoice(_Part):
    """The training of the compressed model. Each rung continues from the last that was kept."""

    rungs: tuple[RungChoice, ...] = ()  # climbed in this order, each kept only if the divergence falls
    after_quantizing: RungChoice | None = None  # trained last, beside the codes that each file holds
    seed: int = Field(ge=0, lt=2**32)

    @property
    def trained(self) -> tuple[RungChoice, ...]:
        """Everything that is trained, in its order."""
        return self.rungs if self.after_quantizing is None else (*self.rungs, self.after_quantizing)

    @model_validator(mode="after")
    def _is_consistent(self) -> RecoverChoice:
        if self.after_quantizing is not None and self.after_quantizing.scope not in ("router", "norms", "scales"):
            raise ValueError(
                "after_quantizing trains what a finished file can take other values of: its scope must be router, "
                "norms or scales"
            )
        if any(rung.scope == "scales" for rung in self.rungs):
            raise ValueError("the scales of blocks are those of a written file: they are trained after_quantizing")
        return self


class FileChoice(_Part):
    """The storage of the weights in a file; the name of a mix alone stands for that mix."""

    mix: str  # a mix of llama-quantize, or a preset of the ONNX writer
    tensors: Mapping[str, str] = {}  # types of single tensors, in place of the mix's
    quantizer: Quantizer = "feedback"
    inputs: ProductInputs = "int8"  # of products of 4 bits at run time; float32 is for ONNX alone
    imatrix: str | None = None  # SHA-256 of llama.cpp's importance matrix; null: the calibration text's
    why: str | None = None  # how the types were found

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        return {"mix": data} if isinstance(data, str) else data


class Recipe(_Part):
    """Everything that determines the output. Equal recipes give equal files, byte for byte."""

    version: Literal[2] = 2
    source: SourceChoice
    budget: BudgetChoice
    text: TextChoice
    arithmetic: Arithmetic  # for calibration and recovery; reported figures are always computed in float32
    compress: CompressChoice
    recover: RecoverChoice
    gguf: FileChoice | None  # null: no GGUF file
    onnx: FileChoice | None
    save_student: bool
    threads: int = Field(gt=0, le=MOST_THREADS)

    @model_validator(mode="after")
    def _writes_something(self) -> Recipe:
        if not self.artifacts:
            raise ValueError("gguf and onnx are both null, so nothing would be written: give one of them a type")
        if self.gguf is not None and self.gguf.inputs == "float32":
            raise ValueError("inputs of gguf must be int8: llama.cpp multiplies blocks with no other")
        return self

    def file(self, artifact: str) -> FileChoice:
        """The choice for an artifact that is written."""
        choice = self._files[artifact]
        assert choice is not None, f"the recipe writes no {artifact}"
        return choice

    @property
    def _files(self) -> dict[str, FileChoice | None]:
        return {"gguf": self.gguf, "onnx": self.onnx}

    def with_only(self, artifact: str, compress: CompressChoice) -> Recipe:
        """The recipe for one of its artifacts alone, with another student."""
        others = {name: None for name in self.artifacts if name != artifact}
        return self.model_copy(update={"compress": compress, **others})

    @property
    def artifacts(self) -> tuple[str, ...]:
        """The artifacts that are written, in this order."""
        return tuple(name for name, choice in self._files.items() if choice is not None)

    @property
    def containers(self) -> tuple[Container, ...]:
        """Everything that is written: the artifacts, and the student where it is saved."""
        return (*map(Container, self.artifacts), *([Container.STUDENT] if self.save_student else []))

    @property
    def chooses_codes(self) -> bool:
        """True if error feedback chooses the codes of an artifact."""
        return any(self.file(artifact).quantizer == "feedback" for artifact in self.artifacts)


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, keys in the order of the class."""
    text: str = yaml.safe_dump(recipe.model_dump(), sort_keys=False, width=110)
    return text


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe that a person may have edited.

    Raises:
        InputError: the file is not YAML, or a choice is missing, unknown or of the wrong type.
    """
    data = read_yaml(path, "a recipe")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(shown(part) for part in first["loc"]) or "the whole file"
        raise InputError(f"{path}: {where}: {first['msg'].lower()}; --dry-run writes a valid recipe") from None
