"""``make peers``: results of other tools with our files, and with the same models.

optimum's ORTModelForCausalLM generates from our ONNX files (:mod:`benchmarks.peers.optimum_folders`). llama.cpp's
converter writes the F32 GGUF file of every family (:mod:`benchmarks.peers.llama_converter`). llama-perplexity prints
the statistics of our GGUF files (:mod:`benchmarks.peers.llama_perplexity`). llm-compressor's REAP modifier and our
sequential pruning choose survivors for the same tokens (:mod:`benchmarks.peers.llm_compressor`). The Python tools work
with a transformers of their own, so each gets a virtual environment; llama-perplexity is compiled. All are kept between
runs. Writes ``benchmarks/results/peers.md``.
"""

from __future__ import annotations

import sys

from benchmarks.peers import llama_converter, llama_perplexity, llm_compressor, optimum_folders
from benchmarks.peers.environment import REPOSITORY


def main() -> int:
    """Asks all tools and returns the exit code: 1 if a token, a tensor, a key, a statistic or a survivor differs."""
    lines = ["# The same models in other tools", ""]
    passed = True
    for compare in (optimum_folders.compare, llama_converter.compare, llama_perplexity.compare, llm_compressor.compare):
        section, agrees = compare()
        lines += section
        passed &= agrees
    results = REPOSITORY / "benchmarks/results"
    results.mkdir(exist_ok=True)
    (results / "peers.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
