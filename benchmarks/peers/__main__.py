"""``make peers``: exports both trained models to ONNX and has optimum's ORTModelForCausalLM generate from them.

optimum-onnx does not work with transformers 5, so it gets a virtual environment of its own, kept between runs. The
reference tokens are stock transformers' in float32. Writes ``benchmarks/results/peers.md``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressors.model.checkpoint import Checkpoint
from compressors.model.student import Student
from exporter.onnx.clients import write_client_files
from exporter.onnx.writer import write_onnx

_REPOSITORY = Path(__file__).parents[2]
_ENVIRONMENT = _REPOSITORY / ".venv-optimum"
_PACKAGES = ("torch==2.13.0", "optimum-onnx==0.1.0", "transformers==4.57.6", "onnxruntime==1.31.1")
_MODELS = {"fine": _REPOSITORY / "exporter/demo/model", "coarse": _REPOSITORY / "tests/fixtures/coarse"}
_PROMPTS = ("The history of", "Returns a new list of the", "In the beginning God", "def main():\n")
_NEW_TOKENS = 32


def main() -> int:
    """Compares both models and returns the exit code: 1 if any token differs."""
    python = _environment()
    rows = []
    for name, source in _MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            student = Student.teacher(Checkpoint(source))
            out = Path(folder) / "onnx"
            write_onnx(student, "F32", out, importance=None, context_length=None, threads=2, progress=None)
            write_client_files(student, out)
            expected = Path(folder) / "expected.json"
            expected.write_text(json.dumps(_reference(source)), encoding="utf-8")
            script = _REPOSITORY / "benchmarks/peers/optimum_onnx.py"
            result = subprocess.run(
                [python, script, out, expected], stdout=subprocess.PIPE, text=True, check=False, cwd=folder
            )
        rows.append((name, json.loads(result.stdout.splitlines()[-1]) if result.stdout else {}))
        print(*rows[-1])
    _write_results(rows)
    passed = all(outcome and all(outcome.values()) for _, outcome in rows)
    return 0 if passed else 1


def _environment() -> Path:
    python = _ENVIRONMENT / "bin/python"
    if not python.exists():
        venv.create(_ENVIRONMENT, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *_PACKAGES], check=True)
    return python


@torch.no_grad()
def _reference(source: Path) -> list[dict[str, list[int]]]:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    cases = []
    for text in _PROMPTS:
        prompt = torch.tensor([tokenizer.encode(text)])
        output = model.generate(
            prompt, min_new_tokens=_NEW_TOKENS, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        cases.append({"prompt": prompt[0].tolist(), "generated": output[0, prompt.shape[1] :].tolist()})
    return cases


def _write_results(rows: list[tuple[str, dict[str, bool]]]) -> None:
    lines = [
        "# Our ONNX folders in other tools",
        "",
        f"{', '.join(_PACKAGES)}: greedy tokens of `ORTModelForCausalLM` against stock transformers in float32,",
        f"{len(_PROMPTS)} prompts of {_NEW_TOKENS} tokens each. Written by `make peers`.",
        "",
        "| model | each prompt alone | all prompts as one batch, padded on the left |",
        "|---|---|---|",
    ]
    words = {True: "equal", False: "DIFFERENT", None: "failed to run"}
    for name, outcome in rows:
        lines.append(f"| {name} | {words[outcome.get('single')]} | {words[outcome.get('left_padded_batch')]} |")
    folder = _REPOSITORY / "benchmarks/results"
    folder.mkdir(exist_ok=True)
    (folder / "peers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
