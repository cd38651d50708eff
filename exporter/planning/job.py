"""A job: everything that the command line gives, checked, in one frozen value.

Everything that can be checked without opening the model is checked here, so a wrong flag fails at once and by name.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, get_args

from compressors.calibration.mixture import WeightedText, parse_mixture
from compressors.model.errors import InputError
from compressors.model.names import shown
from compressors.shrink.registry import EXPERT_METHODS, KEEPS_EXPERTS, LIGHT_MOE
from exporter.estimating.durations import parse_duration
from exporter.estimating.sizes import parse_size
from exporter.file_names import WORK_SUFFIX
from exporter.hub_push import checked_repository
from exporter.machines.known import budget_of
from exporter.planning.flags import Flags, PlainFlags
from exporter.planning.plan import Search
from exporter.planning.recipe import BudgetKind, KvType, Quantizer, Student
from exporter.planning.recovery import RECOVERIES
from exporter.processes.team import checked_threads
from exporter.publishing.model_name import model_name
from exporter.writing.gguf.mixes import ALIASES, MIXES
from validate.metrics.verdict import REQUIREMENTS
from validate.runtimes.cost import LEAST_CONTEXT

__all__ = ["Flags", "Job", "checked_job", "parse_requirements"]

_DEVICES: Final = ("auto", "cpu", "cuda")
_FORMATS: Final = ("gguf", "onnx")
_METHODS: Final = ("auto", *EXPERT_METHODS, *KEEPS_EXPERTS)
_PREFERENCES: Final = ("quality", "speed")

_BUNDLED_MODEL_NAME = "demo"
_LONGEST_NAME = 230
"""Bytes of a name; most systems allow 255, and files beside OUT have longer names, such as OUT.recipe.yaml.partial."""


@dataclass(frozen=True, kw_only=True)
class Job(PlainFlags):
    """One run of ``moe-export``, as :meth:`Flags.job` makes it.

    Without ``model`` it takes the bundled model, without ``calibration`` the bundled text.
    """

    calibration: tuple[WeightedText, ...]  # empty: the bundled text
    budgets: tuple[int, ...]  # bytes; empty: the recipe's
    formats: tuple[str, ...]  # gguf, onnx or both, in that order
    plan_seconds: int  # time for measuring in the search
    removed_share: float | None  # of the experts' bytes, by replacing them; None: as little as fits
    recover_seconds: int
    require: Mapping[str, float]  # thresholds that differ from the default
    memory_bytes: int | None  # None: half of the free memory
    shard_bytes: int | None  # largest part of a GGUF file; None: it is not cut
    threads: int
    out: Path
    work_dir: Path

    @property
    def search(self) -> Search:
        """The choices that a search for the recipe has to respect."""
        return Search(
            self.method,
            self.experts,
            self.student,
            self.recover,
            self.prefer,
            self.plan_seconds,
            self.removed_share,
            self.materialize,
        )

    def for_budget(self, n_bytes: int | None) -> Job:
        """The same job with one of its budgets; None stands for the recipe's."""
        return replace(self, budgets=() if n_bytes is None else (n_bytes,))


def checked_job(flags: Flags) -> Job:
    """The job that the flags ask for, with all defaults filled in.

    Raises:
        InputError: a value is wrong; the message names the flag.
    """
    if flags.budget is None and flags.recipe is None:
        raise InputError("--budget is missing: say how much memory the result may need, such as --budget 20GB")
    label = "".join(flags.budget.split()) if flags.budget is not None else Path(str(flags.recipe)).stem
    out = flags.out or Path(f"{_model_name(flags.model)}-{label}")
    return Job(
        **_plain_values(flags),
        calibration=_calibration(flags.calibration),
        budgets=() if flags.budget is None else _budgets(flags.budget),
        formats=_formats_for(flags),
        plan_seconds=parse_duration(flags.plan_time, "--plan-time"),
        removed_share=_removed_share(flags),
        recover_seconds=parse_duration(flags.recover_time, "--recover-time"),
        require=parse_requirements(flags.require),
        memory_bytes=None if flags.memory is None else parse_size(flags.memory, "--memory"),
        shard_bytes=None if flags.shard_size is None else parse_size(flags.shard_size, "--shard-size"),
        threads=checked_threads(flags.threads),
        out=_folder_to_be("--out", out),
        work_dir=_folder_to_be("--work-dir", (flags.work_dir or out.parent) / f"{out.name}{WORK_SUFFIX}"),
    )


def _plain_values(flags: Flags) -> dict[str, Any]:
    """The values that a job holds as they are given, each checked."""
    experts, quant = flags.experts, flags.quant
    return {field.name: getattr(flags, field.name) for field in fields(PlainFlags)} | {
        "budget_kind": _one_of("--budget-kind", flags.budget_kind, get_args(BudgetKind)),
        "context": _context(flags.context),
        "kv_type": _one_of("--kv-type", flags.kv_type.lower(), get_args(KvType)),
        "text": _existing("--text", flags.text),
        "student": _student(flags.student, flags.method, experts, flags.recover),
        "method": _one_of("--method", flags.method, _METHODS),
        "experts": None if experts is None else _at_least_one("--experts", experts, "experts per layer"),
        "quant": None if quant is None else _mix(quant.upper()),
        "quantizer": _one_of("--quantizer", flags.quantizer, get_args(Quantizer)),
        "imatrix": _existing_file("--imatrix", flags.imatrix),
        "prefer": _one_of("--prefer", flags.prefer, _PREFERENCES),
        "recover": _one_of("--recover", flags.recover, RECOVERIES),
        "recipe": _existing_file("--recipe", flags.recipe),
        "push": None if flags.push is None else checked_repository(flags.push, offline=flags.offline),
        "device": _device(flags.device),
        "seed": _seed(flags.seed),
    }


def _mix(name: str) -> str:
    return ALIASES.get(name, _one_of("--quant", name, (*MIXES, *ALIASES)))


def _budgets(text: str) -> tuple[int, ...]:
    """The sizes of ``20GB``, ``8GB,12GB`` or ``16gb-mac``.

    Raises:
        InputError: one is not a size or a machine, or two are the same.
    """
    sizes = tuple(budget_of(part) or parse_size(part, "--budget") for part in text.split(","))
    if len(set(sizes)) < len(sizes):
        raise InputError(f"--budget: {shown(text)} names a size twice; give each once")
    return sizes


def _calibration(given: Path | Iterable[str | Path]) -> tuple[WeightedText, ...]:
    """The texts of ``--calibration``.

    Raises:
        InputError: a path does not exist, or a weight is wrong.
    """
    texts = parse_mixture(given)
    for text in texts:
        if not _exists("--calibration", text.path):
            raise InputError(
                f"--calibration: {text.path} does not exist"
                + ("" if text.weight == 1 else "; the number behind the last colon is its weight")
            )
    return texts


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
    _one_of("--student", student, get_args(Student))
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
    wanted = {_one_of("--formats", name.strip().lower(), _FORMATS) for name in text.split(",")}
    return tuple(name for name in _FORMATS if name in wanted)


def _formats_for(flags: Flags) -> tuple[str, ...]:
    """The formats, refused where they cannot hold what the method makes."""
    formats = _formats(flags.formats)
    if flags.materialize and flags.method != LIGHT_MOE.name:
        raise InputError(f"--materialize is about replaced experts: give it with --method {LIGHT_MOE.name}")
    if flags.method == LIGHT_MOE.name and "gguf" in formats and not flags.materialize:
        raise InputError(
            f"--method {LIGHT_MOE.name}: GGUF cannot hold experts that share a base; use --formats onnx, or "
            "--materialize to write every expert whole, which saves nothing"
        )
    return formats


def _removed_share(flags: Flags) -> float | None:
    """The share of ``--remove 30%``, as a part of 1."""
    text = flags.remove
    if text is None:
        return None
    if flags.method != LIGHT_MOE.name:
        raise InputError(f"--remove is about replaced experts: give it with --method {LIGHT_MOE.name}")
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = math.nan
    if not 0 < percent < 100:
        raise InputError(f"--remove: '{shown(text)}' is not a share between 0% and 100%, such as 30%")
    return percent / 100


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
        if os.path.islink(os.path.realpath(folder)):  # it ends at a link only where links lead to each other
            raise InputError(f"{flag}: {folder} is a link that leads to itself; choose another place")
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
    _one_of("--device", name, _DEVICES)
    has_cuda = name != "cpu" and _has_cuda()
    if name == "cuda" and not has_cuda:
        raise InputError("--device cuda: this torch sees no CUDA device; install a CUDA build, or use --device cpu")
    return ("cuda" if has_cuda else "cpu") if name == "auto" else name


def _has_cuda() -> bool:
    """True if torch can compute on a GPU. It takes a second to import, so it is asked only where there is a driver."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


def _model_name(model: str | None) -> str:
    """The last part of a folder's path or of a hub id."""
    if model is None:
        return _BUNDLED_MODEL_NAME
    return Path(model_name(model)).name or "model"
