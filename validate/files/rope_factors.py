"""Checks the tensors by which llama.cpp divides rotary angles, in the architectures that take them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from compressors.model.description.gguf_rope import LONG_FACTORS, PLAIN_FACTORS, SHORT_FACTORS
from compressors.model.description.spec import ModelSpec
from compressors.model.files.gguf.ggml import dequantize_into
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.gguf_settings import expected_rope

__all__ = ["rope_factor_symptoms"]

_SAME = 1e-6  # relative: converters compute them in single or double precision


def rope_factor_symptoms(file: GgufFile, spec: ModelSpec) -> Iterator[str]:
    """Yields a sentence for each of these tensors that is missing, superfluous, or not the model's."""
    rope = expected_rope(spec)
    if rope is None:
        return
    for name in (PLAIN_FACTORS, LONG_FACTORS, SHORT_FACTORS):
        entry, wanted = file.tensors.get(name), rope.factors.get(name)
        if entry is None and wanted is None:
            continue
        if entry is None:
            yield f"{name} is missing: the model's rotary angles are divided by it"
            continue
        found = torch.empty(1, entry.shape[-1])
        dequantize_into(file.read_rows(entry, 0, 1), entry.ggml_type, found)
        values = found[0].numpy()
        right = np.ones_like(values) if wanted is None else np.asarray(wanted, np.float32)
        if values.shape != right.shape or not np.allclose(values, right, rtol=_SAME, atol=0):
            place = int(np.argmax(np.abs(values - right))) if values.shape == right.shape else 0
            yield f"{name}: value {place} is {values[place]:.6g}, the model's is {right[place]:.6g}"
