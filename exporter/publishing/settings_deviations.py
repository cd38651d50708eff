"""Names the settings of a model that a container cannot hold; the file itself is not at fault."""

from __future__ import annotations

from collections.abc import Iterator

from compressors.model.description.gguf_rope import yarn_constants
from compressors.model.description.rope import RopeKind
from compressors.model.description.spec import ModelSpec
from compressors.model.families.config_check import check_against_transformers
from compressors.model.sources.checkpoint import Checkpoint

__all__ = ["settings_deviations"]


def settings_deviations(checkpoint: Checkpoint, artifact: str) -> Iterator[str]:
    """Yields a sentence for each difference of an artifact (gguf or onnx).

    Raises:
        UnsupportedError: transformers reads ``config.json`` in another way; the message names the setting.
    """
    shape = checkpoint.shape
    check_against_transformers(checkpoint.folder, shape)
    yield from _of_window(shape)
    yield from _of_rope(shape, artifact)


def _of_window(shape: ModelSpec) -> Iterator[str]:
    if shape.window is not None:
        yield (
            f"the file is written for {shape.context_length:,} tokens: attention reaches back over "
            f"sliding_window = {shape.window:,} of them, so it would read longer texts unlike the original"
        )


def _of_rope(shape: ModelSpec, artifact: str) -> Iterator[str]:
    if shape.rope.kind is RopeKind.DYNAMIC:
        yield (
            f"the file is written for the {shape.context_length:,} tokens that the model was trained on; the dynamic "
            "scaling of longer texts is not in it"
        )
    if artifact == "gguf":
        constants = yarn_constants(shape.rope, takes_factors=shape.family.gguf.takes_rope_factors)
        if constants is not None:
            yield constants
    shorter = shape.rope.switches_after
    if artifact == "gguf" and shorter is not None and shorter < shape.context_length:
        yield (
            f"llama.cpp turns all texts by the long factors if its context is set above {shorter:,} tokens, and by the "
            f"short ones if not (-c {shorter}); the original turns each text by its own length"
        )
