"""A small original, its files, and the test whether a damage is found and named."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.torch import save_file

from compressors.calibration.splits import tokenize_heldout
from compressors.model.errors import MoeExportError
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from exporter.hub import bundled_text
from exporter.validation.static_checks import check_description, check_weights
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import write_onnx
from validate.files.model_file import find_model_file

__all__ = ["Outcome", "Result", "Workshop", "judge", "make_original"]

_FORK = multiprocessing.get_context("fork")
_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


class Outcome(StrEnum):
    """The result of one damage."""

    NAMED = "found and named"
    FOUND = "found, not named"
    MISSED = "missed"


@dataclass(frozen=True)
class Result:
    """One damage of one file."""

    file: str  # such as "GGUF Q8_0"
    kind: str  # weights, metadata, tokenizer, attributes, configuration
    what: str
    outcome: Outcome
    said: str  # the first symptom, or the refusal


@dataclass(frozen=True)
class Workshop:
    """An original of two layers, and text of it."""

    source: Source
    student: Student
    chunks_BT: npt.NDArray[np.int64]

    @classmethod
    def open(cls, checkpoint: Path, n_experts: int | None = None, n_chunks: int = 1) -> Workshop:
        """A workshop with the first ``n_experts`` experts of a checkpoint, or all of them."""
        source = open_source(checkpoint)
        kept = range(n_experts or source.spec.n_experts)
        student = Student(source, ExpertMap.keeping(source.spec.n_experts, [kept] * source.spec.n_layers))
        _, blocks = tokenize_heldout(bundled_text("heldout"), checkpoint)
        return cls(source, student, blocks.leading(1).tokens_BT.numpy()[:n_chunks])

    def write(self, student: Student, file_format: str, preset: str, path: Path) -> None:
        """Writes a file; what was there is gone."""
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        if file_format == "gguf":
            write_gguf(student, preset, path, name="x", threads=1)
        else:
            write_onnx(student, preset, path, threads=1)
            write_client_files(student, path)


def judge(workshop: Workshop, path: Path, file: str, kind: str, what: str, names: Sequence[str]) -> Result:
    """Whether the static checks fail, and a symptom has one of ``names`` in it; a refusal counts as well.

    llama.cpp dies of some vocabularies. The command asks it in a process of its own, and so does this.
    """
    if path.suffix == ".gguf" and kind.startswith("tokenizer"):
        os.environ["GGML_NO_BACKTRACE"] = "1"
        receiver, sender = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=lambda: sender.send(_seen(workshop, path, kind)))
        process.start()
        sender.close()
        try:
            said, has_failed = receiver.recv()
        except EOFError:
            said, has_failed = ["llama.cpp died of it"], True
        process.join()
    else:
        said, has_failed = _seen(workshop, path, kind)
    if not has_failed:
        return Result(file, kind, what, Outcome.MISSED, "")
    named = [sentence for sentence in said if any(name.lower() in sentence.lower() for name in names)]
    outcome = Outcome.NAMED if named else Outcome.FOUND
    return Result(file, kind, what, outcome, [*named, *said, ""][0])


def _seen(workshop: Workshop, path: Path, kind: str) -> tuple[list[str], bool]:
    """Symptoms, or the refusal; and whether a check fails."""
    try:
        found = find_model_file(path)
        assert found is not None, path
        if kind == "weights":
            findings = check_weights(found, workshop.student)
        else:
            findings = check_description(found, workshop.source, workshop.student.spec, workshop.chunks_BT)
    except MoeExportError as error:
        return [str(error)], True
    return findings.symptoms, not all(check.passed for check in findings.checks)


def make_original(model: Path, folder: Path, n_layers: int = 2) -> Path:
    """Cuts the first layers out of a trained model, and gives it a chat template."""
    folder.mkdir(parents=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": n_layers}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    shutil.copyfile(model / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"chat_template": _TEMPLATE, "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - the reader is not a mapping
                if not name.startswith("model.layers.") or int(name.split(".")[2]) < n_layers:
                    tensors[name] = reader.get_tensor(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
