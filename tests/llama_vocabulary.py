"""Tokenizes with llama.cpp by the vocabulary that our exporter writes for a folder's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressors.model.config.reading import read_spec
from exporter.writing.gguf.container import render_header, render_values
from exporter.writing.gguf.metadata import model_metadata
from exporter.writing.gguf.vocabulary.metadata import vocabulary_metadata
from tests.described_folder import DescribedFolder
from validate.vocabulary.vocabulary import GgufVocabulary

__all__ = ["llama_tokens", "write_vocabulary"]


def write_vocabulary(folder: Path, path: Path) -> None:
    """Writes a GGUF file without tensors."""
    spec = read_spec(folder)
    metadata = {
        **model_metadata(spec, DescribedFolder(folder), "vocabulary", "F32"),
        **vocabulary_metadata(folder, spec.vocab_size),
    }
    path.write_bytes(render_header(len(metadata), render_values(metadata), []))


def llama_tokens(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts, with begin and end tokens around each, and special tokens inside recognised."""
    path = folder / "vocabulary.gguf"
    write_vocabulary(folder, path)
    vocabulary = GgufVocabulary(path)
    return [vocabulary.encode(text, parse_special=True) for text in texts]
