"""The comparison of both runtimes on the same numbers, on a toy, and its table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.same_blocks import compare, page
from compressors.model.sources.opening import open_source


def test_both_runtimes_are_compared_on_the_same_numbers(
    tmp_path: Path, toy_checkpoint: Callable[..., Path], heldout_tokens: npt.NDArray[np.int64]
) -> None:
    source = open_source(toy_checkpoint(tmp_path, n_layers=2))
    tokens_BT = heldout_tokens[4000 : 4000 + 3 * 128].reshape(3, 128)
    found = list(compare("toy", source, "Q4_0", tokens_BT, tmp_path, 1))
    assert [row.comparison for row in found] == [
        "ONNX Runtime and llama.cpp",
        "llama.cpp and torch",
        "ONNX Runtime and torch",
        "llama.cpp and torch, routers alone",
        "ONNX Runtime and torch, routers alone",
    ]
    across, of_gguf, of_onnx, *alone = found
    assert 0.98 < across.overlap <= 1
    assert across.low is not None and across.high is not None and across.low <= across.overlap <= across.high
    assert of_onnx.overlap >= of_gguf.overlap > 0.98
    assert all(row.exact == 1 and row.margin_error is not None and row.margin_error < 1e-5 for row in alone)
    lines = page(found).splitlines()
    assert sum(line.startswith("| toy | Q4_0 |") for line in lines) == 5
    assert f"| {100 * across.overlap:.3f} % |" in page(found)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
