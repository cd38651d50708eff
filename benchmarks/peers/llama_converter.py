"""Is our F32 GGUF file of every family the one that llama.cpp's own converter writes?

The checkpoints are the trained models, a tiny random one for each row of ``tests/families/rows.py``, in the hub's
spelling, and gpt-oss with experts in bfloat16 and in MXFP4. Where a family has layers for predicting several tokens at
once, the checkpoint has one, and both sides leave it out; where llama.cpp can run it, both also keep it. The converter
is from the sources that the installed llama-cpp-python was built from, and runs with the packages that it asks for,
except for PyTorch, which is that of the other peers. Only its checksum of what a tokenizer does is put aside
(:mod:`benchmarks.export.convert`), and the key that comes from it, ``tokenizer.ggml.pre``, is not compared.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from gguf import GGUFReader

from benchmarks.export.llama_cpp import converter
from benchmarks.export.tensors import differing_tensors
from benchmarks.peers.environment import REPOSITORY, environment
from compressors.model.config.reading import read_spec
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.writer import write_gguf
from tests.families.checkpoints import add_mtp as add_whole_mtp
from tests.families.checkpoints import write_inside_of_more, write_model
from tests.families.rows import ROWS
from tests.mxfp4_checkpoints import edit_tensors, write_both

__all__ = ["Compared", "add_mtp", "compare"]

_PACKAGES = (
    "torch==2.13.0",
    "transformers==4.57.6",
    "sentencepiece==0.2.1",
    "protobuf==4.25.8",
    "numpy==2.2.6",
    "pyyaml==6.0.3",
    "requests==2.32.5",
    "tqdm==4.67.1",
)
_FINE = REPOSITORY / "exporter/demo/model"
_TRAINED = {
    "qwen3_moe": _FINE,
    "mixtral": REPOSITORY / "tests/fixtures/coarse",
    "olmoe": REPOSITORY / "tests/fixtures/olmoe",
}
_INSIDE_OF_MORE = {"gemma4_text": "gemma4", "qwen3_5_moe_text": "qwen3_5_moe"}
_NAME = "Tiny Model"
_N_TOKENS = 4096  # of the bundled tokenizer
_NAMED_TOKENS = ("[gMASK]", "<|user|>", "<|observation|>", "<unk>", "<|startoftext|>")
"""Tokens that the converter asks for in some families; they come behind the bundled ones."""
_N_ROWS = _N_TOKENS + 8  # of the embedding: some have no token

_MTP = {
    "model.layers.{behind}.": ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens"),
    "mtp.layers.0.": ("mtp.fc", "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"),
    "model.mtp_block.0.": ("model.mtp_emb_norm.0", "model.mtp_hidden_norm.0", "model.mtp_linear_proj.0"),
}
"""What the names in a layer for predicting several tokens begin with, and what it has beside a usual layer's."""

_WITHOUT_A_FLAG = frozenset({"deepseek_v3", "ernie4_5_moe", "gemma4_text"})
"""Families of which the converter leaves such layers out by itself, or that have none: it takes no ``--no-mtp``."""

_SIZES = {"hunyuan_v1_moe": {"max_position_embeddings": 1 << 18}}
"""Settings without which the converter would write another value than the checkpoint's."""

_WITH_ALL_LAYERS = frozenset({"exaone_moe"})
"""Families of which the converter always writes such layers; the checkpoint has none here."""

_OURS, _THEIRS, _OTHER = "ours alone", "the converter's alone", "another value"
_ALWAYS = "always written; the converter writes it for some architectures or settings of `config.json`"
_DEFAULT_KIND = "always written: without it, llama.cpp's default depends on the kind of tokenizer"
_CARD = "of the model card, which we do not repeat"
_CONSTANT = "a constant of the graphs: no architecture that we write reads it"
_INTERVAL = "`attention.recurrent_layers`, which we always write, goes before it"
_FIXED = "in some families the converter fixes it by the token's text; ours is from the tokenizer and `config.json`"
_ENDS = "a further token that ends texts, from `config.json`; the converter has it for GLM alone"
_ONE_GROUP = "one group is no choice"
_NOT_TURNED = "the graph turns nothing"

_REASONS: Mapping[str, Mapping[str, str]] = {
    _OURS: {
        "general.quantized_by": "names this program",
        "ARCH.vocab_size": _ALWAYS,
        "ARCH.rope.dimension_count": _ALWAYS,
        "ARCH.attention.key_length": _ALWAYS,
        "ARCH.attention.value_length": _ALWAYS,
        "ARCH.attention.recurrent_layers": _ALWAYS,
        "ARCH.attention.sliding_window_pattern": _ALWAYS,
        "ARCH.attention.layer_norm_rms_epsilon": _ALWAYS,
        "ARCH.attention.q_lora_rank": "0 for none: without it llama.cpp refuses all but a few numbers of layers",
        "ARCH.leading_dense_block_count": _ALWAYS,
        "ARCH.expert_weights_norm": "false, as llama.cpp has it without the key",
        "ARCH.expert_gating_func": "always written; the converter writes it only if `config.json` has `scoring_func`",
        "tokenizer.ggml.add_bos_token": _DEFAULT_KIND,
        "tokenizer.ggml.add_eos_token": _DEFAULT_KIND,
        "tokenizer.ggml.eot_token_id": _ENDS,
        "tokenizer.ggml.eom_token_id": _ENDS,
        "tokenizer.ggml.unknown_token_id": "from transformers' class of the tokenizer",
    },
    _THEIRS: {
        "general.languages": _CARD,
        "general.tags": _CARD,
        "ARCH.feed_forward_length": "the width of dense layers, which the model has not",
        "ARCH.full_attention_interval": _INTERVAL,
        "ARCH.rope.scaling.yarn_beta_fast": _CONSTANT,
        "ARCH.rope.scaling.yarn_beta_slow": _CONSTANT,
        "ARCH.expert_group_count": _ONE_GROUP,
        "ARCH.expert_group_used_count": _ONE_GROUP,
        "ARCH.nextn_predict_layers": "0, as it is without the key",
        "ARCH.rope.scaling.type": "none, as it is without the key",
        "ARCH.rope.freq_base": _NOT_TURNED,
        "ARCH.rope.dimension_count": _NOT_TURNED,
        "ARCH.rope.scaling.finetuned": _NOT_TURNED,
        "tokenizer.ggml.bos_token_id": _FIXED,
        "tokenizer.ggml.seperator_token_id": "of training: nothing that runs a model puts texts together with it",
        "tokenizer.ggml.unknown_token_id": _FIXED,
    },
    _OTHER: {
        "ARCH.context_length": "the converter's is the same for all models with Mamba-2; ours is the model's",
        "tokenizer.ggml.eot_token_id": _FIXED,
        "general.file_type": "ours is of the type of most weights, which the embedding has in a model as tiny as this",
    },
}
"""Why a key differs, by whose it is; a difference that is not here is an error."""


@dataclass(frozen=True)
class Compared:
    """A checkpoint in both."""

    name: str
    n_tensors: int
    differing: Sequence[str]  # tensors
    n_equal_keys: int
    keys: Mapping[str, str]  # those that differ, and whose they are
    left_out: Sequence[str]

    @property
    def agrees(self) -> bool:
        """Whether all tensors are the same, and all differences of keys have a reason."""
        return not self.differing and all(key in _REASONS[side] for key, side in self.keys.items())

    def count(self, side: str) -> int:
        """The number of keys that differ in this way."""
        return sum(found == side for found in self.keys.values())


def compare() -> tuple[list[str], bool]:
    """Writes every checkpoint with both: the lines of the report, and whether all files agree."""
    command = converter(REPOSITORY / ".venv-llama", environment("converter", _PACKAGES))
    compared = []
    with tempfile.TemporaryDirectory() as folder:
        for name, source in _checkpoints(Path(folder)):
            for keeps_mtp in (False, *([True] if read_spec(source).family.mtp is not None else [])):
                compared.append(_compare(name, source, command, Path(folder), keeps_mtp=keeps_mtp))
                print(compared[-1].name, "agrees" if compared[-1].agrees else f"DIFFERENT: {compared[-1]}")
    return _section(compared), all(one.agrees for one in compared)


def _checkpoints(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and folders; the tokenizers are of a class that the converter's transformers knows."""
    few, more = _write_tokenizer(folder / "few", ()), _write_tokenizer(folder / "more", _NAMED_TOKENS)
    for family, trained in _TRAINED.items():
        path = Path(shutil.copytree(trained, folder / f"trained-{family}"))
        shutil.copyfile(few / "tokenizer_config.json", path / "tokenizer_config.json")
        yield f"{family}, trained", path
    for family, row in ROWS.items():
        path = folder / family
        write_model(family, row, path, more, vocab_size=_N_ROWS, **_SIZES.get(family, {}))
        if family not in _WITH_ALL_LAYERS:
            add_mtp(path)
        _name_ends(path)
        yield family, path
        if family in _INSIDE_OF_MORE:
            whole = folder / _INSIDE_OF_MORE[family]
            write_inside_of_more(path, whole)
            yield f"{whole.name}, of more than text", whole
    packed, plain = write_both(folder, few)
    yield "gpt_oss in bfloat16", plain
    yield "gpt_oss in MXFP4", packed


def _write_tokenizer(folder: Path, tokens: Sequence[str]) -> Path:
    folder.mkdir()
    tokenizer = json.loads((_FINE / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((_FINE / "tokenizer_config.json").read_text(encoding="utf-8"))
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [
        first | {"id": number, "content": text} for number, text in enumerate(tokens, _N_TOKENS)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def add_mtp(folder: Path) -> None:
    """Adds a layer for predicting several tokens at once, under the names that the family reads past, if any."""
    spec = read_spec(folder)
    if spec.family.mtp is not None:
        add_whole_mtp(folder)
        return
    for template, further in _MTP.items():
        prefix = template.format(behind=spec.n_layers)
        if any(re.fullmatch(part.pattern, f"{prefix}x") for part in spec.family.skipped):
            edit_tensors(folder, partial(_add_mtp_tensors, f"model.layers.{spec.n_layers - 1}.", prefix, further))


def _add_mtp_tensors(last: str, prefix: str, further: Sequence[str], tensors: dict[str, torch.Tensor]) -> None:
    """Copies the last layer's tensors, and adds ``further`` ones."""
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[name.replace(last, prefix)] = tensors[name].clone()
    for name in further:
        tensors[f"{name if '.mtp_' in name or name.startswith('mtp.') else prefix + name}.weight"] = torch.ones(64, 128)


def _name_ends(folder: Path) -> None:
    """Says, as GLM's ``config.json`` does, which tokens end a text, and not which begins one."""
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("bos_token_id")
    config["eos_token_id"] = [0, *(_N_TOKENS + _NAMED_TOKENS.index(text) for text in ("<|user|>", "<|observation|>"))]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _compare(name: str, folder: Path, command: Sequence[str], scratch: Path, *, keeps_mtp: bool) -> Compared:
    ours, theirs = scratch / "ours.gguf", scratch / "theirs.gguf"
    source = Checkpoint(folder, keeps_mtp=keeps_mtp)
    student = Student.teacher(source)
    write_gguf(student, "F32", ours, types=_stored_types(student), name=_NAME, threads=1)
    has_flag = bool(source.parts_read_past) and source.spec.model_type not in _WITHOUT_A_FLAG and not keeps_mtp
    options: list[str | Path] = ["--outfile", theirs, "--outtype", "f32", "--model-name", _NAME]
    options += ["--no-mtp"] if has_flag else []
    done = subprocess.run([*command, folder, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the converter fails on {name}:\n{done.stderr}")
    differing, total = differing_tensors(ours, theirs)
    our_keys, their_keys = _keys(ours), _keys(theirs)
    both = our_keys.keys() & their_keys.keys()
    keys = dict.fromkeys(our_keys.keys() - both, _OURS) | dict.fromkeys(their_keys.keys() - both, _THEIRS)
    keys |= {key: _OTHER for key in both if our_keys[key] != their_keys[key]}
    n_equal = len(both) - sum(key in both for key in keys)
    name = f"{name}, with the layer for MTP" if keeps_mtp else name
    return Compared(name, total, differing, n_equal, keys, source.parts_read_past)


def _stored_types(student: Student) -> dict[str, str]:
    """Experts that are stored in MXFP4 stay so in the converter's file."""
    return {
        tensor.name: types[0].name
        for tensor in plan_tensors(student.spec, "F32")
        if tensor.is_matrix and (types := student.stored_types(tensor.role, tensor.layer))
    }


def _keys(path: Path) -> dict[str, object]:
    """Types and values by key, with ARCH for the name of the architecture."""
    fields = GGUFReader(path).fields
    prefix = f"{fields['general.architecture'].contents()}."
    scaling = fields.get(f"{prefix}rope.scaling.type")
    is_unscaled = scaling is not None and scaling.contents() == "none"  # as without the keys
    return {
        f"ARCH.{key.removeprefix(prefix)}" if key.startswith(prefix) else key: (field.types, field.contents())
        for key, field in fields.items()
        if not key.startswith("GGUF.")
        and key != "tokenizer.ggml.pre"
        and not (is_unscaled and key.startswith(f"{prefix}rope.scaling."))
    }


def _section(compared: Sequence[Compared]) -> list[str]:
    rows = [
        f"| {one.name} | {one.n_tensors - len(one.differing)} of {one.n_tensors} "
        f"| {one.n_equal_keys} of {one.n_equal_keys + one.count(_OTHER)} | {one.count(_OURS)} | {one.count(_THEIRS)} "
        f"| {', '.join(one.left_out) or 'nothing'} |"
        for one in compared
    ]
    return [
        "## F32 GGUF files of llama.cpp's converter",
        "",
        f"`convert_hf_to_gguf.py --outtype f32` of llama-cpp-python {version('llama-cpp-python')} with",
        f"{', '.join(_PACKAGES[:3])}: a tensor is equal if its name, shape, type and bytes",
        "are, a key if its type and value are. Tiny random models in the hub's spelling, unless said otherwise.",
        "Gates and ups of experts may be one tensor of the converter's and two of ours, with the same values.",
        "`tokenizer.ggml.pre` is not compared: the converter finds it by a checksum of a vocabulary that it knows.",
        "",
        "| model | equal tensors | equal keys, of those of both | keys of ours alone | of the converter's alone "
        "| left out by both |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "Why keys differ, `ARCH` being the architecture's name:",
        "",
        "| key | | of | reason |",
        "|---|---|---|---|",
        *_differences(compared),
        "",
    ]


def _differences(compared: Sequence[Compared]) -> Iterator[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for one in compared:
        for key, side in one.keys.items():
            found.setdefault((key, side), []).append(one.name)
    for (key, side), names in sorted(found.items()):
        of = "all" if len(names) == len(compared) else "; ".join(names)
        yield f"| `{key}` | {side} | {of} | {_REASONS[side].get(key, 'NONE')} |"
