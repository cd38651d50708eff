"""Odd settings of the families with latent attention: what transformers ignores, cannot run, or runs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.model.config.config_check import check_against_transformers
from compressors.model.config.reading import read_spec
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, Student
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refusal
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from exporter.writing.onnx.writer import write_onnx
from tests.families.checkpoints import write_model
from tests.families.conftest import logits_of
from tests.families.rows import COMMON, ROWS
from validate.runtimes.backend import Backend, scored_positions
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend

_V2, _V3, _GLM = "deepseek_v2", "deepseek_v3", "glm4_moe_lite"
_GROUPED = {"topk_method": "group_limited_greedy", "num_experts_per_tok": 2}
_BETWEEN = {"mlp_layer_types": ["sparse", "dense", "sparse"]}
_ALL_YARN = {"type": "yarn", "factor": None, "original_max_position_embeddings": 128, "mscale_all_dim": 1.0}


def _read(folder: Path, family: str, **changes: Any) -> ModelSpec:
    row = ROWS[family]
    settings = {"model_type": family, **COMMON, **row.sizes, **row.on_the_hub, **changes}
    config = {key: value for key, value in settings.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    spec = read_spec(folder)
    check_against_transformers(config, folder / "config.json", spec)
    return spec


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        (_V2, {**_GROUPED, "n_group": 3, "topk_group": 1}, "n_group is 3, which does not divide the 8 experts"),
        (_V2, {**_GROUPED, "n_group": 8, "topk_group": 1}, "topk_group is 1: so many groups have fewer experts than"),
        (_V2, {**_GROUPED, "n_group": 1, "topk_group": 2}, "topk_group is 2, more than n_group, 1"),
        (_V3, {"n_group": 3}, "n_group is 3, which does not divide the 8 experts"),
        (_V3, {"n_group": 4, "num_experts_per_tok": 3}, "topk_group is 1: so many groups have fewer experts than"),
        (_V3, {"topk_group": 3}, "topk_group is 3, more than n_group, 2"),
        (_V3, {"n_group": 8, "topk_group": 4}, r"n_group is 8: with 8 experts .* has no sum of the best two"),
        (
            _GLM,
            {"n_routed_experts": 1, "num_experts_per_tok": 1},
            r"n_group is 1: with 1 experts .* has no sum of the best two",
        ),
        (_V2, {"num_key_value_heads": 2}, "num_key_value_heads is 2, but each of the 4 heads"),
        (_V3, {"num_key_value_heads": ...}, "num_key_value_heads is 128, but each of the 4 heads"),
        (_GLM, {"num_key_value_heads": ...}, "num_key_value_heads is 20, but each of the 4 heads"),
        (_V3, {"head_dim": 64}, "head_dim is 64"),
        (_V2, {"first_k_dense_replace": 3}, "first_k_dense_replace leaves none of the 3 layers"),
        (_V3, {"first_k_dense_replace": 7}, "first_k_dense_replace leaves none of the 3 layers"),
        (_GLM, {"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types leaves none of the 3 layers"),
        (_GLM, {"num_hidden_layers": 1}, "mlp_layer_types leaves none of the 1 layers"),
        (_GLM, {"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types must name dense or sparse for each of the 3"),
        (_GLM, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (_V3, {"rope_scaling": _ALL_YARN}, r"rope_scaling\.factor must be a positive number, not None"),
    ],
)
def test_what_transformers_cannot_run_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((InputError, UnsupportedError), match=rf"config\.json: {said}"):
        _read(tmp_path, family, **changes)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (_V2, {"num_key_value_heads": None}),
        (_V2, {"num_key_value_heads": ...}),
        (_V2, {"head_dim": 32}),
        (_V2, {"n_group": 3, "topk_group": 2}),
        (_V2, {"num_experts": 8, "n_routed_experts": ...}),
        (_V3, {"num_key_value_heads": None}),
        (_V3, {"num_local_experts": 8, "n_routed_experts": ...}),
        (_V3, {"partial_rotary_factor": 0.5}),
        (_GLM, {"num_local_experts": 8, "n_routed_experts": ...}),
        (_GLM, {"first_k_dense_replace": 2}),
        (_GLM, {"mlp_layer_types": None}),
    ],
)
def test_what_changes_nothing_in_transformers_changes_nothing(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    assert _read(tmp_path, family, **changes) == _read(tmp_path, family)


@pytest.mark.parametrize("family", [_V2, _V3, _GLM])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"rms_norm_eps": 1e-5}, None),
        (
            {"rms_norm_eps": 1e-3},
            "makes the norms inside attention with rms_norm_eps, 0.001, but the model's have 1e-06",
        ),
        ({"num_hidden_layers": 26, "q_lora_rank": 32}, "takes a model of 26 layers for a lite one"),
        ({"num_hidden_layers": 27, "q_lora_rank": 32}, "takes a model of 27 layers for a lite one"),
        (
            {"num_hidden_layers": 48, "q_lora_rank": 32, "vocab_size": 128256},
            "takes a model of 48 layers for a lite one",
        ),
        ({"num_hidden_layers": 27, "q_lora_rank": None}, None),
        ({"num_hidden_layers": 48, "q_lora_rank": 32}, None),
    ],
)
def test_what_llama_cpp_s_graph_would_take_for_another_model_is_refused_for_it(
    tmp_path: Path, family: str, changes: dict[str, Any], said: str | None
) -> None:
    sentence = refusal(_read(tmp_path, family, **changes), Container.GGUF)
    assert sentence is None if said is None else sentence is not None and said in sentence


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "sizes", "has_gguf"),
    [
        (_V2, {**_GROUPED, "n_group": 2, "topk_group": 2}, True),
        (_V3, {"n_group": 2, "topk_group": 2}, True),
        (_GLM, _BETWEEN, False),
    ],
)
def test_all_forms_compute_the_same(
    fine_folder: Path, blocks_BT: torch.Tensor, tmp_path: Path, family: str, sizes: dict[str, Any], has_gguf: bool
) -> None:
    """All groups are chosen, which llama.cpp cannot load as groups; or dense layers follow layers with experts."""
    write_model(family, ROWS[family], tmp_path / "whole", fine_folder, **sizes)
    source = Checkpoint(tmp_path / "whole")
    kept = [(0, 2, 3, 5, 6, 7) if layer.routed is not None else () for layer in source.spec.layers]
    student = Student(source, ExpertMap.keeping(8, kept))
    write_checkpoint(student, tmp_path / "student")
    expected = logits_of(StreamedModel(student), blocks_BT).view(*blocks_BT.shape, -1)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    assert (stock(blocks_BT).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    write_onnx(student, "F32", tmp_path, threads=1)
    backends: list[Backend] = [OnnxRuntimeBackend(tmp_path, threads=1)]
    if has_gguf:
        write_gguf(student, "F32", tmp_path / "x.gguf", name="x", threads=1)
        backends.append(LlamaCppBackend(tmp_path / "x.gguf", n_ctx=64, kv_type="f32", threads=1))
    else:
        said = "experts in every layer after the first one with experts; layer 1 of this model has none"
        assert said in str(refusal(student.spec, Container.GGUF))
    wanted = expected[:, scored_positions(blocks_BT.shape[1])]
    for backend in backends:
        found = torch.from_numpy(np.stack([output.logits_SV.copy() for output in backend.run(blocks_BT.numpy())]))
        assert (found - wanted).abs().max() < 1e-3 * wanted.std()


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "key"), [(_V2, "num_experts"), (_V3, "num_local_experts"), (_GLM, "num_local_experts")]
)
def test_a_student_has_one_spelling_of_its_number_of_experts(
    fine_folder: Path, tmp_path: Path, family: str, key: str
) -> None:
    write_model(family, ROWS[family], tmp_path / "whole", fine_folder)
    path = tmp_path / "whole" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 8}))
    source = Checkpoint(tmp_path / "whole")
    kept = [(0, 2, 3, 5, 6, 7) if layer.routed is not None else () for layer in source.spec.layers]
    student = Student(source, ExpertMap.keeping(8, kept))
    write_checkpoint(student, tmp_path / "student")
    assert Checkpoint(tmp_path / "student").spec == student.spec
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert loaded.config.n_routed_experts == 6 and not any(report.values())
