"""Measures, within two seconds, this machine's speed at the work that takes most of a run's time."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from compressors.calibration.splits import BLOCK_LENGTH
from compressors.model.running.arithmetic import dtype_of
from compressors.model.running.memory import BLOCKS_AT_ONCE
from compressors.quantize import GGMLQuantizationType, fallback_type, quantize_rows
from exporter.estimating.estimate import COPIED_TYPES, Speeds
from exporter.planning.plan import Plan
from exporter.planning.recipe import FileChoice
from exporter.writing.gguf.mixes import mix_named

__all__ = ["measure_speeds"]

_READ_BYTES = 128 << 20
_CHUNK_BYTES = 4 << 20
_SECONDS_READING = 1.0
_SECONDS_COMPUTING = 0.3
_QUANTIZED_ROWS = 32


def measure_speeds(plan: Plan) -> Speeds:
    """The speeds of a plan's own sizes, types and threads."""
    largest = max(plan.open_source().files, key=lambda file: file.stat().st_size)
    arithmetic = dtype_of(plan.recipe.arithmetic)
    reference = multiply_adds = _multiply_adds_per_second(plan, torch.float32)
    if arithmetic is not torch.float32:
        multiply_adds = _multiply_adds_per_second(plan, arithmetic)
    return Speeds(_read_bytes_per_second(largest), multiply_adds, reference, _quantized_per_second(plan))


def _read_bytes_per_second(file: Path) -> float:
    """Reads the file's beginning, after asking the system to drop it from its cache (Linux obeys)."""
    buffer = bytearray(_CHUNK_BYTES)
    n_bytes = 0
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, _READ_BYTES, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while n_bytes < _READ_BYTES and time.perf_counter() - start < _SECONDS_READING:
            n_read = stream.readinto(buffer)
            if not n_read:
                break
            n_bytes += n_read
        return n_bytes / (time.perf_counter() - start)


def _multiply_adds_per_second(plan: Plan, dtype: torch.dtype) -> float:
    """Multiplies the tokens that one expert gets in one call by its gate and up projection."""
    spec = plan.teacher_spec
    n_rows = max(1, BLOCKS_AT_ONCE[dtype] * BLOCK_LENGTH * spec.top_k // spec.n_experts)
    inputs = torch.ones(n_rows, spec.hidden_size, dtype=dtype)
    weights = torch.ones(2 * spec.expert_width, spec.hidden_size, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.recipe.threads)
    try:
        return _per_second(lambda: torch.nn.functional.linear(inputs, weights)) * n_rows * weights.numel()
    finally:
        torch.set_num_threads(threads)


def _quantized_per_second(plan: Plan) -> float:
    """Quantizes to the first file's commonest type that is not just copied; infinite if there is none."""
    types = [_commonest_type(plan.recipe.file(artifact)) for artifact in plan.recipe.artifacts]
    quantized = [ggml_type for ggml_type in types if ggml_type.name not in COPIED_TYPES]
    if not quantized:
        return float("inf")
    rows = torch.randn(_QUANTIZED_ROWS, plan.teacher_spec.hidden_size, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(rows.shape[1])
    ggml_type = fallback_type(quantized[0], rows.shape[1])
    threads = plan.recipe.threads
    with ThreadPoolExecutor(threads) as pool:

        def all_threads() -> None:
            jobs = [pool.submit(quantize_rows, rows, ggml_type, importance, name="trial") for _ in range(threads)]
            for job in jobs:
                job.result()

        return _per_second(all_threads) * rows.numel() * threads


def _commonest_type(choice: FileChoice) -> GGMLQuantizationType:
    """Returns the type of ggml that most tensors have, or else the base type of the mix."""
    counts = Counter(name for name in choice.tensors.values() if name in GGMLQuantizationType.__members__)
    return GGMLQuantizationType[counts.most_common(1)[0][0]] if counts else mix_named(choice.mix).base


def _per_second(work: Callable[[], object]) -> float:
    work()  # the first call prepares
    n_done, start = 0, time.perf_counter()
    while time.perf_counter() - start < _SECONDS_COMPUTING:
        work()
        n_done += 1
    return n_done / (time.perf_counter() - start)
