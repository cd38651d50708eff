"""Compares the time of error feedback with that of ggml's kernels: experts of OLMoE's shape, one thread, CPU seconds.

    python -m benchmarks.feedback [--experts 2] [TYPE ...]

Weights and inputs are random: neither the kernels' time nor ours depends much on them. Our time includes the factors of
the second moments: gate and up share them, down has its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from compressors.quantize import GGMLQuantizationType
from compressors.quantize.feedback import TYPES_WITH_FEEDBACK, Feedback, quantize_rows_with_feedback
from compressors.quantize.kernels import quantize_rows

_HIDDEN_SIZE, _WIDTH, _TOKENS = 2048, 1024, 1000


@dataclass(frozen=True)
class _Expert:
    """An expert's matrices, and the second moments of their inputs."""

    gate_up: tuple[torch.Tensor, torch.Tensor]
    input_moments: torch.Tensor
    down: torch.Tensor
    neuron_moments: torch.Tensor


def _expert(seed: int) -> _Expert:
    generator = torch.Generator().manual_seed(seed)

    def weights(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    def moments(columns: int) -> torch.Tensor:
        inputs = torch.randn(_TOKENS, columns, generator=generator) * (torch.rand(columns, generator=generator) + 0.2)
        return inputs.T @ inputs / _TOKENS

    gate_up = (weights(_WIDTH, _HIDDEN_SIZE), weights(_WIDTH, _HIDDEN_SIZE))
    return _Expert(gate_up, moments(_HIDDEN_SIZE), weights(_HIDDEN_SIZE, _WIDTH), moments(_WIDTH))


def _with_kernel(expert: _Expert, ggml_type: GGMLQuantizationType) -> None:
    for matrix in expert.gate_up:
        quantize_rows(matrix, ggml_type, expert.input_moments.diagonal(), name="gate, up")
    quantize_rows(expert.down, ggml_type, expert.neuron_moments.diagonal(), name="down")


def _with_feedback(expert: _Expert, ggml_type: GGMLQuantizationType) -> None:
    inputs, neurons = Feedback.of(expert.input_moments), Feedback.of(expert.neuron_moments)
    for matrix in expert.gate_up:
        quantize_rows_with_feedback(matrix, ggml_type, expert.input_moments.diagonal(), inputs, name="gate, up")
    quantize_rows_with_feedback(expert.down, ggml_type, expert.neuron_moments.diagonal(), neurons, name="down")


def _seconds(
    work: Callable[[_Expert, GGMLQuantizationType], None], expert: _Expert, kind: GGMLQuantizationType
) -> float:
    start = time.process_time()
    work(expert, kind)
    return time.process_time() - start


def main() -> None:
    """Prints one line for each type."""
    parser = argparse.ArgumentParser(description="CPU seconds of error feedback and of ggml's kernels")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("types", nargs="*", default=sorted(kind.name for kind in TYPES_WITH_FEEDBACK))
    options = parser.parse_args()
    torch.set_num_threads(1)
    experts = [_expert(seed) for seed in range(options.experts)]
    print("type      kernel  feedback  ratio   (CPU seconds an expert)")
    for name in options.types:
        kind = GGMLQuantizationType[name]
        quantize_rows(experts[0].down[:1], kind, torch.ones(_WIDTH), name="tables")  # the library sets them up once
        kernel = sum(_seconds(_with_kernel, expert, kind) for expert in experts) / len(experts)
        feedback = sum(_seconds(_with_feedback, expert, kind) for expert in experts) / len(experts)
        print(f"{name:8}  {kernel:6.3f}  {feedback:8.3f}  {feedback / kernel:5.2f}", flush=True)


if __name__ == "__main__":
    main()
