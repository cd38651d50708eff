"""Names the settings of a model that a container cannot hold; the file itself is not at fault."""

from __future__ import annotations

from collections.abc import Iterator

from compressors.model.description.gguf_rope import yarn_constants
from compressors.model.description.rope import RopeKind
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.source import Source

__all__ = ["settings_deviations"]


def settings_deviations(checkpoint: Source, artifact: str) -> Iterator[str]:
    """Yields a sentence for each difference of an artifact (gguf or onnx)."""
    spec = checkpoint.spec
    yield from _of_window(spec)
    yield from _of_rope(spec, artifact)


def _of_window(spec: ModelSpec) -> Iterator[str]:
    if spec.window is not None:
        yield (
            f"the file is written for {spec.context_length:,} tokens: attention reaches back over "
            f"sliding_window = {spec.window:,} of them, so it would read longer texts unlike the original"
        )


def _of_rope(spec: ModelSpec, artifact: str) -> Iterator[str]:
    if any(rope.kind is RopeKind.DYNAMIC for rope in spec.ropes):
        yield (
            f"the file is written for the {spec.context_length:,} tokens that the model was trained on; the dynamic "
            "scaling of longer texts is not in it"
        )
    for rope in spec.ropes if artifact == "gguf" else ():
        constants = yarn_constants(rope, takes_factors=spec.family.gguf.takes_rope_factors)
        if constants is not None:
            yield constants
        shorter = rope.switches_after
        if shorter is not None and shorter < spec.context_length:
            yield (
                f"llama.cpp turns all texts by the long factors if its context is set above {shorter:,} tokens, and by "
                f"the short ones if not (-c {shorter}); the original turns each text by its own length"
            )
