"""The float32 graphs of transformers' own ONNX exporter and of optimum's, in ONNX Runtime.

The first, with its fusions for the CPU, needs onnxscript, which the project itself does not use: ``pip install
onnxscript==0.7.2``. The second needs transformers 4 and runs in an environment of its own; of the two published shapes
optimum knows Qwen3-MoE's.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from transformers import AutoModelForCausalLM

from benchmarks.onnx.files import Written
from benchmarks.onnx.sides import Times, Tokens
from benchmarks.peers.environment import environment
from benchmarks.peers.optimum_folders import PACKAGES

__all__ = ["OtherOnnx", "can_export", "known_to_optimum", "write_by_optimum", "write_by_transformers"]

_PRESENT = {"input.past_key_values": "output.past_key_values", "past_key_values": "present"}
"""Of each exporter, how the names of the cache begin among inputs and among outputs."""


def can_export() -> bool:
    """True if onnxscript is installed."""
    return importlib.util.find_spec("onnxscript") is not None


def write_by_transformers(checkpoint: Path, folder: Path) -> Written:
    """Writes the graph, whose inputs are tokens, mask and cache; reading the checkpoint is part of the time."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    path = folder / "onnx-transformers"
    start = time.process_time()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(1, 6)[None], use_cache=True).past_key_values
    inputs = {
        "input_ids": torch.arange(6, 9)[None],
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "past_key_values": cache,
    }
    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True, ort_fusions="cpu"))
    exported.save_pretrained(str(path))
    n_bytes = sum(file.stat().st_size for file in path.glob("*.onnx*"))
    return Written(path, n_bytes, time.process_time() - start)


def known_to_optimum(checkpoint: Path) -> bool:
    """True if optimum has an export configuration for the model."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return bool(config["model_type"] == "qwen3_moe")


def write_by_optimum(checkpoint: Path, folder: Path) -> Written:
    """Writes optimum's graph, which goes over all experts, each with a few nodes of its own."""
    path = folder / "onnx-optimum"
    command = [environment("optimum", PACKAGES), "-m", "optimum.commands.optimum_cli", "export", "onnx"]
    options = ["--task", "text-generation-with-past", "--no-post-process"]
    before = _seconds_of_children()
    subprocess.run([*command, "--model", checkpoint, *options, path], check=True)
    n_bytes = sum(file.stat().st_size for file in path.glob("*.onnx*"))
    return Written(path, n_bytes, _seconds_of_children() - before)


def _seconds_of_children() -> float:
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class OtherOnnx:
    """A graph whose cache grows, so that each step makes new arrays of it."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        (path,) = folder.glob("*.onnx")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = {value.name: value.shape for value in self._session.get_inputs()}

    def answer(self, prompt: Tokens, steps: Tokens, times: Times) -> None:
        """See :meth:`~benchmarks.onnx.sides.Side.answer`; logits are made at all positions of the prompt."""
        names = [value.name for value in self._session.get_outputs()]
        cache, n_tokens = dict(self._empty_cache()), 0
        for tokens in (prompt, *([token] for token in steps)):
            positions = np.arange(n_tokens, n_tokens + len(tokens))[None]
            n_tokens += len(tokens)
            feeds = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, n_tokens), np.int64), **cache}
            if "position_ids" in self._inputs:
                feeds["position_ids"] = positions
            start = time.thread_time()
            found = dict(zip(names, self._session.run(names, feeds), strict=True))
            (times.steps if n_tokens > len(prompt) else times.prompts).append(time.thread_time() - start)
            cache = {name: found[_present(name)] for name in cache}

    def _empty_cache(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        for name, shape in self._inputs.items():
            if name.startswith(tuple(_PRESENT)):
                yield name, np.zeros((1, int(shape[1]), 0, int(shape[3])), np.float32)


def _present(name: str) -> str:
    past = next(each for each in _PRESENT if name.startswith(each))
    return name.replace(past, _PRESENT[past], 1)
