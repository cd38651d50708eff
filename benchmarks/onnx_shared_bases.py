"""Measures experts that stand on shared bases in ONNX Runtime; writes ``results/onnx_shared_bases.md``.

    python -m benchmarks.onnx_shared_bases [FINE]

Speed, at the shape of OLMoE's layers (2 layers, random weights) and on the demo model: students with half of the
experts' values removed by replacing experts, and one with pruned experts, whose file is as large, answer the same
prompts and steps in turns, on one thread, whose CPU time is measured. Fidelity, on the demo model (or FINE, its
folder): the perplexity of the file in ONNX Runtime and of its numbers in torch, and the divergence of adapters at
several bits from float32.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.onnx_experts import AnsweringModel, opened
from compressors.calibration.splits import tokenize_heldout
from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.files.integer_blocks import ProductInputs
from compressors.model.files.onnx_names import MODEL_FILE
from compressors.model.sources.adapters import adapter_tensors
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import ExpertMap, Student
from compressors.shrink.replace import replacement_for
from exporter.hub import bundled_text
from exporter.writing.onnx import layout
from exporter.writing.onnx.encodings import FLOAT32, Encoding, adapter_encoding, encoding_named
from exporter.writing.onnx.memory import predict_runtime_bytes
from exporter.writing.onnx.writer import predict_size, write_onnx
from validate.runtimes.backend import RuntimeBackend
from validate.runtimes.measure import measure_artifact
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend

__all__ = ["main"]

_REPOSITORY = Path(__file__).parent.parent
_RESULTS = Path(__file__).parent / "results"
_DEMO = _REPOSITORY / "exporter/demo/model"
_SHAPE: Mapping[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_ROUTER_SPREAD = 0.05  # of random routers: tokens then choose different experts
_PRESET, _SHARE = "Q4_0", 0.5
_ROUNDS, _PROMPT, _STEPS = 12, 512, 20
_CHUNKS, _CHUNK_TOKENS = 6, 512
_INPUTS: tuple[ProductInputs, ...] = ("float32", "int8")
_PRUNED = "pruned"


@dataclass(frozen=True)
class _Row:
    """A student's file and its speed: milliseconds of CPU time."""

    model: str
    student: str
    n_bytes: int
    is_as_predicted: bool
    prompt: float
    step: float
    least_step: float


def main() -> None:
    """Writes the files, measures and writes the page."""
    demo = Path(sys.argv[1]) if len(sys.argv) > 1 else _DEMO
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = _write_checkpoint(folder / "shape")
        rows = [*_speeds("OLMoE's shape", shape, folder / "a"), *_speeds("demo model", demo, folder / "b")]
        memory = _memory(folder / "a" / "replaced", _students(shape)["replaced"])
        page = _page(rows, memory, _fidelity(_students(demo)["replaced"], folder / "c"))
        (_RESULTS / "onnx_shared_bases.md").write_text("\n".join(page) + "\n", encoding="utf-8")


def _write_checkpoint(path: Path) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **_SHAPE), dtype=torch.bfloat16)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=_ROUTER_SPREAD)
    model.save_pretrained(path)
    shutil.copyfile(_DEMO / "tokenizer.json", path / "tokenizer.json")
    return path


def _students(folder: Path) -> Mapping[str, Student]:
    """One whose experts were replaced, one of that size whose experts were pruned, and the original."""
    source = Checkpoint(folder)
    spec, replaced = source.spec, _replaced(source)
    n_bytes = predict_size(replaced.spec, _PRESET)
    n_kept = min(
        range(1, spec.n_experts), key=lambda number: abs(predict_size(spec.with_experts(number), _PRESET) - n_bytes)
    )
    pruned = ExpertMap.keeping(spec.n_experts, [range(n_kept)] * spec.n_layers)
    return {"replaced": replaced, _PRUNED: Student(source, pruned), "all experts": Student.teacher(source)}


def _replaced(source: Checkpoint) -> Student:
    """The last experts of each layer on the mean of their group, and the rest of each cut to the rank."""
    spec = source.spec
    numbers = replacement_for(_SHARE, spec)
    n_replaced, n_bases = numbers.n_replaced // spec.n_layers, max(1, numbers.n_bases // spec.n_layers)
    own = spec.n_experts - n_replaced
    base_of = (*[None] * own, *(place % n_bases for place in range(n_replaced)))
    bases = SharedBases(base_of, n_bases, numbers.rank)
    experts = ExpertMap.identity(spec)
    layers = tuple(replace(layer, shared=bases) for layer in experts.layers)
    student = Student(source, replace(experts, layers=layers))
    overlay: dict[str, torch.Tensor] = {}
    for index in range(spec.n_layers):
        overlay |= _parts(student, source, index, bases)
    return student.with_overlay(overlay)


def _parts(student: Student, source: Checkpoint, index: int, bases: SharedBases) -> dict[str, torch.Tensor]:
    """The bases and adapters of a layer."""
    found: dict[str, torch.Tensor] = {}
    for roles in ((Role.EXPERT_GATE, Role.EXPERT_UP), (Role.EXPERT_DOWN,)):
        for base in range(bases.n_bases):
            members = bases.members(base)
            means = [sum(source.expert(role, index, each).float() for each in members) / len(members) for role in roles]
            for role, mean_OI in zip(roles, means, strict=True):
                found[student.base_name(role, index, base)] = mean_OI.to(source.dtype)
            for expert in members:
                cut = [
                    _cut(source.expert(role, index, expert).float() - mean_OI, bases.rank)
                    for role, mean_OI in zip(roles, means, strict=True)
                ]
                a_PRI, b_POR = (torch.stack(factors) for factors in zip(*cut, strict=True))
                found |= adapter_tensors(student.name(roles[0], index, expert), a_PRI, b_POR)
    return found


def _cut(difference_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest matrix of a rank, but for chance: A [R, I] and B [O, R]."""
    torch.manual_seed(0)
    left_OR, values_R, right_IR = torch.svd_lowrank(difference_OI, q=rank, niter=4)
    return values_R[:, None] ** 0.5 * right_IR.T, left_OR * values_R**0.5


def _speeds(model: str, folder: Path, out: Path) -> Iterator[_Row]:
    """Writes the students, and lets them answer in turns."""
    answering: dict[str, AnsweringModel] = {}
    sizes: dict[str, tuple[int, bool]] = {}
    for name, student in _students(folder).items():
        write_onnx(student, _PRESET, out / name, threads=1)
        n_bytes = sum(file.stat().st_size for file in (out / name).iterdir())
        sizes[name] = n_bytes, n_bytes == predict_size(student.spec, _PRESET)
        answering[name] = opened(out / name / MODEL_FILE)
    generator = np.random.default_rng(0)
    for _ in range(_ROUNDS):
        prompt_T, steps_N = (generator.integers(2, 4096, n) for n in (_PROMPT, _STEPS))
        for each in answering.values():
            each.answer(prompt_T, steps_N)
    for name, each in answering.items():
        prompt, steps = 1e3 * median(each.prompt), [1e3 * seconds for seconds in each.steps]
        yield _Row(model, name, *sizes[name], prompt, median(steps), min(steps))


def _memory(folder: Path, student: Student) -> tuple[int, int]:
    """Bytes at the peak with a full cache of 1024 tokens, measured and predicted."""
    prompt_T = np.random.default_rng(1).integers(2, 4096, 2048)
    cost = measure_artifact("onnx", folder, context=1024, kv_type="f32", threads=1, prompt=prompt_T)
    predicted = sum(predict_runtime_bytes(student.spec, _PRESET, 1024, threads=1).values())
    return cost.peak_rss_bytes - cost.base_rss_bytes, predicted


@dataclass(frozen=True)
class _Fidelity:
    """A file of the demo model: its bytes, and how far it is from the student."""

    adapters: str
    n_bytes: int
    divergence: float  # nats, of the file's numbers in torch from the student with float32 adapters
    perplexity_torch: float
    perplexity_onnx: float
    perplexity_int8: float  # in ONNX Runtime, with products of inputs in 8 bits


def _fidelity(student: Student, out: Path) -> Iterator[_Fidelity]:
    """The same student with adapters of several encodings."""
    _, split = tokenize_heldout(bundled_text("heldout"), student.source.tokenizer_folder, _CHUNK_TOKENS, 2)
    tokens_BT = split.spread(_CHUNKS).tokens_BT.numpy()
    encodings: Mapping[str, Callable[[Encoding], Encoding]] = {
        "F32": lambda _: FLOAT32,
        "8 bits (what is written)": adapter_encoding,
        "4 bits": lambda _: encoding_named("Q4_0"),
    }
    reference: list[npt.NDArray[np.float32]] = []
    for name, encoding in encodings.items():
        float32, int8 = (_written(student, out / name, inputs, encoding) for inputs in _INPUTS)
        held = student.as_written(OnnxWeights(float32, student.spec))
        of_torch, log_probs = _run(TorchBackend(held), tokens_BT)
        reference = reference or log_probs
        pairs = zip(reference, log_probs, strict=True)
        divergence = float(np.mean([(np.exp(p) * (p - q)).sum(-1).mean() for p, q in pairs]))
        of_onnx, of_int8 = (_run(OnnxRuntimeBackend(each, threads=1), tokens_BT)[0] for each in (float32, int8))
        n_bytes = sum(file.stat().st_size for file in float32.iterdir())
        yield _Fidelity(name, n_bytes, divergence, of_torch, of_onnx, of_int8)


def _written(student: Student, folder: Path, inputs: ProductInputs, encoding: Callable[[Encoding], Encoding]) -> Path:
    afresh = layout._planned.__wrapped__  # plans are remembered by what they are asked for, which is the same here
    with patch.object(layout, "adapter_encoding", encoding), patch.object(layout, "_planned", afresh):
        write_onnx(student, _PRESET, folder / inputs, inputs=inputs, threads=1)
    return folder / inputs


def _run(backend: RuntimeBackend, tokens_BT: npt.NDArray[np.int64]) -> tuple[float, list[npt.NDArray[np.float32]]]:
    """Perplexity, and log-probabilities by chunk: [positions, V]."""
    log_probs, losses = [], []
    for tokens_T, output in zip(tokens_BT, backend.run(tokens_BT), strict=True):
        of_chunk = torch.from_numpy(output.logits_SV).double().log_softmax(-1).numpy()
        targets = tokens_T[len(tokens_T) - len(of_chunk) :]
        losses.append(-of_chunk[np.arange(len(targets)), targets].mean())
        log_probs.append(of_chunk.astype(np.float32))
    return float(np.exp(np.mean(losses))), log_probs


def _page(rows: Sequence[_Row], memory: tuple[int, int], fidelity: Iterator[_Fidelity]) -> list[str]:
    pruned = {row.model: row for row in rows if row.student == _PRUNED}
    speeds = [
        f"| {row.model} | {row.student} | {row.n_bytes / 1e6:.1f} | {'yes' if row.is_as_predicted else 'NO'} | "
        f"{row.prompt:.0f} | {pruned[row.model].prompt / row.prompt:.2f} | {row.step:.2f}, {row.least_step:.2f} | "
        f"{pruned[row.model].step / row.step:.2f} |"
        for row in rows
    ]
    measured, predicted = (n_bytes / 1e6 for n_bytes in memory)
    return [
        "# Experts on shared bases, in ONNX Runtime",
        "",
        f"Half of the experts' values are gone: replaced by {_PRESET} bases, one for sixteen experts or all of a",
        "layer, with an adapter each, or pruned. OLMoE's shape: 2 layers of 64 experts of width 1024, 8 for each",
        "token, hidden size 2048, random weights. The demo model: 6 layers of 32 experts of width 128, 4 for each",
        "token, hidden size 256.",
        f"onnxruntime {onnxruntime.__version__}, one thread: CPU time. {_ROUNDS} prompts of {_PROMPT} tokens, and",
        f"{_STEPS} steps behind each, in turns: median, of steps also the least. Speed: the pruned file's time",
        "divided by the file's.",
        "Written by `python -m benchmarks.onnx_shared_bases`.",
        "",
        "| model | experts | MB | as predicted | ms for a prompt | speed | ms for a step | speed |",
        "|---|---|---|---|---|---|---|---|",
        *speeds,
        "",
        f"Memory of the replaced student at OLMoE's shape, with a full cache of 1024 tokens: {measured:.0f} MB",
        f"measured, {predicted:.0f} MB predicted.",
        "",
        "## Bits of adapters, and what the file's runtime makes of them",
        "",
        f"The demo model's replaced student, untrained, on {_CHUNKS} chunks of {_CHUNK_TOKENS} held-out tokens. The",
        "divergence is that of the file's numbers in torch from those with float32 adapters.",
        "",
        "| adapters | MB | divergence, nats | perplexity in torch | ONNX Runtime, float32 inputs | int8 inputs |",
        "|---|---|---|---|---|---|",
        *(
            f"| {each.adapters} | {each.n_bytes / 1e6:.2f} | {each.divergence:.6f} | {each.perplexity_torch:.3f} | "
            f"{each.perplexity_onnx / each.perplexity_torch - 1:+.3%} | "
            f"{each.perplexity_int8 / each.perplexity_torch - 1:+.3%} |"
            for each in fidelity
        ),
    ]


if __name__ == "__main__":
    main()
