"""Finds, describes and opens a model in a file that anybody wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.files.gguf.gguf_split import one_split_model, split_parts
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.weights import WrittenWeights
from validate.files.file_facts import FileFacts, gguf_facts, onnx_facts
from validate.files.onnx_files import find_onnx_model, onnx_model_file
from validate.runtimes import time_limit
from validate.runtimes.backend import RuntimeBackend
from validate.runtimes.cost import RuntimeCost
from validate.runtimes.gpu import PROVIDERS, check_gpu_layers, check_provider, offloads
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.measure import artifact_bytes, measure_artifact
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.vocabulary.vocabulary import GgufVocabulary, TokenizerVocabulary, Vocabulary

__all__ = ["ModelFile", "RuntimeChoice", "find_model_file", "published_files"]

_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class RuntimeChoice:
    """The settings with which files are run."""

    threads: int
    gpu_layers: int = 0  # layers that llama.cpp puts on a GPU
    providers: str = "cpu"  # for ONNX Runtime: a key of validate.runtimes.gpu.PROVIDERS


@dataclass(frozen=True)
class ModelFile:
    """A GGUF file, or an ONNX graph with its weights."""

    format: Literal["gguf", "onnx"]
    path: Path  # the GGUF file, or the graph (not its folder)

    @cached_property
    def facts(self) -> FileFacts:
        """The facts that the file gives about itself.

        Raises:
            InputError: the file cannot be read.
        """
        time_limit.tell("reading its header")
        with time_limit.working():
            return gguf_facts(self.path) if self.format == "gguf" else onnx_facts(self.path)

    @property
    def runtime(self) -> str:
        """The runtime's name, for sentences."""
        return "llama.cpp" if self.format == "gguf" else "ONNX Runtime"

    @property
    def n_bytes(self) -> int:
        """The size, with the files beside a graph; 0 if it is gone."""
        return artifact_bytes(self.format, self.path)

    def may_use_gpu(self, choice: RuntimeChoice) -> bool:
        """True if the installed runtime may use a GPU's driver."""
        return offloads() if self.format == "gguf" else choice.providers != "cpu"

    def check_can_run(self, choice: RuntimeChoice) -> None:
        """Refuses a GPU that the installed runtime cannot use.

        Raises:
            MissingGpuError: the choice asks for such a GPU.
        """
        if self.format == "gguf":
            check_gpu_layers(choice.gpu_layers)
        else:
            check_provider(choice.providers)

    def open(self, choice: RuntimeChoice, n_tokens: int) -> RuntimeBackend:
        """Loads it in its runtime, for sequences of up to ``n_tokens``.

        Raises:
            InputError: the runtime cannot load it.
            MissingGpuError: the installed runtime has no GPU, and one is asked for.
        """
        self.check_can_run(choice)
        time_limit.tell("loading it")
        if self.format == "gguf":
            return LlamaCppBackend(self.path, n_ctx=n_tokens, threads=choice.threads, gpu_layers=choice.gpu_layers)
        return OnnxRuntimeBackend(self.path, threads=choice.threads, providers=PROVIDERS[choice.providers])

    def measure(self, choice: RuntimeChoice, prompt_T: npt.NDArray[np.int64], context: int) -> RuntimeCost:
        """Measures memory and speed with a cache of this many tokens, in a process of its own.

        Raises:
            RuntimeCrashError: the runtime crashed or refused the file.
        """
        time_limit.tell("measuring its memory and speed")
        return measure_artifact(
            self.format,
            self.path,
            context=context,
            kv_type="f16",
            threads=choice.threads,
            prompt=prompt_T,
            gpu_layers=choice.gpu_layers,
            providers=PROVIDERS[choice.providers],
            seconds=time_limit.limit_seconds(),
        )

    def weights(self, spec: ModelSpec) -> WrittenWeights:
        """Its tensors by role.

        Raises:
            InputError: they are not where this model has them; only our own graphs can be read.
        """
        time_limit.tell("reading its weights")
        with time_limit.working():
            return GgufWeights(self.path, spec) if self.format == "gguf" else OnnxWeights(self.path.parent, spec)

    def vocabulary(self) -> Vocabulary | None:
        """The file's vocabulary; for a graph, that of the tokenizer beside it, or None."""
        time_limit.tell("reading its vocabulary")
        if self.format == "gguf":
            return GgufVocabulary(self.path)
        folder = self.tokenizer_folder
        return None if folder is None else TokenizerVocabulary(folder)

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder of a graph's tokenizer: beside it, or a folder above, as on the hub."""
        folders = (self.path.parent, self.path.parent.parent)
        return next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)


def published_files(out: Path, report: Mapping[str, Any]) -> list[ModelFile]:
    """The files that one of our runs published.

    Raises:
        InputError: a file is gone, or is no longer a model.
    """
    files = []
    for artifact in report["artifacts"]:
        found = find_model_file(out / artifact["path"])
        if found is None:
            raise InputError(f"{out / artifact['path']}, which report.json names, is missing or damaged; export again")
        files.append(found)
    return files


def find_model_file(path: Path) -> ModelFile | None:
    """The model at a path: a GGUF file, an ``.onnx`` file, or the folder of an ONNX model or of a single GGUF model.

    A model that was split into parts is found by its first part.

    Returns:
        None if there is no such file, or the folder holds something else.

    Raises:
        InputError: the folder holds several GGUF models, or a part of one is missing.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC:
                _refuse_missing_part(split_parts(path))
                return ModelFile("gguf", path)
        return ModelFile("onnx", onnx_model_file(path)) if path.suffix == ".onnx" else None
    if not path.is_dir():
        return None
    graph = find_onnx_model(path)
    if graph is not None:
        return ModelFile("onnx", graph)
    files = sorted(path.glob("*.gguf"))
    parts = one_split_model(files)
    if parts is not None:
        _refuse_missing_part(parts)
        return ModelFile("gguf", parts[0])
    if len(files) > 1:
        raise InputError(f"{path} holds {len(files)} GGUF files; give one of them, such as {files[0]}")
    return ModelFile("gguf", files[0]) if files else None


def _refuse_missing_part(parts: Sequence[Path]) -> None:
    missing = next((part for part in parts if not part.is_file()), None)
    if missing is not None:
        raise InputError(f"{missing} is missing: the model was split into {len(parts)} parts; put all there")
