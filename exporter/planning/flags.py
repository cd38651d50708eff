"""The flags of an export, each with its default and its help. They are defined here and nowhere else.

The command line makes its options from them. Nothing large is imported, so that ``--help`` answers at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from exporter.planning.job import Job

__all__ = ["Flags", "PlainFlags", "command_of"]

_Default = TypeVar("_Default")


def _flag(default: _Default, help: str, *, metavar: str | None = None, in_recipe: bool = False) -> _Default:
    """A flag.

    Args:
        default: the value without the flag.
        help: the text of ``--help``; it says what None stands for.
        metavar: the name of its value in the help, if that is not the value's type.
        in_recipe: True if a recipe holds this choice, so the flag cannot stand beside ``--recipe``.
    """
    return field(default=default, metadata={"help": help, "metavar": metavar, "in_recipe": in_recipe})


@dataclass(frozen=True, kw_only=True)
class PlainFlags:
    """The flags whose values a job holds as they are given, once they are checked."""

    model: str | None = None
    revision: str | None = _flag(None, "Revision of a hub model.")
    offline: bool = _flag(False, "Take hub models from the cache only.")
    budget_kind: str = _flag("total", "total: memory at run time; file: file size.", in_recipe=True)
    context: int = _flag(8192, "Tokens of KV cache to count (at most the model's).", in_recipe=True)
    kv_type: str = _flag("f16", "Type of llama.cpp's KV cache.", in_recipe=True)
    text: Path | None = _flag(None, "Held-out text for the report.")
    student: str = _flag(
        "moe",
        "moe, or dense: one feed-forward in each layer, as wide as the experts that a token uses.",
        in_recipe=True,
    )
    method: str = _flag(
        "auto",
        "How it gets smaller: reap, removal-error, ream, hc-smoe, slim, lightmoe ...; docs/compression.md has all.",
        in_recipe=True,
    )
    experts: int | None = _flag(None, "Experts to keep per layer.  [default: as many as fit]", in_recipe=True)
    materialize: bool = _flag(
        False, "With --method lightmoe: write every expert whole, as GGUF needs it; it saves nothing.", in_recipe=True
    )
    quant: str | None = _flag(
        None,
        "A mix of llama-quantize, such as Q4_K_M.  [default: types by tensor]",
        metavar="TYPE",
        in_recipe=True,
    )
    quantizer: str = _flag(
        "feedback",
        "feedback: each code makes up for the errors of those before; kernel: llama-quantize's codes.",
        in_recipe=True,
    )
    imatrix: Path | None = _flag(None, "llama.cpp's importance matrix.  [default: from the calibration text]")
    prefer: str = _flag("quality", "What types are chosen by: quality or speed.", in_recipe=True)
    recover: str = _flag(
        "auto",
        "auto, none, router, top-experts, experts or adapters; docs/recovery.md has all.",
        in_recipe=True,
    )
    recipe: Path | None = _flag(None, "Follow this recipe, which holds every choice.")
    device: str = _flag("auto", "Where calibration and recovery compute: cpu or cuda.")
    seed: int = _flag(42, "Order of training blocks.", in_recipe=True)
    dry_run: bool = _flag(False, "Print the plan and write the recipe beside OUT; read no weights.")
    keep_mtp: bool = _flag(
        False, "Keep the layer that predicts further tokens (MTP), with which llama.cpp drafts.", in_recipe=True
    )
    save_student: bool = _flag(False, "Also write the student as a Hugging Face checkpoint.", in_recipe=True)
    push: str | None = _flag(None, "Upload the folder to the hub if every check passed.", metavar="ORG/NAME")
    floors: bool = _flag(False, "Also run the original in each runtime: what the runtime alone changes.")
    force: bool = _flag(False, "Start although disk or memory look too small.")
    json: bool = _flag(False, "Print report.json instead of a table.")


@dataclass(frozen=True, kw_only=True)
class Flags(PlainFlags):
    """The values of the command line, each as its flag takes it.

    ``out`` defaults to a folder in the current one, named after model and budget (or recipe), ``work_dir`` to the
    folder that contains ``out`` (unfinished work lies in ``OUT.work`` there), ``threads`` to the processors that this
    process may use.
    """

    budget: str | None = _flag(
        None, "Memory the result may need, such as 20GB, 18.6GiB or 16gb-mac.", metavar="SIZE[,...]", in_recipe=True
    )
    calibration: Path | Iterable[str | Path] = _flag(
        (),
        "Text for statistics and recovery: a file, a folder, or chats (JSONL); weights mix several.",
        metavar="PATH[:WEIGHT]",
    )
    formats: str = _flag("gguf,onnx", "What to write.", in_recipe=True)
    remove: str | None = _flag(
        None,
        "With --method lightmoe: part of the experts to remove, such as 30%.  [default: as little as fits]",
        metavar="SHARE",
        in_recipe=True,
    )
    plan_time: str = _flag("10m", "Most time for measuring candidates.", in_recipe=True)
    recover_time: str = _flag("30m", "Most time for recovery.", in_recipe=True)
    require: Iterable[str] = _flag(
        (),
        "Thresholds: kld, top1, routing, perplexity_change; of an export also loops.",
        metavar="NAME=VALUE[,...]",
    )
    memory: str | None = _flag(None, "Memory this run may use.  [default: half of what is free]", metavar="SIZE")
    shard_size: str | None = _flag(
        None, "Largest part of a GGUF file, such as 45GB; more become several.", metavar="SIZE"
    )
    threads: int | None = _flag(None, "Threads.  [default: all processors]", in_recipe=True)
    out: Path | None = _flag(None, "Output folder.  [default: MODEL-BUDGET]")
    work_dir: Path | None = _flag(None, "Where unfinished work is kept, as OUT.work.  [default: beside OUT]")

    def job(self) -> Job:
        """The job, checked and with all defaults filled in.

        Raises:
            InputError: a value is wrong; the message names the flag.
        """
        from exporter.planning.job import checked_job  # it imports torch

        return checked_job(self)


def command_of(flags: Flags) -> str:
    """The command line that has these flags, for the report of a run that was started from Python."""
    words = ["moe-export", *([] if flags.model is None else [flags.model])]
    for definition in fields(flags):
        value = getattr(flags, definition.name)
        if definition.name == "model" or value == definition.default:
            continue
        name = f"--{definition.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(name)
        elif definition.default == ():
            entries = [value] if isinstance(value, str | Path) else value
            words += [word for entry in entries for word in (name, str(entry))]
        else:
            words += [name, str(value)]
    return shlex.join(words)
