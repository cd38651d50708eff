"""The float32 graph of transformers' own ONNX exporter, with its fusions for the CPU, in ONNX Runtime.

It needs onnxscript, which the project itself does not use: ``pip install onnxscript==0.7.2``.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForCausalLM

from benchmarks.onnx.files import Written
from benchmarks.onnx.sides import Times, Tokens

__all__ = ["TransformersOnnx", "can_export", "write_by_transformers"]

_PAST, _PRESENT = "input.past_key_values", "output.past_key_values"


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


class TransformersOnnx:
    """That graph; its cache grows, so each step makes new arrays of it."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        (path,) = folder.glob("*.onnx")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def answer(self, prompt: Tokens, steps: Tokens, times: Times) -> None:
        """See :meth:`~benchmarks.onnx.sides.Side.answer`; logits are made at all positions of the prompt."""
        inputs, names = self._session.get_inputs(), [value.name for value in self._session.get_outputs()]
        cache = {
            value.name: np.zeros((1, int(value.shape[1]), 0, int(value.shape[3])), np.float32)
            for value in inputs
            if value.name.startswith(_PAST)
        }
        n_tokens = 0
        for tokens in (prompt, *([token] for token in steps)):
            n_tokens += len(tokens)
            feeds = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, n_tokens), np.int64), **cache}
            start = time.thread_time()
            found = dict(zip(names, self._session.run(names, feeds), strict=True))
            (times.steps if n_tokens > len(prompt) else times.prompts).append(time.thread_time() - start)
            cache = {name: found[name.replace(_PAST, _PRESENT)] for name in cache}
