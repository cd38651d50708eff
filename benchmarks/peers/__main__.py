"""``make peers``: results of other tools with our files, and with the same models.

optimum's ORTModelForCausalLM generates from both trained models, exported to ONNX; the reference tokens are stock
transformers' in float32. llama.cpp's converter writes the F32 GGUF file of every family
(:mod:`benchmarks.peers.llama_converter`). llama-perplexity prints the statistics of our GGUF files
(:mod:`benchmarks.peers.llama_perplexity`). llm-compressor's REAP modifier and our sequential pruning choose survivors
for the same tokens (:mod:`benchmarks.peers.llm_compressor`). The Python tools work with a transformers of their own, so
each gets a virtual environment; llama-perplexity is compiled. All are kept between runs. Writes
``benchmarks/results/peers.md``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers import llama_converter, llama_perplexity, llm_compressor
from benchmarks.peers.environment import REPOSITORY, environment
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import write_onnx

_PACKAGES = ("torch==2.13.0", "optimum-onnx==0.1.0", "transformers==4.57.6", "onnxruntime==1.31.1")
_MODELS = {"fine": REPOSITORY / "exporter/demo/model", "coarse": REPOSITORY / "tests/fixtures/coarse"}
_PROMPTS = ("The history of", "Returns a new list of the", "In the beginning God", "def main():\n")
_NEW_TOKENS = 32


def main() -> int:
    """Asks all tools and returns the exit code: 1 if a token, a tensor, a key, a statistic or a survivor differs."""
    lines = ["# The same models in other tools", ""]
    passed = True
    for compare in (_compare_onnx, llama_converter.compare, llama_perplexity.compare, llm_compressor.compare):
        section, agrees = compare()
        lines += section
        passed &= agrees
    results = REPOSITORY / "benchmarks/results"
    results.mkdir(exist_ok=True)
    (results / "peers.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return 0 if passed else 1


def _compare_onnx() -> tuple[list[str], bool]:
    """The lines of the report, and whether optimum generates the tokens it should."""
    python = environment("optimum", _PACKAGES)
    rows = []
    for name, source in _MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            student = Student.teacher(Checkpoint(source))
            out = Path(folder) / "onnx"
            write_onnx(student, "F32", out, importance=None, threads=2, progress=None)
            write_client_files(student, out)
            expected = Path(folder) / "expected.json"
            expected.write_text(json.dumps(_reference(source)), encoding="utf-8")
            script = REPOSITORY / "benchmarks/peers/optimum_onnx.py"
            result = subprocess.run(
                [python, script, out, expected], stdout=subprocess.PIPE, text=True, check=False, cwd=folder
            )
        rows.append((name, json.loads(result.stdout.splitlines()[-1]) if result.stdout else {}))
        print(*rows[-1])
    return _onnx_section(rows), all(outcome and all(outcome.values()) for _, outcome in rows)


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


def _onnx_section(rows: list[tuple[str, dict[str, bool]]]) -> list[str]:
    words = {True: "equal", False: "DIFFERENT", None: "failed to run"}
    return [
        "## Our ONNX folders in optimum",
        "",
        f"{', '.join(_PACKAGES)}: greedy tokens of `ORTModelForCausalLM` against stock transformers in float32,",
        f"{len(_PROMPTS)} prompts of {_NEW_TOKENS} tokens each. Written by `make peers`, as is all of this page.",
        "",
        "| model | each prompt alone | all prompts as one batch, padded on the left |",
        "|---|---|---|",
        *(
            f"| {name} | {words[outcome.get('single')]} | {words[outcome.get('left_padded_batch')]} |"
            for name, outcome in rows
        ),
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
