"""A model of which only the description is there: what files say of it can be tested without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compressors.model.config.reading import read_spec
from compressors.model.description.spec import ModelSpec


@dataclass(frozen=True)
class DescribedFolder:
    """The origin in a folder with ``config.json`` and, where a test needs them, tokenizer and model card."""

    path: Path

    @property
    def spec(self) -> ModelSpec:
        """The description in ``config.json``."""
        return read_spec(self.path)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder."""
        return self.path
