"""Damaged files of settings beside a checkpoint's weights: config.json, generation_config.json, index and tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.fuzz.places import damaged_bytes, edit, something_else
from tests.fuzz.values import NAMES, VALUES, damaged_document, damaged_json, encoded

__all__ = ["damage_config", "damage_index", "damage_tokenizer"]

_OTHER_SETTINGS: dict[str, tuple[Any, ...]] = {
    "rope_scaling": (
        *({"type": "yarn", "factor": 2.0}, {"rope_type": "linear", "factor": 0}, {"rope_type": "longrope"}),
        *({"rope_type": "llama3", "factor": "8"}, {"rope_type": "dynamic", "factor": -1.0}, {"rope_type": []}),
        {"rope_type": "longrope", "short_factor": [], "long_factor": [1.0], "original_max_position_embeddings": 0},
        {"rope_type": "yarn", "factor": 1e308, "beta_fast": None, "original_max_position_embeddings": 10**30},
    ),
    "rope_parameters": (
        *({"rope_type": "default", "rope_theta": None}, {"rope_theta": -1.0}, {"rope_type": "yarn"}, {"full": {}}),
        {"rope_theta": 10000.0, "rope_type": "proportional", "partial_rotary_factor": 0.0},
    ),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, {"quant_method": None}, {"quant_method": "fp8"}, "x"),
    "layer_types": (["full_attention"], [], ["full_attention", None], ["sliding_attention"] * 2, "full_attention"),
    "partial_rotary_factor": (0.5, 0, -1, None, "x"),
    "sliding_window": (0, -1, 1, 4096, None, "4096", [4096]),
    "mlp_only_layers": ([0], [0, 0], [99], None, "x", 0),
    "architectures": (["Qwen3MoeForSequenceClassification"], [], None, [None], "x", [[]]),
    "auto_map": ({"AutoConfig": "evil.Config"}, {"AutoModelForCausalLM": "x--y"}, []),
    "dtype": ("float8_e4m3fn", "int8", None, 3),
    "num_local_experts": (4, 0, None, 5),
    "model_type": ("qwen3", "jamba", "", None, 3, [], "qwen3_moe\n", "../qwen3_moe"),
    "head_dim": (100, 1, 33, None),
    "num_hidden_layers": (1, 3, 100_000, 2**40),
    "num_experts": (1, 3, 5, 100_000, 2**40),
    "vocab_size": (1, 10, 10**9, 2**40),
    "max_position_embeddings": (1, 256, 10**12),
}
"""Settings that mean something to somebody, in forms that a person might have written."""


def damage_config(rng: random.Random, folder: Path) -> None:
    """Damages config.json, or generation_config.json."""
    path = folder / rng.choice(("config.json", "config.json", "config.json", "generation_config.json"))
    kind = rng.random()
    if kind < 0.03:
        something_else(rng, path)
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if kind < 0.4:
        path.write_bytes(damaged_json(rng, config))
        return
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.5:
            name = rng.choice(list(config))
            config[name] = rng.choice(VALUES)
        else:
            name = rng.choice(list(_OTHER_SETTINGS))
            config[name] = rng.choice(_OTHER_SETTINGS[name])
    path.write_text(json.dumps(config), encoding="utf-8")


def damage_index(rng: random.Random, folder: Path) -> None:
    """Damages model.safetensors.index.json, or puts one where there is none."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        names = [rng.choice(NAMES), "model.norm.weight"]
        index: Any = {"weight_map": {name: rng.choice((*NAMES, "model.safetensors")) for name in names}}
        path.write_bytes(encoded(rng, json.dumps(index)))
        return
    if rng.random() < 0.05:
        something_else(rng, path)
        return
    index = json.loads(path.read_text(encoding="utf-8"))
    if rng.random() < 0.5:
        path.write_bytes(damaged_json(rng, index))
        return
    names = list(index["weight_map"])
    for name in rng.sample(names, rng.choice((1, 2, len(names)))):
        file = index["weight_map"][name]
        outside = str(folder / file)
        others = (
            "model-00001-of-00002.safetensors",
            "",
            f"./{file}",
            f"x/../{file}",
            outside,
            f"../{folder.name}/{file}",
        )
        index["weight_map"][name] = rng.choice((*NAMES, *VALUES, *others, "config.json", f"{file}\x00", file.upper()))
    path.write_text(json.dumps(index), encoding="utf-8")


_PIECES: tuple[Any, ...] = (
    *(None, {"type": "NFC"}, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Sequence", "normalizers": []}),
    *({"type": "Sequence", "pretokenizers": []}, {"type": "Sequence"}, {"type": "Tomorrow"}, {"type": None}, {}),
    *({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}, {"type": "Whitespace"}),
    *({"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}, {"type": "Prepend"}),
    {"type": "Split", "pattern": {"Regex": "(a+)+b|(?=x)"}, "behavior": "Removed", "invert": True},
    *({"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": True}, {"type": "Digits"}),
    *({"type": "Metaspace", "replacement": "long", "prepend_scheme": "first"}, {"type": "ByteLevel"}),
    *(
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": True},
        {"type": "Precompiled"},
    ),
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    *({"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}, {"type": "BertNormalizer"}),
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[x]", "type_id": 0}}], "special_tokens": {}},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
)
"""Steps of a tokenizer."""

_MODELS = ("Unigram", "WordPiece", "WordLevel", "BPE", "Tomorrow", None, 3, [])


def damage_tokenizer(rng: random.Random, folder: Path) -> None:
    """Damages tokenizer.json, tokenizer_config.json, or puts a chat template there."""
    kind = rng.random()
    if kind < 0.25:
        path = folder / "tokenizer_config.json"
        _damage_settings(rng, path)
        return
    if kind < 0.3:
        template = rng.choice(
            (b"", b"{% for %}", b"\xff\xfe", b"{{ 1/0 }}", b"{% include '/etc/passwd' %}", b"x" * 10**6)
        )
        (folder / "chat_template.jinja").write_bytes(template)
        return
    path = folder / "tokenizer.json"
    if kind < 0.34:
        something_else(rng, path)
        return
    if kind < 0.42:
        path.write_bytes(damaged_bytes(rng, path.read_bytes(), header=2000))
        return
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if kind < 0.6:
        path.write_bytes(damaged_json(rng, tokenizer))
        return
    edit(rng, tokenizer, (_edit_tokenizer,))
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def _damage_settings(rng: random.Random, path: Path) -> None:
    if rng.random() < 0.05:
        something_else(rng, path)
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    names = (*settings, "bos_token", "unk_token", "add_bos_token", "add_eos_token", "added_tokens_decoder", "auto_map")
    names += (
        "extra_special_tokens",
        "additional_special_tokens",
        "model_max_length",
        "tokenizer_class",
        "chat_template",
    )
    for _ in range(rng.choice((1, 1, 2))):
        settings[rng.choice(names)] = rng.choice((*VALUES, {"content": 3}, {"content": "x", "lstrip": True}, {"0": {}}))
    path.write_bytes(damaged_json(rng, settings) if rng.random() < 0.3 else json.dumps(settings).encode())


def _edit_tokenizer(rng: random.Random, tokenizer: dict[str, Any]) -> None:
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    kind = rng.randrange(8)
    if kind == 0:
        tokenizer[rng.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder"))] = rng.choice(_PIECES)
    elif kind == 1:
        model["type"] = rng.choice(_MODELS)
    elif kind == 2 and model["vocab"]:
        name = rng.choice(list(model["vocab"]))
        model["vocab"][name] = rng.choice(VALUES)
    elif kind == 3 and model["vocab"]:
        model["vocab"][rng.choice(NAMES)] = model["vocab"].pop(rng.choice(list(model["vocab"])))
    elif kind == 4:
        model["merges"] = rng.choice((*VALUES, ["a b c"], ["ab"], [["a"]], [["not", "there"]], [[1, 2]], ["t h"] * 3))
    elif kind == 5 and added:
        entry = rng.choice(added)
        entry[rng.choice(list(entry))] = rng.choice((*VALUES, *NAMES))
    elif kind == 6:
        flag = rng.choice(("byte_fallback", "ignore_merges", "dropout", "unk_token", "fuse_unk", "end_of_word_suffix"))
        model[flag] = rng.choice((*VALUES, 0.5, True, False))
    else:
        tokenizer["added_tokens"] = damaged_document(rng, added)
