"""Lists where a file computes or cuts text unlike the original because its container cannot do better."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from compressors.model.config.special_tokens import configured_tokens
from compressors.model.files.tokenizer_files import class_with_other_words
from compressors.model.files.vocabularies.made_files import named_code
from compressors.model.sources.source import Source
from exporter.publishing.settings_deviations import settings_deviations
from exporter.validation.vocabulary_check import vocabulary_deviations

__all__ = ["Deviation", "find_deviations"]


@dataclass(frozen=True)
class Deviation:
    """One such difference: it is written all the same, and named in plan and report."""

    artifact: str  # gguf or onnx
    what: str  # a sentence without a full stop


def find_deviations(checkpoint: Source, artifacts: Iterable[str], name: str) -> tuple[Deviation, ...]:
    """Returns what is known beforehand of the files to be written; no weight is read.

    Args:
        checkpoint: the original.
        artifacts: gguf, onnx or both.
        name: the model's name in the GGUF file.

    Raises:
        InputError: the checkpoint's tokenizer is missing or damaged.
        UnsupportedError: a difference is so large that the file must not be written.
    """
    return tuple(
        Deviation(artifact, what)
        for artifact in artifacts
        for what in (*settings_deviations(checkpoint, artifact), *_of_tokenizer(checkpoint, artifact, name))
    )


def _of_tokenizer(checkpoint: Source, artifact: str, name: str) -> Iterator[str]:
    folder, spec = checkpoint.tokenizer_folder, checkpoint.spec
    if (code := named_code(folder)) is not None:
        rule = "tokenizer.json says" if (folder / "tokenizer.json").is_file() else "the expression in its code says"
        yield f"text is cut as {rule}; the Python code {code} that tokenizer_config.json names is not run"
    if (other := class_with_other_words(folder)) is not None:
        yield (
            f"text is cut into words by transformers' {other}, which tokenizer_config.json names, and not as "
            "tokenizer.json says: where the model was trained with the latter, set tokenizer_class to "
            "PreTrainedTokenizerFast"
        )
    if without_row := configured_tokens(folder, spec.vocab_size).without_row:
        ids = ", ".join(map(str, without_row))
        yield f"the end token {ids} is left out: the model has {spec.vocab_size:,} tokens, counted from 0"
    if artifact == "gguf":
        yield from vocabulary_deviations(folder, spec, name)
