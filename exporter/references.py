"""What ``moe-export validate`` measures files against: a checkpoint in torch, another file, or a logits file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compressors.calibration import TextTokenizer, TokenBlocks, block_length_of, tokenize_heldout
from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError
from compressors.model.recorder import RoutingRecorder
from compressors.model.routing import Routing
from compressors.model.streaming import StreamedModel, TokenGroup
from compressors.model.student import Student
from compressors.teacher import write_log_probs
from validate.backend import scored_positions
from validate.evaluation import evaluate
from validate.logits_file import LogitsFile, LogitsFileWriter
from validate.model_file import ModelFile, RuntimeChoice
from validate.vocabulary import GgufVocabulary, TokenizerVocabulary, Vocabulary

__all__ = ["Reference", "against_checkpoint", "against_file", "against_logits_file"]


@dataclass(frozen=True)
class Reference:
    """A model on the held-out chunks."""

    name: str  # for the report
    runtime: str
    chunks_BT: npt.NDArray[np.int64]
    log_probs: LogitsFile
    text_sha256: str | None = None  # None if only its tokens are known
    routing: Routing | None = None  # None if somebody else wrote its log-probabilities, or it shows none
    n_experts: int | None = None  # None if it is not known
    vocabulary: Vocabulary | None = None  # None if only its size is known
    source: Checkpoint | None = None  # its weights

    @property
    def n_layers(self) -> int | None:
        """None without routing."""
        return None if self.routing is None else len(self.routing.experts_LTK)


def against_checkpoint(source: Checkpoint, text: Path, chunks_per_file: int, logits_file: Path) -> Reference:
    """Runs a checkpoint, layer by layer, and writes its log-probabilities into the file.

    Raises:
        InputError: the text, the tokenizer or the checkpoint cannot be used.
    """
    block_length = block_length_of(source.shape.context_length)
    split, blocks = tokenize_heldout(text, source.folder, block_length, chunks_per_file)
    chunks = blocks.leading(chunks_per_file).tokens_BT
    writer = LogitsFileWriter(logits_file, chunks.numpy(), source.shape.vocab_size)
    model = StreamedModel(Student.teacher(source))
    recorder = RoutingRecorder(model.shape)
    (hidden,) = model.stream([TokenGroup(chunks, [recorder.observe])])
    write_log_probs(model, chunks, hidden, scored_positions(chunks.shape[1]), writer, range(len(chunks)))
    return Reference(
        name=str(source.folder),
        runtime="torch",
        chunks_BT=chunks.numpy(),
        log_probs=LogitsFile(logits_file),
        text_sha256=split.sha256,
        routing=recorder.routing(),
        n_experts=source.shape.n_experts,
        vocabulary=TokenizerVocabulary(source.folder),
        source=source,
    )


def against_file(file: ModelFile, text: Path, chunks_per_file: int, logits_file: Path, how: RuntimeChoice) -> Reference:
    """Runs a file in its runtime over text in its own vocabulary, and writes its log-probabilities.

    Raises:
        InputError: the file has no tokenizer, or it or the text cannot be used.
        MissingGpuError: the installed runtime has no GPU, and one is asked for.
    """
    vocabulary = file.vocabulary()
    if vocabulary is None:
        raise InputError(f"--against: {file.path} has no tokenizer beside it; put tokenizer.json there")
    tokenizer: Path | TextTokenizer = vocabulary if isinstance(vocabulary, GgufVocabulary) else Path(vocabulary.where)
    split, blocks = tokenize_heldout(text, tokenizer, blocks_per_file=chunks_per_file)
    chosen: TokenBlocks = blocks.leading(chunks_per_file)
    chunks_BT = chosen.tokens_BT.numpy()
    backend = file.open(how, chunks_BT.shape[1])
    writer = LogitsFileWriter(logits_file, chunks_BT, backend.vocab_size)
    evaluation = evaluate(backend, chunks_BT, {}, record=writer)
    return Reference(
        name=str(file.path),
        runtime=backend.runtime,
        chunks_BT=chunks_BT,
        log_probs=LogitsFile(logits_file),
        text_sha256=split.sha256,
        routing=evaluation.routing,
        n_experts=file.facts.n_experts,
        vocabulary=vocabulary,
    )


def against_logits_file(path: Path) -> Reference:
    """What somebody's llama-perplexity, or an earlier run, said about a model.

    Raises:
        InputError: the file is damaged.
    """
    log_probs = LogitsFile(path)
    return Reference(name=str(path), runtime="unknown", chunks_BT=log_probs.tokens_BT, log_probs=log_probs)
