"""A value that is not finite is found in any row of the embedding or the head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressors.model.errors import InputError
from compressors.model.sources.hugging_face import finite
from compressors.model.sources.hugging_face.finite import check_vocabulary_is_finite
from compressors.model.sources.opening import open_source


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_the_tensor_and_the_row_are_named(
    name: str,
    value: float,
    tmp_path: Path,
    toy_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=1, model="olmoe")
    tensors = load_file(folder / "model.safetensors")
    monkeypatch.setattr(finite, "_VALUES_AT_ONCE", 100 * tensors[name].shape[1])
    check_vocabulary_is_finite(open_source(folder))
    n_rows = len(tensors[name])
    tensors[name][n_rows - 3, 1] = value  # no text has the token
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"tensor {name} holds NaN .* first in row {n_rows - 3} of {n_rows}"):
        check_vocabulary_is_finite(open_source(folder))


def test_large_values_are_finite(tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> None:
    """Their sum is not."""
    folder = toy_checkpoint(tmp_path, n_layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"].fill_(torch.finfo(torch.bfloat16).max)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_vocabulary_is_finite(open_source(folder))
