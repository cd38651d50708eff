"""Measures what experts that no operator computes cost in ONNX graphs; writes ``results/onnx_experts.md``.

    python -m benchmarks.onnx_experts

A Gemma 4 of 6 layers with 128 small experts and random weights is written twice at 4 bits: as it is, with its GeGLU
experts as nodes, and described as if its experts were SwiGLU, which QMoE computes. Both answer the same prompts and
steps in turns, on one thread, whose CPU time is measured: the median and the least of each.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressors.model.description.glu import SWIGLU
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing
from compressors.model.description.spec import LayerSpec
from compressors.model.files.onnx_names import MODEL_FILE
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from exporter.writing.onnx.writer import write_onnx
from validate.runtimes.onnx_inputs import cache_shapes, sized

__all__ = ["AnsweringModel", "main", "opened"]

_RESULTS = Path(__file__).parent / "results"
_SIZES: Mapping[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 256,
    "intermediate_size": 768,
    "enable_moe_block": True,
    "head_dim": 128,
    "global_head_dim": 256,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_ROUNDS, _PROMPT, _STEPS = 3, 256, 20
_NODES, _OPERATOR = "GeGLU by nodes", "SwiGLU by QMoE"


@dataclass
class AnsweringModel:
    """A file in ONNX Runtime, with the seconds of CPU time that it took."""

    session: onnxruntime.InferenceSession
    load: float
    prompt: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def answer(self, prompt_T: npt.NDArray[np.int64], steps_N: npt.NDArray[np.int64]) -> None:
        """Reads a prompt, and then tokens one by one."""
        cache = self._run(prompt_T, {}, self.prompt)
        for token in steps_N:
            cache = self._run(token[None], cache, self.steps)

    def _run(
        self, tokens_T: npt.NDArray[np.int64], cache: Mapping[str, npt.NDArray[Any]], seconds: list[float]
    ) -> Mapping[str, npt.NDArray[Any]]:
        past = next(iter(cache.values())).shape[2] if cache else 0
        ids, mask = tokens_T[None], np.ones((1, past + len(tokens_T)), np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.zeros_like(ids)}
        for name, shape in cache_shapes(self.session).items():
            feeds[name] = cache.get(name, np.zeros(sized(shape, 1, 0), np.float32))
        names = [value.name for value in self.session.get_outputs()]
        start = time.thread_time()
        outputs = dict(zip(names, self.session.run(names, feeds), strict=True))
        seconds.append(time.thread_time() - start)
        return {
            name.replace("present", "past_key_values"): value for name, value in outputs.items() if name != "logits"
        }


def main() -> None:
    """Writes both files, measures and writes the table."""
    with tempfile.TemporaryDirectory() as folder:
        source = _write_checkpoint(Path(folder) / "checkpoint")
        models = {}
        for name in (_NODES, _OPERATOR):
            checkpoint = Checkpoint(source)
            if name == _OPERATOR:
                layers = tuple(map(_with_swiglu, checkpoint.spec.layers))
                checkpoint.spec = replace(checkpoint.spec, layers=layers)
            write_onnx(Student.teacher(checkpoint), "Q4_0", Path(folder) / name, threads=1)
            models[name] = opened(Path(folder) / name / MODEL_FILE)
        generator = np.random.default_rng(0)
        for _ in range(_ROUNDS):
            prompt_T, steps_N = (generator.integers(1, _SIZES["vocab_size"], n) for n in (_PROMPT, _STEPS))
            for model in models.values():
                model.answer(prompt_T, steps_N)
        (_RESULTS / "onnx_experts.md").write_text("\n".join(_page(models)) + "\n", encoding="utf-8")


def _write_checkpoint(path: Path) -> Path:
    torch.manual_seed(1)
    config = AutoConfig.for_model("gemma4_text", **_SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    shutil.copyfile(Path("exporter/demo/model/tokenizer.json"), path / "tokenizer.json")
    return path


def _with_swiglu(layer: LayerSpec) -> LayerSpec:
    """The layer as if its experts were SwiGLU without scales of their own."""
    assert layer.routed is not None
    routed = replace(layer.routed, glu=SWIGLU, routing=Routing(), expert_scale=None)
    tensors = tuple(tensor for tensor in layer.tensors if tensor.role is not Role.EXPERT_SCALE)
    return replace(layer, feed_forward=routed, tensors=tensors)


def opened(path: Path) -> AnsweringModel:
    """Loads a graph, for one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    start = time.thread_time()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return AnsweringModel(session, time.thread_time() - start)


def _page(models: Mapping[str, AnsweringModel]) -> list[str]:
    rows = [
        f"| {name} | {model.load:.1f} | {_milliseconds(model.prompt)} | {_milliseconds(model.steps)} |"
        for name, model in models.items()
    ]
    nodes, operator = models[_NODES], models[_OPERATOR]
    ratios = [
        f"{median(its) / median(others):.2f}"
        for its, others in ((nodes.prompt, operator.prompt), (nodes.steps, operator.steps))
    ]
    return [
        "# Experts that no operator computes, in ONNX Runtime",
        "",
        "Gemma 4, 6 layers of 128 experts of width 256, 8 for each token, hidden size 1024, 4 bits, random weights,",
        f"onnxruntime {onnxruntime.__version__}, one thread. {_ROUNDS} prompts of {_PROMPT} tokens, and {_STEPS} steps",
        "behind each: CPU time, median and least. Written by `python -m benchmarks.onnx_experts`.",
        "",
        "| experts | s to load | ms for a prompt | ms for a step |",
        "|---|---|---|---|",
        *rows,
        f"| ratio of medians | | {ratios[0]} | {ratios[1]} |",
    ]


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * median(seconds):.0f}, {1e3 * min(seconds):.0f}"


if __name__ == "__main__":
    main()
