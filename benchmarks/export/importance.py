"""One importance matrix for both sides: our statistics, and the same numbers as llama.cpp's imatrix file."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFWriter

from compressors.calibration.statistics import LayerStatistics, StoredStatistics, importance, save_statistics
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.student import ExpertMap
from exporter.writing.gguf.layout import plan_tensors

__all__ = ["write_imatrix", "write_statistics"]


def write_statistics(spec: ModelSpec, folder: Path) -> None:
    """Random statistics of the model's shape; the last expert of each layer saw no token."""
    generator = torch.Generator().manual_seed(0)
    for index, layer in enumerate(spec.layers):
        sums = LayerStatistics.zeros(layer)
        sums.n_tokens += 16_384
        sums.count_E += 2_048
        for squares in (
            *sums.input_squares.values(),
            sums.gate_up_input_square_ED,
            sums.down_input_square_EF,
        ):
            squares += torch.rand(squares.shape, generator=generator, dtype=torch.float64) ** 4 * 2_048
        for per_expert in (sums.count_E, sums.gate_up_input_square_ED, sums.down_input_square_EF):
            per_expert[-1] = 0
        save_statistics(sums, folder, index)


def write_imatrix(spec: ModelSpec, statistics: Path, path: Path) -> None:
    """The file that ``llama-quantize --imatrix`` reads (``common_imatrix_load`` in ``common/imatrix-loader.cpp``).

    Each entry holds sums of squares, and how many they are sums of for each matrix: here means, and 1. An expert that
    saw no token has 0, and llama-quantize then weighs all its columns alike.
    """
    experts = ExpertMap.identity(spec)
    matrix = importance(StoredStatistics(statistics, spec.n_layers), experts, spec)
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor in plan_tensors(spec, "F32"):
        if (tensor.role, tensor.layer) in matrix:
            means_EN = matrix[tensor.role, tensor.layer].reshape(-1, tensor.row_length)
            writer.add_tensor(f"{tensor.name}.in_sum2", means_EN.numpy())
            writer.add_tensor(f"{tensor.name}.counts", means_EN.any(1, keepdim=True).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
