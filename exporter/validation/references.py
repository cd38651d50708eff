"""The references of ``moe-export validate``: a checkpoint in torch, another file, or a logits file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressors.calibration.splits import TextTokenizer, TokenBlocks, block_length_of, tokenize_heldout
from compressors.calibration.teacher import write_log_probs
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.running.recorder import RoutingRecorder
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from exporter.file_names import ROUTING
from exporter.validation.guarded import Limits, run_guarded
from validate.files.model_file import ModelFile, RuntimeChoice
from validate.metrics.evaluation import evaluate
from validate.metrics.logits_file import LogitsFile, LogitsFileWriter
from validate.runtimes.backend import scored_positions
from validate.vocabulary.vocabulary import GgufVocabulary, TokenizerVocabulary, Vocabulary

__all__ = ["Reference", "StoredReference", "against_checkpoint", "against_file", "against_logits_file"]


@dataclass(frozen=True)
class Reference:
    """A model on the held-out chunks."""

    name: str  # for the report
    runtime: str
    chunks_BT: npt.NDArray[np.int64]
    log_probs: LogitsFile
    text_sha256: str | None = None  # None if only its tokens are known
    routing: RoutingRecord | None = None  # None if another program wrote its log-probabilities, or it shows none
    n_experts: int | None = None  # None if it is not known
    vocabulary: Vocabulary | None = None  # None if only its size is known
    source: Source | None = None  # its weights

    @property
    def n_layers(self) -> int | None:
        """The number of layers; None without routing."""
        return None if self.routing is None else len(self.routing.experts_LTK)


@dataclass(frozen=True)
class StoredReference:
    """A reference that is stored in files, so that one process can hand it to another."""

    name: str
    runtime: str
    logits: Path
    n_tokens: int  # the length of a chunk
    text_sha256: str | None = None
    routing: Path | None = None
    n_experts: int | None = None
    source: Path | None = None  # the place of the original
    file: ModelFile | None = None  # somebody else's
    seconds_per_chunk: float = 0.0  # 0 if it is not known

    def open(self, file: ModelFile) -> Reference:
        """Opens the reference. It may open another program's file for its vocabulary: use a guarded process.

        Args:
            file: the file that will be compared; where it has a layer for MTP, so has the original, if it can.

        Raises:
            InputError: a file was changed or removed meanwhile.
        """
        log_probs = LogitsFile(self.logits)
        source = None if self.source is None else _opened(self.source, has_mtp=file.facts.n_mtp > 0)
        vocabulary: Vocabulary | None = None
        if source is not None:
            vocabulary = TokenizerVocabulary(source.tokenizer_folder)
        elif self.file is not None:
            vocabulary = self.file.vocabulary()
        return Reference(
            name=self.name,
            runtime=self.runtime,
            chunks_BT=log_probs.tokens_BT,
            log_probs=log_probs,
            text_sha256=self.text_sha256,
            routing=None if self.routing is None else RoutingRecord.load(self.routing),
            n_experts=self.n_experts,
            vocabulary=vocabulary,
            source=source,
        )


def _opened(path: Path, *, has_mtp: bool) -> Source:
    try:
        return open_source(path, keeps_mtp=has_mtp)
    except UnsupportedError:
        if not has_mtp:
            raise
        return open_source(path)


def against_checkpoint(
    source: Source, text: Path, chunks_per_file: int, logits_file: Path, folder: Path
) -> StoredReference:
    """Runs a checkpoint, layer by layer, and writes its log-probabilities into the file, its routing into the folder.

    Raises:
        InputError: the text, the tokenizer or the checkpoint cannot be used.
    """
    block_length = block_length_of(source.spec.context_length)
    split, blocks = tokenize_heldout(text, source.tokenizer_folder, block_length, chunks_per_file)
    chunks = blocks.leading(chunks_per_file).tokens_BT
    writer = LogitsFileWriter(logits_file, chunks.numpy(), source.spec.vocab_size)
    model = StreamedModel(Student.teacher(source))
    recorder = RoutingRecorder(model.spec)
    began = time.monotonic()
    (hidden,) = model.stream([TokenGroup(chunks, [recorder.observe])])
    write_log_probs(model, chunks, hidden, scored_positions(chunks.shape[1]), writer, range(len(chunks)))
    seconds = time.monotonic() - began
    return StoredReference(
        name=str(source.path),
        runtime="torch",
        logits=logits_file,
        n_tokens=chunks.shape[1],
        text_sha256=split.sha256,
        routing=_stored(recorder.routing(), folder),
        n_experts=source.spec.n_experts,
        source=source.path,
        seconds_per_chunk=seconds / len(chunks),
    )


def against_file(
    file: ModelFile, text: Path, chunks_per_file: int, logits_file: Path, folder: Path, how: RuntimeChoice
) -> StoredReference:
    """Runs a file in its runtime over text in its own vocabulary, and writes log-probabilities and routing.

    Raises:
        InputError: the file has no tokenizer, or it or the text cannot be used.
        MissingGpuError: the installed runtime has no GPU, and one is asked for.
        RuntimeCrashError: the runtime died of the file, did not end or failed.
    """
    limits = Limits.of_file(file, on_gpu=file.may_use_gpu(how))
    said = run_guarded(file, limits, _run_file, file, text, chunks_per_file, logits_file, folder, how)
    routing = None if said["routing"] is None else Path(said["routing"])
    return StoredReference(name=str(file.path), logits=logits_file, file=file, **said | {"routing": routing})


def _run_file(
    file: ModelFile, text: Path, chunks_per_file: int, logits_file: Path, folder: Path, how: RuntimeChoice
) -> dict[str, Any]:
    """Runs in a guarded process, for :func:`against_file`; returns parts of a :class:`StoredReference`."""
    torch.set_num_threads(how.threads)
    n_experts = file.facts.n_experts  # first: our reader explains a bad header better than llama.cpp does
    vocabulary = file.vocabulary()
    if vocabulary is None:
        raise InputError(f"--against: {file.path} has no tokenizer beside it; put tokenizer.json there")
    tokenizer: Path | TextTokenizer = vocabulary if isinstance(vocabulary, GgufVocabulary) else Path(vocabulary.where)
    split, blocks = tokenize_heldout(text, tokenizer, blocks_per_file=chunks_per_file)
    chosen: TokenBlocks = blocks.leading(chunks_per_file)
    chunks_BT = chosen.tokens_BT.numpy()
    backend = file.open(how, chunks_BT.shape[1])
    writer = LogitsFileWriter(logits_file, chunks_BT, backend.vocab_size)
    began = time.monotonic()
    evaluation = evaluate(backend, chunks_BT, {}, record=writer)
    seconds = time.monotonic() - began
    routing = _stored(evaluation.routing, folder)
    return {
        "runtime": backend.runtime,
        "n_tokens": chunks_BT.shape[1],
        "text_sha256": split.sha256,
        "routing": None if routing is None else str(routing),
        "n_experts": n_experts,
        "seconds_per_chunk": seconds / len(chunks_BT),
    }


def against_logits_file(path: Path) -> StoredReference:
    """Makes a reference of a logits file that llama-perplexity or an earlier run wrote.

    Raises:
        InputError: the file is damaged.
    """
    n_tokens = LogitsFile(path).tokens_BT.shape[1]
    return StoredReference(name=str(path), runtime="unknown", logits=path, n_tokens=n_tokens)


def _stored(routing: RoutingRecord | None, folder: Path) -> Path | None:
    if routing is None:
        return None
    path = ROUTING.within(folder)
    routing.save(path)
    return path
