"""The types of three bits and fewer whose codes are entries of a table: the kernels take seconds to set up.

IQ1_S and IQ1_M take ten, and their bytes are compared by ``benchmarks/mixes.py`` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest

from compressors.quantize import GGMLQuantizationType
from tests.llama_quantize import CODEBOOK_TYPES, check_bytes, three_experts

_SLOWEST = {GGMLQuantizationType.IQ1_S, GGMLQuantizationType.IQ1_M}


@pytest.fixture(scope="module")
def float32_file(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    """Three experts of one layer: rows of 256 values, and of 128, which blocks of 256 do not divide."""
    folder = tmp_path_factory.mktemp("quantize")
    return three_experts(toy_checkpoint(folder, n_layers=1), folder)


@pytest.mark.parametrize("ggml_type", sorted(CODEBOOK_TYPES - _SLOWEST), ids=attrgetter("name"))
def test_bytes_are_those_of_llama_cpp(float32_file: Path, tmp_path: Path, ggml_type: GGMLQuantizationType) -> None:
    check_bytes(float32_file, tmp_path / "quantized.gguf", ggml_type, weighted=True)


def test_a_type_that_llama_cpp_writes_without_importance(float32_file: Path, tmp_path: Path) -> None:
    check_bytes(float32_file, tmp_path / "quantized.gguf", GGMLQuantizationType.IQ3_S, weighted=False)
