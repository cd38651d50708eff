"""The programs that answer a prompt, and the seconds of CPU time that each answer takes on one thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from llama_cpp import Llama
from transformers import AutoModelForCausalLM

from validate.runtimes.onnx import OnnxRuntimeBackend

__all__ = ["LlamaCpp", "OnnxRuntime", "Side", "Times", "TorchEager", "measure"]

Tokens = Sequence[int]


@dataclass
class Times:
    """Seconds of CPU time, one number for each prompt and for each token behind one."""

    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def prompt(self) -> float:
        """The median of a prompt."""
        return median(self.prompts)

    @property
    def step(self) -> float:
        """The median of a token."""
        return median(self.steps)


class Side(Protocol):
    """A loaded model."""

    def answer(self, prompt: Tokens, steps: Tokens, times: Times) -> None:
        """Reads a prompt into an empty cache, then tokens one by one, and adds the time of each."""


class OnnxRuntime:
    """A folder of ours in ONNX Runtime, with a cache that is written in place."""

    def __init__(self, folder: Path) -> None:
        self._backend = OnnxRuntimeBackend(folder, threads=1)

    def answer(self, prompt: Tokens, steps: Tokens, times: Times) -> None:
        """See :meth:`Side.answer`; logits are made at the last position of the prompt alone."""
        left = list(reversed(steps))
        seconds: list[float] = []
        last = time.thread_time()

        def choose(_logits: object) -> int | None:
            nonlocal last
            now = time.thread_time()
            seconds.append(now - last)
            last = now
            return left.pop() if left else None

        self._backend.generate(prompt, len(steps) + 1, choose)
        times.prompts.append(seconds[0])
        times.steps.extend(seconds[1:])


class LlamaCpp:
    """A GGUF file in llama.cpp as its users run it: weights are repacked, the cache is float16."""

    def __init__(self, path: Path, context: int) -> None:
        self._model = Llama(
            str(path), n_ctx=context, n_batch=512, n_threads=1, n_threads_batch=1, verbose=False, n_gpu_layers=0
        )

    def answer(self, prompt: Tokens, steps: Tokens, times: Times) -> None:
        """See :meth:`Side.answer`; logits are made at the last position of the prompt alone."""
        self._model.reset()  # type: ignore[no-untyped-call]
        times.prompts.append(_seconds_of(lambda: self._model.eval(prompt)))
        times.steps.extend(_seconds_of(lambda token=token: self._model.eval([token])) for token in steps)


class TorchEager:
    """The checkpoint in transformers, in float32, with its plain loop over experts."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._model.set_experts_implementation("eager")

    @torch.no_grad()
    def answer(self, prompt: Tokens, steps: Tokens, times: Times) -> None:
        """See :meth:`Side.answer`; logits are made at the last position of the prompt alone."""
        cache = None
        for tokens in (prompt, *([token] for token in steps)):
            start = time.thread_time()
            output = self._model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds = time.thread_time() - start
            (times.prompts if cache is None else times.steps).append(seconds)
            cache = output.past_key_values


def _seconds_of(work: object) -> float:
    assert callable(work)
    start = time.thread_time()
    work()
    return time.thread_time() - start


def measure(sides: dict[str, Side], answers: Sequence[tuple[Tokens, Tokens]]) -> dict[str, Times]:
    """Lets all sides answer in turns; the first answer of each warms it up and does not count.

    Args:
        sides: loaded models by name.
        answers: prompts, each with the tokens behind it.
    """
    found = {name: Times() for name in sides}
    for number, (prompt, steps) in enumerate(answers):
        for name, side in sides.items():
            side.answer(prompt, steps, found[name] if number else Times())
    return found
