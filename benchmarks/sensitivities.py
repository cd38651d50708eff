"""Measures the cost of sensitivities in forward passes, on layers of OLMoE's shape.

    python -m benchmarks.sensitivities [--layers 2] [--blocks 8]

Weights and tokens are random: neither time depends much on them. Both passes stream the same checkpoint over the same
tokens on one thread, in turns; a forward pass ends with the logits of all positions. It prints CPU seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.scale.checkpoints import MODELS, with_layers, write_checkpoint
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from compressors.sensitivity.gathering import gather_sensitivities

_BLOCK_LENGTH = 512


def _forward(student: Student, tokens_BT: torch.Tensor) -> None:
    model = StreamedModel(student)
    groups = [TokenGroup(tokens_BT)]
    (states,) = model.first_states(groups)
    for _ in model.advance(groups, [states], range(model.spec.n_layers)):
        pass
    for _ in model.logits_in_chunks(states, slice(0, tokens_BT.shape[1])):
        pass


def _sensitivities(student: Student, tokens_BT: torch.Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gather_sensitivities(student, tokens_BT, Path(folder))


def _cpu_seconds(work: Callable[[Student, torch.Tensor], None], student: Student, tokens_BT: torch.Tensor) -> float:
    start = time.process_time()
    work(student, tokens_BT)
    return time.process_time() - start


def main() -> None:
    """Prints the seconds of each turn and the ratio of their medians."""
    parser = argparse.ArgumentParser(description="CPU seconds of sensitivities and of forward passes")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8, help=f"of {_BLOCK_LENGTH} tokens")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(with_layers(MODELS["olmoe"], options.layers), Path(folder) / "model")
        student = Student.teacher(open_source(Path(folder) / "model"))
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(student.spec.vocab_size, (options.blocks, _BLOCK_LENGTH), generator=generator)
        pairs = []
        for _ in range(options.turns):
            pairs.append((_cpu_seconds(_forward, student, tokens_BT), _cpu_seconds(_sensitivities, student, tokens_BT)))
            print("forward pass {:.1f} s, sensitivities {:.1f} s".format(*pairs[-1]), flush=True)
    forward, gathering = (median(seconds) for seconds in zip(*pairs, strict=True))
    print(f"sensitivities cost {gathering / forward:.2f} forward passes")


if __name__ == "__main__":
    main()
