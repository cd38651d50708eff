"""Reading checkpoints: every tensor once, both layouts, and errors that name the tensor and the file."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.sources.hugging_face.checkpoint import Checkpoint

_GATE, _UP, _DOWN = Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor on disk, read with safetensors alone."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def one_layer(tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> Path:
    """One layer of the Qwen3-MoE, in a folder that a test may damage."""
    return toy_checkpoint(tmp_path, n_layers=1)


@pytest.fixture
def sharded(tmp_path: Path, coarse_folder: Path) -> Path:
    """A copy of the Mixtral in three files."""
    return Path(shutil.copytree(coarse_folder, tmp_path / "sharded"))


def test_every_tensor_on_disk_is_expected_exactly_once(family_folder: Path) -> None:
    on_disk: dict[str, tuple[int, ...]] = {}
    for file in family_folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            on_disk |= {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
    checkpoint = Checkpoint(family_folder)
    expected = list(checkpoint.expected_shapes())
    assert max(Counter(name for name, _ in expected).values()) == 1
    assert dict(expected) == on_disk == {name: header.shape for name, header in checkpoint.headers.items()}


def test_every_tensor_has_the_values_on_disk(family_folder: Path) -> None:
    """Reading all roles gives each tensor of the files once, whatever shard it lies in."""
    checkpoint, unread = Checkpoint(family_folder), _tensors(family_folder)
    for described, layer in checkpoint.spec.written.places:
        for expert in range(checkpoint.spec.n_experts) if described.is_per_expert else [None]:
            if layer is not None and expert is not None:
                tensor = checkpoint.expert(described.role, layer, expert)
            else:
                tensor = checkpoint.tensor(described.role, layer)
            wanted = unread.pop(described.name.format(layer=layer, expert=expert))
            assert tensor.dtype == wanted.dtype
            assert torch.equal(tensor, wanted)
    assert unread == {}


def test_the_two_layouts_of_files(fine_folder: Path, coarse_folder: Path) -> None:
    single, sharded = Checkpoint(fine_folder), Checkpoint(coarse_folder)
    assert [file.name for file in single.files] == ["model.safetensors"]
    assert [file.name for file in sharded.files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert {header.file for header in sharded.headers.values()} == set(sharded.files)
    weight_map = json.loads((coarse_folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: header.file.name for name, header in sharded.headers.items()} == weight_map


def test_sizes_are_those_of_the_tensors(family_folder: Path) -> None:
    checkpoint = Checkpoint(family_folder)
    assert checkpoint.n_bytes == sum(tensor.nbytes for tensor in _tensors(family_folder).values())
    assert checkpoint.dtype == torch.bfloat16


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_its_own(one_layer: Path) -> None:
    tied = Checkpoint(one_layer)
    assert torch.equal(tied.tensor(Role.HEAD), tied.tensor(Role.TOKEN_EMBEDDING))
    head = torch.arange(4096 * 256).reshape(4096, 256).to(torch.bfloat16)
    _edit(one_layer, lambda tensors: tensors.update({"lm_head.weight": head}))
    _set_config(one_layer, tie_word_embeddings=False)
    assert torch.equal(Checkpoint(one_layer).tensor(Role.HEAD), head)


def test_fused_experts_are_cut_at_the_right_rows(one_layer: Path) -> None:
    """transformers 5 holds [E, 2F, D] with the gate's rows first, and [E, D, F]."""
    single = Checkpoint(one_layer)
    wanted = {(role, e): single.expert(role, 0, e) for role in (_GATE, _UP, _DOWN) for e in range(32)}
    _edit(one_layer, _fuse)
    fused = Checkpoint(one_layer)
    assert len(fused.headers) == len(single.headers) - 3 * 32 + 2
    assert dict(fused.expected_shapes()) == {name: header.shape for name, header in fused.headers.items()}
    assert all(torch.equal(fused.expert(role, 0, e), tensor) for (role, e), tensor in wanted.items())
    assert fused.dtype == torch.bfloat16


def _fuse(tensors: dict[str, torch.Tensor]) -> None:
    experts = "model.layers.0.mlp.experts"
    gate, up, down = (
        torch.stack([tensors.pop(f"{experts}.{e}.{name}_proj.weight") for e in range(32)])
        for name in ("gate", "up", "down")
    )
    tensors[f"{experts}.gate_up_proj"] = torch.cat([gate, up], dim=1)
    tensors[f"{experts}.down_proj"] = down


def _set_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values, indent=1))


def test_identity_is_the_content_s_not_the_file_s(one_layer: Path, tmp_path: Path) -> None:
    identity = Checkpoint(one_layer).identity()
    assert re.fullmatch("[0-9a-f]{64}", identity)
    for file in one_layer.iterdir():
        os.utime(file, (1, 1))
    assert Checkpoint(one_layer).identity() == identity
    elsewhere = Path(shutil.copytree(one_layer, tmp_path / "elsewhere"))
    assert Checkpoint(elsewhere).identity() == identity


def test_identity_changes_with_the_config_and_with_the_headers(one_layer: Path) -> None:
    identities = [Checkpoint(one_layer).identity()]
    _set_config(one_layer, rope_theta=20000.0)
    identities.append(Checkpoint(one_layer).identity())
    _edit(one_layer, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].half()}))
    identities.append(Checkpoint(one_layer).identity())
    _edit(one_layer, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.zeros(1)}))
    identities.append(Checkpoint(one_layer).identity())
    assert len(set(identities)) == 4


_EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[_EXPERT]


def _misshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_EXPERT] = tensors[_EXPERT][:-1].contiguous()


def _retype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_EXPERT] = tensors[_EXPERT].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop, ["one-layer", "weight files"]),
        (_misshape, ["model.safetensors", "[127, 256]", "[128, 256]", "config.json"]),
        (_retype, ["model.safetensors", "F8_E4M3", "BF16"]),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(
    one_layer: Path, damage: Callable[[dict[str, torch.Tensor]], None], said: list[str]
) -> None:
    folder = one_layer.rename(one_layer.with_name("one-layer"))
    _edit(folder, damage)
    with pytest.raises(InputError) as refused:
        Checkpoint(folder)
    assert all(part in str(refused.value) for part in [_EXPERT, *said]), str(refused.value)


def test_misshapen_fused_experts_are_named(one_layer: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        _fuse(tensors)
        name = "model.layers.0.mlp.experts.down_proj"
        tensors[name] = tensors[name].transpose(1, 2).contiguous()

    _edit(one_layer, damage)
    with pytest.raises(InputError, match=r"experts\.down_proj has shape \[32, 128, 256\].*\[32, 256, 128\]"):
        Checkpoint(one_layer)


@pytest.mark.parametrize("length", [0, 4, 1000, -1])
def test_a_truncated_shard_is_named(sharded: Path, length: int) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors is truncated"):
        Checkpoint(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00003-of-00003\.safetensors, which is missing"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}', "\xff"]
)
def test_a_damaged_index_is_named(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json is not a weight index"):
        Checkpoint(sharded)


def test_a_folder_without_safetensors_is_refused(one_layer: Path) -> None:
    (one_layer / "model.safetensors").rename(one_layer / "pytorch_model.bin")
    with pytest.raises(InputError, match="only safetensors checkpoints are read"):
        Checkpoint(one_layer)


def test_a_file_that_disappears_after_opening_is_named(one_layer: Path) -> None:
    checkpoint = Checkpoint(one_layer)
    (one_layer / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: tensor model\.norm\.weight cannot be read"):
        checkpoint.tensor(Role.FINAL_NORM)
