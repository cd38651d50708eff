"""The kinds of inputs: the source of each, how it is damaged, and the reader and command that take it."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console

from compressors.calibration.splits import load_tokenizer, read_splits
from compressors.model.config.config_check import check_against_transformers
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.files.weight_file import WeightFile
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.gguf_settings import gguf_setting_symptoms
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.opening import open_source
from compressors.model.sources.weights import WrittenWeights
from exporter.estimating.durations import parse_duration
from exporter.estimating.sizes import format_size, parse_size
from exporter.inspection import describe, description_table
from exporter.planning.job import Flags, parse_requirements
from exporter.planning.recipe import load_recipe, recipe_yaml
from exporter.writing.gguf.vocabulary.metadata import vocabulary_metadata
from tests.fuzz.chats import damage_chats, read_chats
from tests.fuzz.configurations import damage_config, damage_index, damage_tokenizer
from tests.fuzz.gguf_files import damage_gguf
from tests.fuzz.onnx_files import damage_onnx
from tests.fuzz.published import damage_published, read_published
from tests.fuzz.safetensors_files import damage_weights
from tests.fuzz.texts import awkward_flags, awkward_words, damage_logits, damage_recipe, damage_text
from validate.files.folder_settings import folder_setting_symptoms
from validate.files.graph_settings import graph_setting_symptoms
from validate.files.model_file import find_model_file
from validate.metrics.logits_file import LogitsFile

__all__ = ["KINDS", "Kind"]

Damage = Callable[[random.Random, Path], None]


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    sources: tuple[str, ...]  # folders of the undamaged inputs, one of which is copied
    damage: Damage | None
    read: Callable[[Path, random.Random, Path], None]  # a damaged folder, numbers, and the undamaged inputs
    command: Callable[[Path, Path], list[str]] | None = None  # a damaged folder, and the undamaged inputs
    share: int = 1  # of a hundred inputs


def _read_checkpoint(folder: Path, rng: random.Random, inputs: Path) -> None:
    Console(file=io.StringIO()).print(description_table(describe(folder)))
    checkpoint = open_source(folder)
    for file in checkpoint.files:
        weights = WeightFile(file)
        for name in weights.tensors:
            weights.read(name)
    vocabulary_metadata(folder, checkpoint.spec.vocab_size)
    load_tokenizer(folder)


@cache
def _spec(inputs: Path) -> ModelSpec:
    return open_source(inputs / "qwen").spec


def _read_gguf(folder: Path, rng: random.Random, inputs: Path) -> None:
    found = find_model_file(folder)
    if found is not None:
        str(found.facts)
    path = folder / "model.gguf"
    gguf_setting_symptoms(GgufFile(path).metadata, _spec(inputs))
    _read_weights(GgufWeights(path, _spec(inputs)), _spec(inputs))


def _read_gguf_source(folder: Path, rng: random.Random, inputs: Path) -> None:
    source = open_source(folder / "model.gguf")
    Console(file=io.StringIO()).print(description_table(describe(source.path)))
    for tensor, layer in source.spec.written.places:
        if not tensor.is_per_expert:
            source.tensor(tensor.role, layer)
    check_against_transformers(source.config, source.config_path, source.spec)
    vocabulary_metadata(source.tokenizer_folder, source.spec.vocab_size)
    load_tokenizer(source.tokenizer_folder)


def _read_onnx(folder: Path, rng: random.Random, inputs: Path) -> None:
    found = find_model_file(folder)
    if found is not None:
        str(found.facts)
        str(found.tokenizer_folder)
        graph_setting_symptoms(found.path, _spec(inputs))
        folder_setting_symptoms(found.path, open_source(inputs / "qwen"), _spec(inputs))
    _read_weights(OnnxWeights(folder, _spec(inputs)), _spec(inputs))


def _read_weights(weights: WrittenWeights, spec: ModelSpec) -> None:
    for tensor, layer in spec.written.places:
        if not tensor.is_per_expert:
            weights.tensor(tensor.role, layer)
    import torch

    for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
        weights.read_expert(role, 0, 1, torch.empty(64, 64))
    weights.tunable(Role.ROUTER, 0)
    weights.block_length(Role.QUERY, 0)


def _read_recipe(folder: Path, rng: random.Random, inputs: Path) -> None:
    recipe_yaml(load_recipe(folder / "recipe.yaml"))


def _read_text(folder: Path, rng: random.Random, inputs: Path) -> None:
    read_splits(folder / "calibration", folder / "heldout")


def _read_logits(folder: Path, rng: random.Random, inputs: Path) -> None:
    logits = LogitsFile(folder / "logits")
    logits.decoded(0, len(logits))


def _read_flags(folder: Path, rng: random.Random, inputs: Path) -> None:
    Flags(**awkward_flags(rng, folder)).job()


def _read_words(folder: Path, rng: random.Random, inputs: Path) -> None:
    size, duration, *pairs = awkward_words(rng)
    readers: tuple[Callable[[], object], ...] = (
        lambda: format_size(parse_size(size, "--budget")),
        lambda: parse_duration(duration, "--recover-time"),
        lambda: parse_requirements(pairs),
    )
    rng.choice(readers)()


def _inspect(folder: Path, inputs: Path) -> list[str]:
    return ["inspect", str(folder)]


def _export(folder: Path, inputs: Path, *more: str) -> list[str]:
    return ["export", str(folder), "--budget", "2MB", *_around(folder, inputs), *more]


def _export_gguf(folder: Path, inputs: Path) -> list[str]:
    return ["export", str(folder / "model.gguf"), "--budget", "2MB", *_around(folder, inputs)]


def _around(folder: Path, inputs: Path) -> list[str]:
    return [
        *_texts(inputs / "text"),
        "--dry-run",
        "--memory",
        "2GB",
        "--threads",
        "1",
        "--out",
        str(folder.parent / "out"),
    ]


def _texts(folder: Path) -> list[str]:
    return ["--calibration", str(folder / "calibration"), "--text", str(folder / "heldout")]


def _with_recipe(folder: Path, inputs: Path) -> list[str]:
    out = ["--dry-run", "--memory", "2GB", "--out", str(folder.parent / "out")]
    return ["export", str(inputs / "qwen"), "--recipe", str(folder / "recipe.yaml"), *_texts(inputs / "text"), *out]


def _with_texts(folder: Path, inputs: Path) -> list[str]:
    out = ["--budget", "2MB", "--dry-run", "--memory", "2GB", "--threads", "1", "--out", str(folder.parent / "out")]
    return ["export", str(inputs / "qwen"), *_texts(folder), *out]


def _with_chats(folder: Path, inputs: Path) -> list[str]:
    texts = ["--calibration", str(folder / "chats.jsonl"), "--text", str(inputs / "text" / "heldout")]
    out = ["--dry-run", "--memory", "2GB", "--threads", "1", "--out", str(folder.parent / "out")]
    return ["export", str(folder), "--budget", "2MB", *texts, *out]


def _validate(file: str) -> Callable[[Path, Path], list[str]]:
    def command(folder: Path, inputs: Path) -> list[str]:
        against = ["--against", str(inputs / "qwen"), "--text", str(inputs / "text" / "heldout" / "words.txt")]
        return ["validate", str(folder / file), *against, "--threads", "1"]

    return command


def _validate_beside_logits(folder: Path, inputs: Path) -> list[str]:
    logits = ["--reference-logits", str(folder / "logits"), "--threads", "1"]
    return ["validate", str(inputs / "gguf" / "model.gguf"), *logits]


_CHECKPOINTS = ("qwen", "qwen", "mixtral")

KINDS = {
    "safetensors": Kind(_CHECKPOINTS, damage_weights, _read_checkpoint, _inspect, share=18),
    "config": Kind(_CHECKPOINTS, damage_config, _read_checkpoint, _export, share=14),
    "index": Kind(("mixtral", "mixtral", "qwen"), damage_index, _read_checkpoint, _export, share=4),
    "tokenizer": Kind(("qwen", "mixtral"), damage_tokenizer, _read_checkpoint, _export, share=12),
    "recipe": Kind(("recipe",), damage_recipe, _read_recipe, _with_recipe, share=8),
    "text": Kind(("text",), damage_text, _read_text, _with_texts, share=3),
    "chats": Kind(("chats",), damage_chats, read_chats, _with_chats, share=3),
    "logits": Kind(("logits",), damage_logits, _read_logits, _validate_beside_logits, share=3),
    "flags": Kind(("empty",), None, _read_flags, share=3),
    "words": Kind(("empty",), None, _read_words, share=3),
    "published": Kind(("published",), damage_published, read_published, _validate(""), share=6),
    "gguf": Kind(("gguf",), damage_gguf, _read_gguf, _validate("model.gguf"), share=10),
    "source": Kind(("gguf",), damage_gguf, _read_gguf_source, _export_gguf, share=5),
    "onnx": Kind(("onnx",), damage_onnx, _read_onnx, _validate(""), share=11),
}
