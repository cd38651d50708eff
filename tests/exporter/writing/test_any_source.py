"""A model that lies in memory runs and is written like a checkpoint: nothing that works with a source looks for files.

Only its tokenizer has a folder, and that holds nothing else but the numbers of special tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from compressors.calibration.splits import read_splits
from compressors.model.config.reading import read_spec
from compressors.model.description.family import Family
from compressors.model.description.roles import Role
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.storage_type import StorageType
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from exporter.hub import bundled_text
from exporter.planning.job import Flags
from exporter.planning.planner import TextCounts, choose_recipe
from exporter.publishing.described_models import described_source
from exporter.publishing.deviations import find_deviations
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import write_onnx
from tests.families.conftest import logits_of

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class _InMemory:
    """The tensors and settings of a checkpoint, read once; its folder may go."""

    files: tuple[Path, ...] = ()
    stored_as: str | None = None
    parts_read_past: Mapping[str, int] = {}
    notes: tuple[str, ...] = ()
    path = Path("a model in memory")
    config_path = Path("settings in memory")

    def __init__(self, folder: Path, tokenizer_folder: Path) -> None:
        self.spec = read_spec(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.tokenizer_folder = tokenizer_folder
        self._tensors = load_file(folder / "model.safetensors")

    @property
    def family(self) -> Family:
        return self.spec.family

    @property
    def storage_type(self) -> StorageType:
        return StorageType.BF16

    @property
    def dtype(self) -> torch.dtype:
        return self._named(Role.EXPERT_DOWN, 0, 0).dtype

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def dtype_of(self, role: Role, layer: int | None = None) -> torch.dtype:
        return self.tensor(role, layer).dtype

    def tensor(self, role: Role, layer: int | None = None) -> torch.Tensor:
        is_tied = role is Role.HEAD and self.spec.tied_embeddings
        return self._named(Role.TOKEN_EMBEDDING if is_tied else role, layer)

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        return self.tensor(role, layer)[rows]

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        out.copy_(self._named(role, layer, expert))

    def stored_types(self, role: Role, layer: int | None) -> tuple[GGMLQuantizationType, ...]:
        return ()

    def stored_rows(
        self, role: Role, layer: int | None, part: int, rows: slice, expert: int | None = None
    ) -> torch.Tensor:
        raise AssertionError("nothing is stored in ggml's types")

    def identity(self) -> str:
        return "in memory"

    def _named(self, role: Role, layer: int | None, expert: int | None = None) -> torch.Tensor:
        return self._tensors[self.spec.tensor(role, layer).name.format(layer=layer, expert=expert)]


@pytest.fixture(params=["fine", "olmoe"])
def folder(request: pytest.FixtureRequest, toy_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return toy_checkpoint(tmp_path, n_layers=2, model=request.param)


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder)


@pytest.fixture
def in_memory(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> Source:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in _TOKENIZER:
        shutil.copyfile(folder / name, tokenizer / name)
    source = _InMemory(folder, tokenizer)
    (tokenizer / "config.json").write_text(json.dumps({key: source.config[key] for key in _SPECIAL_TOKENS}))
    return source


def _pruned(source: Source) -> Student:
    n_experts = source.spec.n_experts
    return Student(source, ExpertMap.keeping(n_experts, [range(6), range(n_experts - 6, n_experts)]))


@torch.no_grad()
def test_it_streams_to_the_same_logits(
    checkpoint: Checkpoint, in_memory: Source, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    tokens_BT = torch.from_numpy(heldout_tokens[:64].reshape(2, 32))
    expected = logits_of(StreamedModel(_pruned(checkpoint)), tokens_BT)
    shutil.rmtree(checkpoint.path)
    assert torch.equal(logits_of(StreamedModel(_pruned(in_memory)), tokens_BT), expected)
    assert expected.std() > 0.1


def test_it_is_written_to_the_same_bytes(checkpoint: Checkpoint, in_memory: Source, tmp_path: Path) -> None:
    expected = _written(checkpoint, tmp_path / "from a checkpoint")
    shutil.rmtree(checkpoint.path)
    found = _written(in_memory, tmp_path / "from memory")
    assert {"x.gguf", "onnx/model.onnx", "onnx/genai_config.json", "student/config.json"} <= found.keys()
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def _written(source: Source, folder: Path) -> dict[str, bytes]:
    """Every file that can be written of a student, by its path."""
    folder.mkdir()
    student = _pruned(source)
    write_gguf(student, "Q4_0", folder / "x.gguf", name="x", threads=1)
    write_onnx(student, "Q4_0", folder / "onnx", threads=1)
    write_client_files(student, folder / "onnx")
    write_checkpoint(student, folder / "student")
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_is_planned(checkpoint: Checkpoint, in_memory: Source, tmp_path: Path) -> None:
    expected = _planned(checkpoint)
    shutil.rmtree(checkpoint.path)
    assert _planned(in_memory) == expected


def _planned(source: Source) -> tuple[object, ...]:
    """What is decided of a model before any work: the recipe apart from its identity, predictions and deviations."""
    job = Flags(budget="3MB", budget_kind="file", quant="Q4_0", formats="gguf", context=512, threads=1).job()
    counts = TextCounts(calibration=64, selection=20, heldout_files=5)
    splits = read_splits(bundled_text("calibration"), bundled_text("heldout"))
    recipe, predictions, refused = choose_recipe(job, source, "x", splits, counts, 8_000_000_000)
    described = described_source(recipe.source, source)
    return (
        recipe.compress,
        recipe.file("gguf"),
        predictions,
        refused,
        described | {"identity": None},
        *(find_deviations(source, ("gguf", "onnx"), "x")),
    )
