"""A model of no supported family is refused with the nearest ones and what they lack, from names alone and at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families.refused import REASONS
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.hugging_face.unknown_family import refuse_unknown_family
from tests.families.checkpoints import write_model
from tests.families.rows import ROWS

_REPOSITORY = Path(__file__).parents[3]

_COMMON: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "rms_norm_eps": 1e-6,
}
_LLAMA = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *(f"model.layers.{layer}.{norm}_layernorm.weight" for layer in (0, 1) for norm in ("input", "post_attention")),
    *(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"),
]
_MIXER = [f"model.layers.0.retention.{name}" for name in ("decay", "bias", "in_proj.weight", "out_proj.weight")]
_EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
    for layer in (0, 1)
    for expert in range(4)
    for name in ("gate", "up", "down")
]
_ROUTERS = [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]


def _write(folder: Path, names: Iterable[str], **settings: Any) -> Path:
    """A folder with tensors of these names, of one value each."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**_COMMON, **settings}))
    save_file({name: torch.zeros(1) for name in names}, folder / "model.safetensors")
    return folder


def _message(folder: Path) -> str:
    with pytest.raises(UnsupportedError) as refused:
        refuse_unknown_family(folder)
    return str(refused.value)


def test_what_no_family_has_is_named(tmp_path: Path) -> None:
    names = [*_LLAMA, *_MIXER, *_EXPERTS, *_ROUTERS]
    said = _message(_write(tmp_path, names, model_type="new_hybrid", scan_state=16, hidden_act="silu"))
    assert said.startswith(f"{tmp_path}/config.json: model_type new_hybrid is not a supported MoE family. ")
    mixer = "retention.bias, retention.decay, retention.in_proj, retention.out_proj"
    assert f"No supported family has the tensors {mixer}." in said
    assert "No supported family has the settings scan_state." in said
    assert "of the 17 kinds of tensors and " in said


def test_what_another_family_has_is_said_with_its_name(tmp_path: Path) -> None:
    gates = [f"model.layers.{layer}.mlp.shared_expert_gate.weight" for layer in (0, 1)]
    norms = [f"model.layers.1.self_attn.{name}_norm.weight" for name in "qk"]
    names = [*_LLAMA, *_EXPERTS, *_ROUTERS, *norms, *gates]
    said = _message(_write(tmp_path, names, model_type="new", moe_intermediate_size=32))
    assert "Nearest of the supported ones: qwen3_moe (15 of the 16 kinds of tensors and " in said
    assert "qwen3_moe lacks the tensors mlp.shared_expert_gate (qwen2_moe has it)." in said
    assert "No supported family has" not in said


def test_what_the_nearest_family_needs_or_refuses_is_said(tmp_path: Path) -> None:
    norms = [f"model.layers.1.self_attn.{name}_norm.weight" for name in "q"]
    names = [*_LLAMA, *_EXPERTS, *_ROUTERS, *norms]
    said = _message(_write(tmp_path, names, model_type="new", moe_intermediate_size=32, hidden_act="gelu"))
    assert "qwen3_moe needs the tensors self_attn.k_norm, which are not there." in said
    assert "qwen3_moe refuses it: hidden_act is 'gelu'; qwen3_moe is supported only with 'silu' or 'swish'." in said


def test_latent_attention_is_nearest_to_latent_attention(fine_folder: Path, tmp_path: Path) -> None:
    """A model of a supported family under another name, with and without a part of its own."""
    folder = tmp_path / "model"
    write_model("deepseek_v3", ROWS["deepseek_v3"], folder, fine_folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "kimi"}
    in_no_file_of_the_hub = ("num_experts", "qk_head_dim")
    config = {key: value for key, value in config.items() if key not in in_no_file_of_the_hub}
    (folder / "config.json").write_text(json.dumps(config))
    said = _message(folder)
    assert "Nearest of the supported ones: deepseek_v3 (" in said
    assert "By its names it is a deepseek_v3: if it is one, write that model_type into config.json." in said
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.1.self_attn.indexer.weight": torch.zeros(1)}, folder / "model.safetensors")
    said = _message(folder)
    assert "No supported family has the tensors self_attn.indexer." in said
    assert "By its names" not in said


def test_the_index_s_names_are_enough(tmp_path: Path) -> None:
    names = [*_LLAMA, *_MIXER, *_EXPERTS, *_ROUTERS]
    (tmp_path / "with").mkdir()
    said = _message(_write(tmp_path / "with", names, model_type="new_hybrid"))
    folder = _write(tmp_path / "index", [], model_type="new_hybrid")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert _message(folder).split(": ", 1)[1] == said.split(": ", 1)[1]


@pytest.mark.parametrize("model_type", sorted(REASONS))
def test_families_that_no_runtime_computes_are_refused_with_the_reason(tmp_path: Path, model_type: str) -> None:
    folder = _write(tmp_path, [*_LLAMA, *_EXPERTS, *_ROUTERS], model_type=model_type)
    assert f"model_type {model_type} is not a supported MoE family: {REASONS[model_type]}. Nearest" in _message(folder)
    with pytest.raises(UnsupportedError, match="is not a supported MoE family"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["3", "{", "", '{"model_type": "x", "num_experts": 2, "layer_types": 3}'])
def test_a_damaged_folder_is_still_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_text("nothing")
    with pytest.raises(InputError):
        refuse_unknown_family(tmp_path)


def test_supported_and_dense_models_are_left_to_others(fine_folder: Path, tmp_path: Path) -> None:
    refuse_unknown_family(fine_folder)
    refuse_unknown_family(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4}))
    refuse_unknown_family(tmp_path)


def _huge(folder: Path) -> Path:
    """The names of a model of 61 layers with 384 experts each, in an index."""
    names = [name.replace("layers.0", f"layers.{layer}") for name in (*_LLAMA, *_MIXER) for layer in range(61)]
    names += [
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
        for layer in range(61)
        for expert in range(384)
        for name in ("gate", "up", "down")
    ]
    _write(folder, [], model_type="new_hybrid")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("make", [lambda folder: _write(folder, _LLAMA, model_type="phimoe"), _huge])
@pytest.mark.parametrize("words", [("inspect",), ("--budget", "3GB", "--dry-run")])
def test_no_library_that_takes_long_is_imported(
    tmp_path: Path, make: Callable[[Path], Path], words: tuple[str, ...]
) -> None:
    """The seconds are in ``benchmarks/start.py``."""
    script = (
        "import sys\n"
        "from exporter.cli import main\n"
        f"try: main({[*words, str(make(tmp_path / 'model'))]!r})\n"
        "except SystemExit as end: print(end.code, {'torch', 'transformers', 'huggingface_hub'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=_REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "2 set()", done.stderr
    assert "is not a supported MoE family" in done.stderr
