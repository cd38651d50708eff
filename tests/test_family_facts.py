"""A family's facts stand in its file: the names of its tensors, its settings, and its own name.

The facts are read from the files under ``compressors/model/families/``, so a new family adds its own. Docstrings and
comments may name them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from compressors.model import families
from compressors.model.families.registry import supported_families

_REPOSITORY = Path(__file__).parent.parent
_FAMILIES = _REPOSITORY / "compressors" / "model" / "families"
_NOT_A_FAMILY = {"__init__.py", "refused.py", "registry.py"}
_CONFIG = _REPOSITORY / "compressors" / "model" / "config"
_OF_ALL_FAMILIES = {_CONFIG / "reading.py", _CONFIG / "config_check.py"}
"""The code that compares any family's settings with what transformers makes of them."""
_CODE = sorted(
    path
    for package in ("compressors", "exporter", "validate")
    for path in (_REPOSITORY / package).rglob("*.py")
    if _FAMILIES not in path.parents and path not in _OF_ALL_FAMILIES
)

_ALL_MODELS_HAVE = frozenset(
    {
        # settings of transformers that its tokenizers, its generation and ONNX Runtime's clients know too
        *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "hidden_size", "max_position_embeddings"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "model_type"),
        *("tie_word_embeddings", "quantization_config", "compression_config", "layer_types", "sliding_window"),
        *("num_experts_per_tok", "chunk_size", "use_sliding_window"),
        *("rope_parameters", "rope_scaling", "rope_theta", "rope_type", "attention_factor"),
        *("full_attention", "sliding_attention", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("partial_rotary_factor", "per_layer_config", "mscale_all_dim"),
        # keys of GGUF files of every architecture, by which files of other people are read
        *("block_count", "context_length", "embedding_length", "expert_count", "expert_used_count", "freq_base"),
        *("head_count", "head_count_kv", "key_length", "value_length", "dimension_count", "feed_forward_length"),
        *("layer_norm_rms_epsilon", "expert_gating_func", "expert_group_count", "expert_group_used_count"),
        *("expert_weights_norm", "expert_weights_scale", "leading_dense_block_count", "expert_shared_count"),
        *("attention.scale", "embedding_scale", "residual_scale", "logit_scale", "final_logit_softcapping"),
        *("nextn_predict_layers", "full_attention_interval", "attention.recurrent_layers", "recurrent_layers"),
    }
)
_ANOTHER_MEANING = {
    # parameters of the experts' module, which transformers gives to every family
    "compressors/model/running/experts.py": {
        *("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"),
    },
    "compressors/model/running/skeleton.py": {"gate_up_proj", "up_proj", "down_proj"},
    # rules of llama-quantize, which go by names
    "exporter/writing/gguf/mixes.py": {"ffn_gate_inp", "token_embd", "attn_output", "attn_qkv", "ssm_conv1d"},
    # nodes of llama.cpp's graphs
    "validate/runtimes/llama_cpp_routing.py": {"ffn_norm", "attn_norm"},
    # an attribute of ONNX Runtime's operators
    "exporter/writing/onnx/glu.py": {"swiglu_limit"},
    "validate/files/graph_settings.py": {"swiglu_limit"},
    # an input of our graphs
    "compressors/model/files/onnx_names.py": {"num_logits_to_keep"},
    # a type of onnxruntime-genai
    "exporter/writing/onnx/clients.py": {"qwen3_5_moe_text"},
    # a value in our graphs, and a line of what inspect prints
    "exporter/inspection.py": {"feed_forward"},
    "exporter/writing/onnx/blocks/dense.py": {"feed_forward"},
    # llama.cpp's names for tokenizers
    "compressors/model/files/gguf/pre_tokenizers.py": {"afmoe"},
    "exporter/writing/gguf/vocabulary/sentencepiece.py": {"gemma4"},
    "validate/vocabulary/special_token_check.py": {"gemma4"},
    # names in our recipes
    "exporter/writing/onnx/encodings.py": {"q_proj", "k_proj", "v_proj", "o_proj"},
}
_OFFENDERS: dict[str, set[str]] = {
    "compressors/model/sources/hugging_face/misfits.py": {"embed_tokens", "input_layernorm", "lm_head"},
}
"""The code that still states a fact. Remove an entry with the fact; none may be added."""


def _strings(path: Path) -> Iterator[str]:
    """The texts in the code of a module, without docstrings and the names that it exports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(it, ast.Name) and it.id == "__all__" for it in node.targets):
            skipped |= {id(name) for name in ast.walk(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def _words(text: str) -> set[str]:
    """The words of a name that say enough alone: those with an underscore, and each two others joined by a dot."""
    parts = re.findall(r"\w+", text)
    long = {part for part in parts if "_" in part.strip("_")}
    pairs = {f"{first}.{second}" for first, second in pairwise(parts) if not {first, second} & long}
    return long | {pair for pair in pairs if pair in text}


@cache
def _facts() -> frozenset[str]:
    """All facts of the families that their files spell."""
    facts: set[str] = set(supported_families())
    for path in _FAMILIES.rglob("*.py"):
        if path.name not in _NOT_A_FAMILY:
            for text in _strings(path):
                if re.fullmatch(r"[\w.{}]+", text):
                    facts |= _words(text.removeprefix("model.layers.").removesuffix(".weight"))
    return frozenset(facts - _ALL_MODELS_HAVE)


def test_the_facts_are_found() -> None:
    facts = _facts()
    assert {"mlp.gate", "q_proj", "block_sparse_moe", "ffn_gate_inp", "post_attention_layernorm"} <= facts
    assert {"norm_topk_prob", "num_local_experts", "qwen3_moe", "mixtral", "olmoe"} <= facts
    assert _words("model.layers.3.self_attn.q_proj.weight") == {"model.layers", "layers.3", "self_attn", "q_proj"}


@pytest.mark.parametrize("path", _CODE, ids=lambda path: str(path.relative_to(_REPOSITORY)))
def test_no_fact_of_a_family_stands_elsewhere(path: Path) -> None:
    where = str(path.relative_to(_REPOSITORY))
    facts = _facts() - _ANOTHER_MEANING.get(where, set())
    spelled = {word for text in _strings(path) for word in facts & (_words(text) | {text})}
    assert spelled == _OFFENDERS.get(where, set())


def test_every_file_is_a_family() -> None:
    names = {path.stem for path in _FAMILIES.glob("*.py") if path.name not in _NOT_A_FAMILY}
    modules = {name: import_module(f"{families.__name__}.{name}") for name in names}
    found = {name for name, module in modules.items() if module.FAMILY in supported_families().values()}
    assert found == names


def test_every_exception_is_a_file() -> None:
    assert {*_OFFENDERS, *_ANOTHER_MEANING} <= {str(path.relative_to(_REPOSITORY)) for path in _CODE}
