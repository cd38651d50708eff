"""Measures, within two seconds, this machine's speed at the work that takes most of a run's time."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from compressors.calibration.splits import BLOCK_LENGTH
from compressors.model.files.gguf.ggml import quantize_into
from compressors.model.files.storage_type import StorageType
from compressors.model.running.memory import blocks_at_once
from compressors.quantize import GGMLQuantizationType, fallback_type, row_bytes
from exporter.estimating.estimate import COPIED_TYPES, Speeds
from exporter.planning.plan import Plan
from exporter.planning.recipe import FileChoice
from exporter.processes.team import usable_processors
from exporter.writing.gguf.mixes import mix_named

__all__ = ["measure_speeds"]

_READ_BYTES = 128 << 20
_CHUNK_BYTES = 4 << 20
_SECONDS_READING = 1.0
_SECONDS_COMPUTING = 0.05
_QUANTIZED_ROWS = 32
_BFLOAT16_GAIN = 2.5  # the least of the processors where it is chosen (compressors.model.running.arithmetic)


def measure_speeds(plan: Plan) -> Speeds:
    """The speeds of a plan's own sizes, types and threads."""
    largest = max(plan.open_source().files, key=lambda file: file.stat().st_size)
    reference = _multiply_adds_per_second(plan)
    gain = 1.0 if plan.recipe.arithmetic == "float32" else _BFLOAT16_GAIN
    return Speeds(_read_bytes_per_second(largest), gain * reference, reference, _quantized_per_second(plan))


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


def _multiply_adds_per_second(plan: Plan) -> float:
    """Multiplies the tokens that one expert gets in one call by its gate and up projection, in float32.

    numpy computes here, since torch takes a second to import; its threads are as many as the system offers, and other
    numbers are taken to be faster or slower in proportion.
    """
    spec = plan.teacher_spec
    n_rows = max(1, blocks_at_once(StorageType.F32) * BLOCK_LENGTH * spec.top_k // spec.n_experts)
    inputs = np.ones((n_rows, spec.expert_size), dtype=np.float32)
    weights = np.ones((spec.expert_size, 2 * spec.expert_width), dtype=np.float32)
    offered = int(os.environ.get("OMP_NUM_THREADS") or usable_processors())
    return _per_second(lambda: inputs @ weights) * n_rows * weights.size * plan.recipe.threads / offered


def _quantized_per_second(plan: Plan) -> float:
    """Quantizes to the first file's commonest type that is not just copied; infinite if there is none."""
    types = [_commonest_type(plan.recipe.file(artifact)) for artifact in plan.recipe.artifacts]
    quantized = [ggml_type for ggml_type in types if ggml_type.name not in COPIED_TYPES]
    if not quantized:
        return float("inf")
    width = plan.teacher_spec.hidden_size
    rows = np.sin(np.arange(_QUANTIZED_ROWS * width, dtype=np.float32)).reshape(_QUANTIZED_ROWS, width)
    importance = np.ones(rows.shape[1], dtype=np.float32)
    ggml_type = fallback_type(quantized[0], rows.shape[1])
    threads = plan.recipe.threads
    outputs = np.empty((threads, len(rows), row_bytes(ggml_type, rows.shape[1])), dtype=np.uint8)
    with ThreadPoolExecutor(threads) as pool:

        def all_threads() -> None:
            jobs = [pool.submit(quantize_into, stored, rows, ggml_type, importance) for stored in outputs]
            for job in jobs:
                job.result()

        return _per_second(all_threads) * rows.size * threads


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
