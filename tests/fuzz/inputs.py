"""Undamaged inputs, as small as the tool takes: two checkpoints, and the files and folders that are made of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from exporter.planning.recipe import (
    BudgetChoice,
    CompressChoice,
    Recipe,
    RecoverChoice,
    RungChoice,
    SourceChoice,
    TextChoice,
    recipe_yaml,
)
from exporter.writing.files import sha256_of
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import write_onnx
from tests.fuzz.chats import write_chats
from validate.metrics.logits_file import LogitsFileWriter

__all__ = ["make_inputs"]

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_VOCAB_SIZE = 320


def make_inputs(folder: Path) -> None:
    """Fills ``folder`` with ``qwen``, ``mixtral`` (in two files), ``model.gguf``, ``onnx``, ``text`` and ``chats``."""
    torch.manual_seed(0)
    _checkpoint(folder / "qwen", _QWEN, _byte_level(), shards=1)
    _checkpoint(folder / "mixtral", _MIXTRAL, _with_bytes_as_fallback(), shards=2)
    student = Student.teacher(open_source(folder / "qwen"))
    (folder / "gguf").mkdir()
    write_gguf(student, "Q8_0", folder / "gguf" / "model.gguf", name="tiny", threads=1)
    write_onnx(student, "Q4_0", folder / "onnx", threads=1)
    write_client_files(student, folder / "onnx")
    (folder / "empty").mkdir()
    _recipe(folder / "recipe", student.source)
    _logits(folder / "logits")
    _published(folder / "published", folder)
    for name in ("calibration", "heldout"):
        (folder / "text" / name).mkdir(parents=True)
        words = [f"{name} the cat {number} sat on the mat {number * number}." for number in range(400)]
        (folder / "text" / name / "words.txt").write_text("\n\n".join(words), encoding="utf-8")
    shutil.copytree(folder / "qwen", folder / "chats")  # chats are written out by the template of their model
    write_chats(folder / "chats" / "chats.jsonl")


def _recipe(folder: Path, source: Source) -> None:
    folder.mkdir()
    budget = BudgetChoice(bytes=2_000_000, kind="file", context=512, kv_type="f16")
    text = TextChoice(calibration_blocks=4, selection_blocks=1, heldout_chunks_per_file=2)
    rung = RungChoice(scope="router", blocks=4, blocks_per_step=2, learning_rate=1e-3)
    recipe = Recipe(
        source=SourceChoice(model="qwen", identity=source.identity()),
        budget=budget,
        text=text,
        arithmetic="float32",
        compress=CompressChoice(method="reap", experts=(3, 2)),
        recover=RecoverChoice(rungs=(rung,), seed=1),
        gguf="Q8_0",
        onnx="Q4_0",
        save_student=False,
        threads=1,
    )
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")


def _logits(folder: Path) -> None:
    folder.mkdir()
    tokens_BT = np.arange(2 * 512, dtype=np.int64).reshape(2, 512) % _VOCAB_SIZE
    writer = LogitsFileWriter(folder / "logits", tokens_BT, _VOCAB_SIZE)
    writer.write(0, torch.randn(2 * 255, _VOCAB_SIZE))


def _published(folder: Path, inputs: Path) -> None:
    """Makes the part of an output folder that validation reads."""
    folder.mkdir()
    shutil.copyfile(inputs / "gguf" / "model.gguf", folder / "model.gguf")
    shutil.copyfile(inputs / "recipe" / "recipe.yaml", folder / "recipe.yaml")
    layers = [{"source": layer, "groups": [[expert] for expert in range(4)], "width": None} for layer in range(2)]
    report = {
        "schema": 1,
        "artifacts": [{"format": "gguf", "path": "model.gguf"}],
        "job": {"model": str(inputs / "qwen"), "revision": None},
        "source": {"identity": open_source(inputs / "qwen").identity(), "n_layers": 2},
        "recipe": {"text": {"heldout_chunks_per_file": 2}, "compress": {"edit": "none"}},
        "student": {"expert_map": {"teacher_experts": 4, "layers": layers}, "dense": False},
        "recovery": [],
        "text": {"heldout": {"sha256": "4e" * 32}},
        "validation": [{"artifact": "gguf", "perplexity": 300.0, "routing": {"vs_teacher": {"overlap": 1.0}}}],
    }
    _write_json(folder / "report.json", report)
    names = sorted(path.name for path in folder.iterdir())
    sums = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in names)
    (folder / "SHA256SUMS").write_text(sums, encoding="utf-8")


_SHARED = {
    "vocab_size": _VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": [0, 2],
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "num_experts_per_tok": 2,
}
_QWEN = _SHARED | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "rope_scaling": None,
}
_MIXTRAL = _SHARED | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": 64,
    "num_local_experts": 4,
    "sliding_window": None,
}


def _checkpoint(folder: Path, config: dict[str, object], tokenizer: Tokenizer, shards: int) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": 0, "temperature": 0.7, "do_sample": True}
    _write_json(folder / "generation_config.json", generation)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    settings |= {"model_max_length": 1024, "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    _write_json(folder / "tokenizer_config.json", settings)
    tensors = _tensors(config)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = names[shard::shards]
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _tensors(config: dict[str, object]) -> dict[str, torch.Tensor]:
    """bfloat16, by the names of the hub."""
    mlp, names = ("mlp", ("gate_proj", "up_proj", "down_proj"))
    if config["model_type"] == "mixtral":
        mlp, names = ("block_sparse_moe", ("w1", "w3", "w2"))
    shapes = {"model.embed_tokens": (_VOCAB_SIZE, 64), "model.norm": (64,), "lm_head": (_VOCAB_SIZE, 64)}
    for layer in (f"model.layers.{number}" for number in range(2)):
        shapes |= {f"{layer}.{norm}": (64,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{part}_proj": (64, 64) for part in "qkvo"}
        if config["model_type"] == "qwen3_moe":
            shapes |= {f"{layer}.self_attn.{part}_norm": (32,) for part in "qk"}
        shapes[f"{layer}.{mlp}.gate"] = (4, 64)
        shapes |= {f"{layer}.{mlp}.experts.{expert}.{name}": (64, 64) for expert in range(4) for name in names}
    random = {f"{name}.weight": torch.randn(shape) / 8 for name, shape in shapes.items()}
    return {name: (1 + value if value.ndim == 1 else value).to(torch.bfloat16) for name, value in random.items()}


def _byte_level() -> Tokenizer:
    pieces = ["<|end|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th", "the", "\u0120the"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e"), ("\u0120", "the")]))
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    return tokenizer


def _with_bytes_as_fallback() -> Tokenizer:
    """A tokenizer.json as converted from SentencePiece."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<|end|>", "<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "\u2581", "th", "the"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    return tokenizer
