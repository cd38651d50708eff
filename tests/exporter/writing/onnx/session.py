"""A graph in ONNX Runtime that is fed as clients do it: tokens, mask and cache by name, and the number of logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from compressors.model.files.onnx_names import NUM_LOGITS_TO_KEEP
from exporter.writing.onnx.layout import MODEL_FILE
from validate.runtimes.onnx_inputs import cache_shapes, sized

__all__ = ["Logits", "Session", "Tokens", "padded"]

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class Session:
    """Keeps the cache from call to call.

    Args:
        folder: the model's folder.
        model: the graph in place of the folder's.
    """

    def __init__(self, folder: Path, model: onnx.ModelProto | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # it warns of logits of more positions than one
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
        source = str(folder / MODEL_FILE) if model is None else model.SerializeToString()
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._sizes = cache_shapes(self._session)
        self._cache: list[npt.NDArray[np.float32]] = []

    def feed(self, tokens: Tokens, mask: Tokens, *, cached: bool = False, kept: int | None = 0) -> Logits:
        """Logits [batch, positions, V].

        Args:
            tokens: int64 [batch, tokens].
            mask: int64 [batch, cached and new tokens].
            cached: continues where the last call ended.
            kept: the number of positions; 0: all; None: the graph is not told.
        """
        if not cached:
            self._cache = [np.zeros(sized(shape, len(tokens), 0), np.float32) for shape in self._sizes.values()]
        inputs = {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": np.zeros_like(tokens),  # connected to nothing
            **dict(zip(self._sizes, self._cache, strict=True)),
        }
        if kept is not None:
            inputs[NUM_LOGITS_TO_KEEP] = np.array(kept)
        logits, *self._cache = self._session.run(None, inputs)
        return np.asarray(logits)


def padded(texts: list[Tokens], side: str) -> tuple[Tokens, Tokens]:
    """Texts as the rows of a batch, and its mask; the shorter ones are filled up on one side."""
    width = max(map(len, texts))
    tokens, mask = np.zeros((len(texts), width), np.int64), np.zeros((len(texts), width), np.int64)
    for row, values in enumerate(texts):
        place = slice(width - len(values), width) if side == "left" else slice(0, len(values))
        tokens[row, place], mask[row, place] = values, 1
    return tokens, mask
