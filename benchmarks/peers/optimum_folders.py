"""Our ONNX folders in optimum's ORTModelForCausalLM and the AutoTokenizer of transformers 4.57.

The trained models, these with experts on shared bases, and a tiny random one for each row of
``tests/families/rows.py`` that has an ONNX file. The reference tokens of the trained models are stock transformers' in
float32; those of the others are ONNX Runtime's with the same file, which tests compare with torch.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.environment import REPOSITORY, environment
from compressors.model.config.special_tokens import special_tokens
from compressors.model.description.onnx_cache import WithStates
from compressors.model.errors import UnsupportedError
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import write_onnx
from tests.exporter.writing.onnx.on_bases import student_on_bases
from tests.families.checkpoints import write_model
from tests.families.rows import ROWS
from validate.runtimes.onnx import OnnxRuntimeBackend

__all__ = ["PACKAGES", "compare"]

PACKAGES = ("torch==2.13.0", "optimum-onnx==0.1.0", "transformers==4.57.6", "onnxruntime==1.31.1")
_MODELS = {"fine": REPOSITORY / "exporter/demo/model", "coarse": REPOSITORY / "tests/fixtures/coarse"}
_PROMPTS = ("The history of", "Returns a new list of the", "In the beginning God", "def main():\n")
_NEW_TOKENS = 32
_RANK = 8  # of the adapters of experts on shared bases
_CHECKS = ("tokenizer", "single", "left_padded_batch")


def compare() -> tuple[list[str], bool]:
    """The lines of the report, and whether every model that optimum takes generates the tokens it should."""
    python = environment("optimum", PACKAGES)
    with tempfile.TemporaryDirectory() as place:
        folders = list(_folders(Path(place)))
        script = REPOSITORY / "benchmarks/peers/optimum_onnx.py"
        command = [python, script, *(folder for _, folder, _ in folders)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=place)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    rows = [(name, has_states, result) for (name, _, has_states), result in zip(folders, results, strict=True)]
    for name, has_states, result in rows:
        print(name, "with recurrent states" if has_states else "", result)
    known = ("trained", "on shared bases")
    trained = all(result[check] is True for name, _, result in rows for check in _CHECKS if name.endswith(known))
    runs = all(result[check] is not False for *_, result in rows for check in _CHECKS)
    return _section(rows), trained and runs and all(result["tokenizer"] is True for *_, result in rows)


def _folders(place: Path) -> Iterator[tuple[str, Path, bool]]:
    """Names, exported folders, and whether the model has states beside keys and values."""
    for name, source in _MODELS.items():
        student = Student.teacher(Checkpoint(source))
        yield f"{name}, trained", _export(student, place / f"{name}-trained", _by_transformers(source)), False
        base_of = (None, *(expert % 2 for expert in range(student.spec.n_experts - 1)))
        on_bases = student_on_bases(source, base_of, _RANK)
        yield f"{name}, on shared bases", _export(on_bases, place / f"{name}-bases", None), False
    for family, row in ROWS.items():
        source = place / f"{family}-source"
        write_model(family, row, source, _MODELS["fine"])
        student = Student.teacher(Checkpoint(source))
        try:
            folder = _export(student, place / family, None)
        except UnsupportedError:
            continue  # no ONNX file holds it
        has_states = any(isinstance(layer.mixer, WithStates) for layer in student.spec.layers)
        yield family, folder, has_states


def _export(student: Student, place: Path, expected: list[dict[str, Any]] | None) -> Path:
    folder = place / "onnx"
    write_onnx(student, "F32", folder, importance=None, threads=2, progress=None)
    write_client_files(student, folder)
    cases = expected or _by_onnx_runtime(folder)
    (place / "expected.json").write_text(json.dumps(cases), encoding="utf-8")
    return folder


def _by_onnx_runtime(folder: Path) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = OnnxRuntimeBackend(folder, threads=2)
    ends = list(special_tokens(folder, len(tokenizer)).ends)
    prompts = {text: tokenizer.encode(text) for text in _PROMPTS}

    def choose(logits_V: npt.NDArray[np.float32]) -> int:
        """As transformers does while a text is shorter than ``min_new_tokens``: no token that ends it."""
        allowed_V = logits_V.copy()
        allowed_V[ends] = -np.inf
        return int(allowed_V.argmax())

    return [
        {"text": text, "prompt": prompt, "generated": backend.generate(prompt, _NEW_TOKENS, choose)}
        for text, prompt in prompts.items()
    ]


@torch.no_grad()
def _by_transformers(source: Path) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    cases = []
    for text in _PROMPTS:
        prompt = torch.tensor([tokenizer.encode(text)])
        output = model.generate(
            prompt, min_new_tokens=_NEW_TOKENS, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        generated = output[0, prompt.shape[1] :].tolist()
        cases.append({"text": text, "prompt": prompt[0].tolist(), "generated": generated})
    return cases


def _why(error: str) -> str:
    """An error in a few words."""
    if "does not recognize this architecture" in error:
        return "unknown to transformers 4.57"
    return error.replace("|", "/")


def _section(rows: list[tuple[str, bool, Mapping[str, bool | str]]]) -> list[str]:
    words = {True: "equal", False: "DIFFERENT"}
    return [
        "## Our ONNX folders in optimum",
        "",
        f"{', '.join(PACKAGES)}: tokens of `AutoTokenizer`, and greedy tokens of `ORTModelForCausalLM`,",
        f"{len(_PROMPTS)} prompts of {_NEW_TOKENS} tokens each. The reference is stock transformers in float32 for the",
        "trained models, and ONNX Runtime with the same file for the tiny random ones. If optimum refuses a model,",
        "its error stands there. Written by `make peers`, as is all of this page.",
        "",
        "| model | recurrent states | tokenizer | each prompt alone | all prompts as one batch, padded on the left |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {'yes' if has_states else 'no'} | "
            + " | ".join(words.get(result[check], _why(str(result[check]))) for check in _CHECKS)
            + " |"
            for name, has_states, result in rows
        ),
        "",
    ]
