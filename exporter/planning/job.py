"""A job: everything that the command line gives, checked, in one frozen value.

Whatever can be judged without opening the model is judged here, so that a wrong flag fails at once and by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, get_args

from compressors.model.errors import InputError
from compressors.model.files.kv_types import KV_TYPES
from compressors.model.names import shown
from exporter.estimating.durations import parse_duration
from exporter.estimating.sizes import parse_size
from exporter.pipeline.team import checked_threads
from exporter.planning import defaults
from exporter.planning.plan import Search
from exporter.planning.recipe import BudgetKind, ExpertMethod, Quantizer, Student
from exporter.planning.recovery import RECOVERIES
from exporter.publishing.model_name import model_name
from exporter.writing.gguf.mixes import ALIASES, MIXES
from validate.metrics.verdict import REQUIREMENTS
from validate.runtimes.cost import LEAST_CONTEXT

__all__ = [
    "BUDGET_KINDS",
    "DEVICES",
    "FORMATS",
    "METHODS",
    "METHODS_WITHOUT_EXPERTS",
    "PREFERENCES",
    "QUANTIZERS",
    "QUANT_TYPES",
    "STUDENTS",
    "Flags",
    "Job",
    "parse_duration",
    "parse_requirements",
]

BUDGET_KINDS: Final = get_args(BudgetKind)
DEVICES: Final = ("auto", "cpu", "cuda")
FORMATS: Final = ("gguf", "onnx")
METHODS_WITHOUT_EXPERTS: Final = ("slim", "block-drop", "layer-drop")
"""Methods that ``--experts`` does not apply to."""

METHODS: Final = ("auto", *(name for name in get_args(ExpertMethod) if name != "none"), *METHODS_WITHOUT_EXPERTS)
QUANT_TYPES: Final = (*MIXES, *ALIASES)
QUANTIZERS: Final = get_args(Quantizer)
PREFERENCES: Final = ("quality", "speed")
STUDENTS: Final = get_args(Student)

_BUNDLED_MODEL_NAME = "demo"
_LONGEST_NAME = 230
"""Bytes of a name; most systems allow 255, and files beside OUT have longer names, such as OUT.recipe.yaml.partial."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of ``moe-export``, as :class:`Flags` makes it."""

    model: str | None  # local folder or hub id; None: the bundled model
    revision: str | None
    offline: bool
    budgets: tuple[int, ...]  # bytes; none: the recipe's
    budget_kind: str  # one of BUDGET_KINDS
    context: int  # tokens
    kv_type: str  # one of KV_TYPES
    formats: tuple[str, ...]  # of FORMATS, in that order
    calibration: Path | None  # file or folder; None: the bundled text
    text: Path | None  # held-out file or folder
    student: str  # one of STUDENTS
    method: str  # one of METHODS
    experts: int | None  # per layer; None: the planner chooses
    quant: str | None  # one of QUANT_TYPES; None: types are found for each tensor
    quantizer: str  # one of QUANTIZERS
    imatrix: Path | None  # llama.cpp's importance matrix; None: the calibration text's
    prefer: str  # one of PREFERENCES
    plan_seconds: int  # of measuring in the search
    recover: str  # one of RECOVERIES
    recover_seconds: int
    require: Mapping[str, float]  # threshold of each check that differs from the default
    recipe: Path | None
    memory_bytes: int | None  # None: half of the free memory
    device: str  # cpu or cuda
    threads: int
    seed: int
    out: Path
    work_dir: Path
    dry_run: bool
    save_student: bool
    force: bool
    json: bool

    @property
    def search(self) -> Search:
        """The choices that a search for the recipe has to respect."""
        return Search(self.method, self.experts, self.student, self.recover, self.prefer, self.plan_seconds)

    def for_budget(self, n_bytes: int | None) -> Job:
        """The same job with one of its budgets; None stands for the recipe's."""
        return replace(self, budgets=() if n_bytes is None else (n_bytes,))


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The values of the command line, each as its flag takes it.

    ``out`` defaults to a folder of the current one named after model and budget (or recipe), ``work_dir`` to the folder
    that ``out`` is in (unfinished work lies in ``OUT.work`` there), ``threads`` to the processors that this process may
    use.
    """

    budget: str | None = None
    model: str | None = None
    revision: str | None = None
    offline: bool = False
    budget_kind: str = defaults.BUDGET_KIND
    context: int = defaults.CONTEXT
    kv_type: str = defaults.KV_TYPE
    formats: str = defaults.FORMATS
    calibration: Path | None = None
    text: Path | None = None
    student: str = defaults.STUDENT
    method: str = defaults.METHOD
    experts: int | None = None
    quant: str | None = None
    quantizer: str = defaults.QUANTIZER
    imatrix: Path | None = None
    prefer: str = defaults.PREFER
    plan_time: str = defaults.PLAN_TIME
    recover: str = defaults.RECOVER
    recover_time: str = defaults.RECOVER_TIME
    require: Iterable[str] = ()
    recipe: Path | None = None
    memory: str | None = None
    device: str = defaults.DEVICE
    threads: int | None = None
    seed: int = defaults.SEED
    out: Path | None = None
    work_dir: Path | None = None
    dry_run: bool = False
    save_student: bool = False
    force: bool = False
    json: bool = False

    def job(self) -> Job:
        """The job, checked and with all defaults filled in.

        Raises:
            InputError: a value is wrong; the message names the flag.
        """
        if self.budget is None and self.recipe is None:
            raise InputError("--budget is missing: say how much memory the result may need, such as --budget 20GB")
        label = "".join(self.budget.split()) if self.budget is not None else Path(str(self.recipe)).stem
        out = self.out or Path(f"{_model_name(self.model)}-{label}")
        return Job(
            model=self.model,
            revision=self.revision,
            offline=self.offline,
            budgets=() if self.budget is None else _budgets(self.budget),
            budget_kind=_one_of("--budget-kind", self.budget_kind, BUDGET_KINDS),
            context=_context(self.context),
            kv_type=_one_of("--kv-type", self.kv_type.lower(), tuple(KV_TYPES)),
            formats=_formats(self.formats),
            calibration=_existing("--calibration", self.calibration),
            text=_existing("--text", self.text),
            student=_student(self.student, self.method, self.experts, self.recover),
            method=_one_of("--method", self.method, METHODS),
            experts=None if self.experts is None else _at_least_one("--experts", self.experts, "experts per layer"),
            quant=None if self.quant is None else _mix(self.quant.upper()),
            quantizer=_one_of("--quantizer", self.quantizer, QUANTIZERS),
            imatrix=_existing_file("--imatrix", self.imatrix),
            prefer=_one_of("--prefer", self.prefer, PREFERENCES),
            plan_seconds=parse_duration(self.plan_time, "--plan-time"),
            recover=_one_of("--recover", self.recover, RECOVERIES),
            recover_seconds=parse_duration(self.recover_time, "--recover-time"),
            require=parse_requirements(self.require),
            recipe=_existing_file("--recipe", self.recipe),
            memory_bytes=None if self.memory is None else parse_size(self.memory, "--memory"),
            device=_device(self.device),
            threads=checked_threads(self.threads),
            seed=_seed(self.seed),
            out=_folder_to_be("--out", out),
            work_dir=_folder_to_be("--work-dir", (self.work_dir or out.parent) / f"{out.name}.work"),
            dry_run=self.dry_run,
            save_student=self.save_student,
            force=self.force,
            json=self.json,
        )


def _mix(name: str) -> str:
    return ALIASES.get(name, _one_of("--quant", name, QUANT_TYPES))


def _budgets(text: str) -> tuple[int, ...]:
    """The sizes of ``20GB`` or ``8GB,12GB``.

    Raises:
        InputError: one is no size, or two are the same.
    """
    sizes = tuple(parse_size(part, "--budget") for part in text.split(","))
    if len(set(sizes)) < len(sizes):
        raise InputError(f"--budget: {shown(text)} names a size twice; give each once")
    return sizes


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise InputError(f"{flag}: '{shown(value)}' is not known; choose one of {', '.join(choices)}")
    return value


def _at_least_one(flag: str, value: int, of_what: str) -> int:
    if value < 1:
        raise InputError(f"{flag}: {value} {of_what} are too few; give 1 or more")
    return value


def _context(tokens: int) -> int:
    if tokens < LEAST_CONTEXT:
        raise InputError(f"--context: {tokens} tokens are too few to measure anything; give {LEAST_CONTEXT} or more")
    return tokens


def _student(student: str, method: str, experts: int | None, recover: str) -> str:
    """Checks the flags that exclude a dense student, which has one size and no routers."""
    _one_of("--student", student, STUDENTS)
    if student == "dense":
        if experts is not None:
            raise InputError("--experts: a dense student has none; leave --experts out, or --student dense")
        if method != "auto":
            raise InputError(
                f"--method: a dense student takes neurons from the experts of the highest scores, which {method} does "
                "not choose; leave --method out, or --student dense"
            )
        if recover.startswith("router"):
            raise InputError("--recover: a dense student has no routers to teach; use auto, experts, adapters or none")
    return student


def _formats(text: str) -> tuple[str, ...]:
    wanted = {_one_of("--formats", name.strip().lower(), FORMATS) for name in text.split(",")}
    return tuple(name for name in FORMATS if name in wanted)


def _existing(flag: str, path: Path | None) -> Path | None:
    if path is not None and not _exists(flag, path):
        raise InputError(f"{flag}: {path} does not exist")
    return path


def _existing_file(flag: str, path: Path | None) -> Path | None:
    if _existing(flag, path) is not None and path is not None and not path.is_file():
        raise InputError(f"{flag}: {path} is not a file")
    return path


def _exists(flag: str, path: Path) -> bool:
    """True if the path exists.

    Raises:
        InputError: no file system can have such a path, or it cannot be accessed.
    """
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{flag}: {shown(str(path))} cannot be used ({why}); choose another place") from None


def _folder_to_be(flag: str, path: Path) -> Path:
    if path.name in ("", ".."):
        raise InputError(f"{flag}: {str(path)!r} has no name of its own; give the name of a new folder")
    for part in path.parts:
        if len(os.fsencode(part)) > _LONGEST_NAME:
            raise InputError(
                f"{flag}: {part[:20]}... has {len(os.fsencode(part))} bytes; a name may have {_LONGEST_NAME}, since "
                "files beside it have longer ones"
            )
    for folder in (path, *path.parents):
        if _exists(flag, folder):
            if not folder.is_dir():
                raise InputError(f"{flag}: {folder} is a file, not a folder; choose another place")
            break
    return path


def parse_requirements(pairs: Iterable[str], allowed: Collection[str] = tuple(REQUIREMENTS)) -> dict[str, float]:
    """Thresholds of ``--require NAME=VALUE``, by name; several may be in one, separated by commas.

    Raises:
        InputError: a pair is malformed, given twice, or its name is not among ``allowed``.
    """
    thresholds: dict[str, float] = {}
    for pair in (pair for text in pairs for pair in text.split(",")):
        name, _, number = pair.partition("=")
        name = name.strip()
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not re.fullmatch(r"[a-z][a-z0-9_.]*", name) or not math.isfinite(value):
            raise InputError(f"--require: '{shown(pair)}' is not NAME=VALUE with a number as value, such as kld=0.1")
        if name not in allowed:
            known = ", ".join(f"{name} ({REQUIREMENTS[name]})" for name in allowed)
            raise InputError(f"--require: there is no {shown(name)}; known are {known}")
        if name in thresholds:
            raise InputError(f"--require: {name} is given twice; keep one")
        thresholds[name] = value
    return thresholds


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed: {seed} is outside 0 ... {2**32 - 1}")
    return seed


def _device(name: str) -> str:
    import torch

    _one_of("--device", name, DEVICES)
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise InputError("--device cuda: this torch sees no CUDA device; install a CUDA build, or use --device cpu")
    return ("cuda" if has_cuda else "cpu") if name == "auto" else name


def _model_name(model: str | None) -> str:
    """The last part of a folder's path or of a hub id."""
    if model is None:
        return _BUNDLED_MODEL_NAME
    return Path(model_name(model)).name or "model"
