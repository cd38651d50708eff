"""The written student is the same student when our reader or stock transformers reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.errors import InputError
from compressors.model.files.storage_type import StorageType
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, Student
from exporter import load_student
from exporter.writing.hf_checkpoint import write_checkpoint
from tests.exporter.writing.random_bases import on_random_bases


@pytest.fixture(scope="module", params=["coarse", "fine"])
def student(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]
) -> Student:
    """Two layers, half of the experts (another half in each layer), and float32 routers as recovery leaves them."""
    source = Checkpoint(toy_checkpoint(tmp_path_factory.mktemp(request.param), n_layers=2, model=request.param))
    n_experts = source.spec.n_experts
    pruned = Student(
        source, ExpertMap.keeping(n_experts, (tuple(range(0, n_experts, 2)), tuple(range(1, n_experts, 2))))
    )
    generator = torch.Generator().manual_seed(0)
    routers = {}
    for layer in range(2):
        router = pruned.tensor(Role.ROUTER, layer).float()
        routers[pruned.name(Role.ROUTER, layer)] = router + 0.01 * torch.randn(router.shape, generator=generator)
    return pruned.with_overlay(routers)


@pytest.fixture(scope="module")
def written(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "student"
    write_checkpoint(student, folder)
    return folder


def test_our_reader_finds_every_tensor_of_the_student(written: Path, student: Student) -> None:
    checkpoint = Checkpoint(written)
    assert checkpoint.spec == student.spec
    assert set(checkpoint.headers) == {name for name, _ in checkpoint.expected_shapes()}
    for described, layer in checkpoint.spec.places:
        role = described.role
        if layer is not None and described.is_per_expert:
            for expert in range(student.spec.n_experts):
                tensor = student.expert(role, layer, expert)
                assert torch.equal(checkpoint.expert(role, layer, expert), tensor)
        else:
            assert torch.equal(checkpoint.tensor(role, layer), student.tensor(role, layer))


def test_routers_stay_float32_and_everything_else_as_it_was(written: Path, student: Student) -> None:
    routers = {student.name(Role.ROUTER, layer) for layer in range(2)}
    for name, header in Checkpoint(written).headers.items():
        assert header.storage_type is (StorageType.F32 if name in routers else StorageType.BF16), name


@torch.no_grad()
def test_stock_transformers_gives_the_student_s_logits(
    written: Path, student: Student, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    tokens_BT = torch.from_numpy(heldout_tokens[: 2 * 64].reshape(2, 64))
    stock = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    model = StreamedModel(student)
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    logits = torch.cat([part for _, part in model.logits_in_chunks(hidden, slice(0, 64))])
    assert (logits - stock(tokens_BT).logits.flatten(0, 1)).abs().max() < 1e-4


def test_one_file_per_layer_and_an_index_of_them(written: Path) -> None:
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(file.name for file in written.glob("*.safetensors")) == files
    tensors = {file: load_file(written / file) for file in files}
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file in files for name in tensors[file]}
    assert index["metadata"]["total_size"] == sum(t.nbytes for part in tensors.values() for t in part.values())
    assert all(name.startswith("model.layers.0.") for name in tensors[files[0]])


def test_config_and_tokenizer_belong_to_the_student(written: Path, student: Student) -> None:
    config = AutoConfig.from_pretrained(written)
    assert (config.num_experts, config.num_experts_per_tok) == (student.spec.n_experts, student.spec.top_k)
    source = AutoTokenizer.from_pretrained(student.source.path)
    text = "The quick brown fox, twice: ünïcödé."
    assert AutoTokenizer.from_pretrained(written)(text)["input_ids"] == source(text)["input_ids"]


def test_the_same_student_gives_the_same_bytes(written: Path, student: Student, tmp_path: Path) -> None:
    progress: list[int] = []
    write_checkpoint(student, tmp_path / "again", progress=progress.append)
    assert progress == [1, 1]
    assert _digests(tmp_path / "again") == _digests(written)


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_top_k_falls_with_the_experts(toy_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Two experts left: stock transformers must not look for four."""
    source = Checkpoint(toy_checkpoint(tmp_path, n_layers=2))
    pair = Student(source, ExpertMap.keeping(source.spec.n_experts, ((3, 4), (1, 7))))
    write_checkpoint(pair, tmp_path / "pair")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pair", dtype=torch.float32)
    assert stock.config.num_experts_per_tok == 2
    assert torch.isfinite(stock(torch.arange(8)[None]).logits).all()


def test_a_source_that_transformers_5_saved_gives_the_same_student(student: Student, tmp_path: Path) -> None:
    """Its config spells the expert count its own way; the student's must not say both the old and the new count."""
    model = AutoModelForCausalLM.from_pretrained(student.source.path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "resaved")
    resaved = Student(Checkpoint(tmp_path / "resaved"), student.experts, student.overlay)
    write_checkpoint(resaved, tmp_path / "student")
    checkpoint = Checkpoint(tmp_path / "student")
    assert checkpoint.spec == student.spec
    assert AutoConfig.from_pretrained(tmp_path / "student").num_experts == student.spec.n_experts
    for expert in range(student.spec.n_experts):
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            assert torch.equal(checkpoint.expert(role, 1, expert), student.expert(role, 1, expert))


@torch.no_grad()
def test_a_student_on_shared_bases_is_put_together_again(toy_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The folder holds bases once and adapters, and no replaced expert; the loaded module is the student."""
    (tmp_path / "toy").mkdir()
    teacher = Student.teacher(Checkpoint(toy_checkpoint(tmp_path / "toy", n_layers=2)))
    student = on_random_bases(teacher, SharedBases((None, 0, 1, 0, SharedBases.ZERO, *[None] * 27), 2, 3), 1)
    write_checkpoint(student, tmp_path / "student")
    shared = student.shared(1)
    assert shared is not None
    stored = {name for file in (tmp_path / "student").glob("*.safetensors") for name in load_file(file)}
    for expert in range(student.spec.n_experts):
        for role in (Role.EXPERT_GATE, Role.EXPERT_DOWN):
            assert (student.name(role, 1, expert) in stored) == (shared.base_of[expert] is None)
    assert sum(".bases." in name for name in stored) == 3 * shared.n_bases
    assert sum(".adapter_" in name for name in stored) == 4 * len(shared.replaced)

    tokens_BT = torch.arange(64).reshape(2, 32)
    loaded = load_student(tmp_path / "student").float()
    model = StreamedModel(student)
    (states,) = model.stream([TokenGroup(tokens_BT)])
    expected = torch.cat([logits for _, logits in model.logits_in_chunks(states, slice(0, 32))])
    torch.testing.assert_close(loaded(tokens_BT).logits.flatten(0, 1), expected, atol=2e-4, rtol=1e-4)

    (tmp_path / "student" / "shared_bases.json").write_text('{"layers": [null]}')
    with pytest.raises(InputError, match="does not fit the tensors beside it"):
        load_student(tmp_path / "student")
