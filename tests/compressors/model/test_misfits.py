"""Checkpoints that look like a language model and are something else: the cause is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressors.model.errors import InputError, UnsupportedError
from compressors.model.sources.hugging_face.checkpoint import Checkpoint

_HEAD = "lm_head.weight"
_Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tied(tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> Path:
    """One layer; the head is the embedding."""
    return toy_checkpoint(tmp_path, n_layers=1)


@pytest.fixture
def untied(tied: Path) -> Path:
    """The same with a head of its own."""
    _edit_config(tied, tie_word_embeddings=False)
    _edit(tied, lambda tensors: tensors | {_HEAD: tensors["model.embed_tokens.weight"].clone()})
    return tied


def _edit(folder: Path, change: Callable[[_Tensors], _Tensors]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def _edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def _without_prefix(tensors: _Tensors) -> _Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _prefixed(prefix: str) -> Callable[[_Tensors], _Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def _without_head(tensors: _Tensors) -> _Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != _HEAD}


def _classifier(tensors: _Tensors) -> _Tensors:
    return _without_head(tensors) | {"score.weight": torch.zeros(2, 256, dtype=torch.bfloat16)}


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_names_without_prefix_are_read_as_transformers_reads_them(head: str, request: pytest.FixtureRequest) -> None:
    """AutoModel saves such names; a separate head beside them keeps its name."""
    folder = request.getfixturevalue(head)
    wanted = {role: Checkpoint(folder).tensor(role, None if role.is_global else 0) for role in _roles(folder)}
    _edit(folder, _without_prefix)
    found, theirs = Checkpoint(folder), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for role, tensor in wanted.items():
        layer = None if role.is_global else 0
        assert torch.equal(found.tensor(role, layer), tensor)
        assert torch.equal(theirs[found.spec.tensor(role, layer).name.format(layer=layer)], tensor)
    assert torch.equal(found.expert("expert up", 0, 3), theirs["model.layers.0.mlp.experts.gate_up_proj"][3][128:])


def _roles(folder: Path) -> list:  # type: ignore[type-arg]
    spec = Checkpoint(folder).spec
    return [tensor.role for tensor in (*spec.tensors, *spec.layers[0].shared_tensors)]


@pytest.mark.parametrize("change", [_without_head, lambda tensors: _without_prefix(_without_head(tensors))])
def test_a_model_without_its_head_is_named(untied: Path, change: Callable[[_Tensors], _Tensors]) -> None:
    _edit_config(untied, architectures=["Qwen3MoeModel"])
    _edit(untied, change)
    with pytest.raises(InputError, match=r"this is Qwen3MoeModel without lm_head\.weight.*the whole language model"):
        Checkpoint(untied)


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_a_classifier_is_named(head: str, kind: str, request: pytest.FixtureRequest) -> None:
    """A tied one, too: transformers would take the embedding for its head, but it was never trained to write."""
    folder = request.getfixturevalue(head)
    _edit_config(folder, architectures=[f"Qwen3MoeFor{kind}"])
    _edit(folder, _classifier)
    with pytest.raises(
        UnsupportedError,
        match=rf"this is a Qwen3MoeFor{kind} checkpoint: it has no lm_head but score\.weight.*give",
    ):
        Checkpoint(folder)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.", "base_model.model.", "module."])
def test_another_prefix_is_named(untied: Path, prefix: str) -> None:
    _edit(untied, _prefixed(prefix))
    with pytest.raises(InputError, match=rf"names begin with {prefix}.*AutoModelForCausalLM, then save_pretrained"):
        Checkpoint(untied)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", "quantized already .*q_proj.qweight"),
        ("model.layers.0.self_attn.q_proj.weight_packed", "quantized already"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", "quantized already"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "an adapter is in the weights.*merge it"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "an adapter is in the weights"),
    ],
)
def test_names_that_tell_what_happened_are_understood(tied: Path, name: str, said: str) -> None:
    query = "model.layers.0.self_attn.q_proj.weight"
    _edit(tied, lambda tensors: {name if found == query else found: tensor for found, tensor in tensors.items()})
    with pytest.raises(InputError, match=said):
        Checkpoint(tied)


@pytest.mark.parametrize("name", ["quantize_config.json", "hf_quant_config.json", "quant_config.json"])
def test_a_quantizer_s_own_file_explains_tensors_that_do_not_fit(tied: Path, name: str) -> None:
    """Beside tensors that do fit it means nothing; transformers does not read it."""
    (tied / name).write_text("{}")
    Checkpoint(tied)
    query = "model.layers.0.self_attn.q_proj.weight"
    _edit(tied, lambda tensors: tensors | {query: tensors[query][:, :128].to(torch.int8)})
    with pytest.raises(InputError, match=rf"quantized already \({name}.*base_model of its model card"):
        Checkpoint(tied)


def test_an_adapter_s_folder_is_named(tied: Path) -> None:
    (tied / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds a PEFT adapter .*merge_and_unload.*if it is merged already, remove"):
        Checkpoint(tied)


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_a_model_that_also_sees_is_named(tied: Path, key: str) -> None:
    _edit_config(tied, **{key: {"hidden_size": 256}})
    with pytest.raises(UnsupportedError, match=rf"takes more than text \({key}\).*give the language model"):
        Checkpoint(tied)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json"])
def test_every_json_file_of_the_folder_is_looked_at(tied: Path, name: str) -> None:
    """Libraries read them later, and answer with errors of their own."""
    (tied / name).write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(InputError, match=rf"{name} is not valid JSON \(it is nested deeper"):
        Checkpoint(tied)


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt"])
def test_every_text_of_the_folder_is_looked_at(tied: Path, name: str) -> None:
    (tied / name).write_bytes(b"{{ \xff }}")
    with pytest.raises(InputError, match=rf"{name} is no UTF-8 text"):
        Checkpoint(tied)
