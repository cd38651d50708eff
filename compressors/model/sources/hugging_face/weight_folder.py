"""Finds the weight files of a folder, chosen as transformers chooses them and never outside of the folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compressors.model.errors import InputError
from compressors.model.files.json_file import read_json
from compressors.model.names import shown

__all__ = ["INDEX", "SINGLE", "WeightFolder", "find_weights", "oddities"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors", re.ASCII)

_INSTEAD = (
    (
        r".*\.(incomplete|part|crdownload|aria2)",
        "a download that is not complete ({}): let it finish, or download the file again",
    ),
    (r"adapter_model\..*", "an adapter ({}), no model: merge it into its base model first (PEFT: merge_and_unload)"),
    (r"consolidated.*\.safetensors", "the trainer's own copy only ({}): download model*.safetensors and their index"),
    (
        r"model\.\w+(-\d+-of-\d+)?\.safetensors",
        "a variant of the weights only ({}): download those without a variant in their name",
    ),
    (
        r".*\.gguf",
        "a GGUF file ({}): give that file itself instead of its folder, the first one of several parts",
    ),
    (
        r".*\.onnx",
        "an exported ONNX model ({}): give the original checkpoint; `moe-export validate` checks ONNX models",
    ),
    (
        r".*\.(bin|pt|pth|ckpt|msgpack|h5)",
        "weights in another format ({}), which may run code when it is opened: only safetensors checkpoints are read; "
        "load it with transformers, then save_pretrained",
    ),
)
"""Names of files that stand in place of weights, and the message for each; the first match counts."""


@dataclass(frozen=True)
class WeightFolder:
    """The files that hold a checkpoint's weights."""

    files: tuple[Path, ...]  # a tensor that lies in several of them has the last one's values
    index: Mapping[str, str] = field(default_factory=dict)  # tensor -> name of a file; empty: no index was read
    without_index: bool = False  # the files are shards whose index is missing
    beside_index: bool = False  # there is one file, beside an index that is not read


def find_weights(folder: Path) -> WeightFolder:
    """Finds the files: ``model.safetensors``, those that the index names, or shards whose index is missing.

    Raises:
        InputError: there are none, the index is damaged or names files outside of the folder, or a file is missing.
    """
    index = folder / INDEX
    if os.path.lexists(folder / SINGLE):
        return WeightFolder((folder / SINGLE,), beside_index=index.exists())
    if os.path.lexists(index):
        weight_map = _weight_map(index)
        files = tuple(folder / name for name in sorted(set(weight_map.values())))
        _refuse_missing([file.name for file in files if not os.path.isfile(file)], folder)
        return WeightFolder(files, index=weight_map)
    return WeightFolder(_shards(folder), without_index=True)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, "is not a weight index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} is not a weight index: download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise InputError(f"{index} is not a weight index (the file of {shown(tensor)} is {shown(name)})")
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: tensor {shown(tensor)} is said to lie in {shown(name)}; only *.safetensors files in the "
                "checkpoint's own folder are read: put them there and correct the index"
            )
    return weight_map


def _refuse_missing(missing: list[str], folder: Path) -> None:
    if missing:
        raise InputError(f"{folder}: the index names {shown(missing[0])}, which is missing; download it again")


def _shards(folder: Path) -> tuple[Path, ...]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror})") from None
    found = {name: match for name in names if (match := _SHARD.fullmatch(name)) is not None}
    if not found:
        raise InputError(f"{folder} holds {_instead(names)}")
    totals = sorted({int(match[2]) for match in found.values()})
    if len(totals) > 1:
        raise InputError(
            f"{folder}: {INDEX} is missing, and there are shards of several models (of {totals[0]} and of {totals[1]} "
            "files): download the index"
        )
    if len(found) < totals[0]:
        raise InputError(
            f"{folder}: {INDEX} is missing, and only {len(found)} of {totals[0]} shards are there: download the index "
            "and the others"
        )
    return tuple(folder / name for name in found)


def _instead(names: list[str]) -> str:
    for pattern, what in _INSTEAD:
        match = next((name for name in names if re.fullmatch(pattern, name)), None)
        if match is not None:
            return what.format(shown(match))
    return f"neither {SINGLE} nor {INDEX}: only safetensors checkpoints are read"


def oddities(weights: WeightFolder, held: Mapping[Path, Iterable[str]]) -> Iterator[str]:
    """Sentences without a full stop about what is odd and can still be read.

    Args:
        weights: the files.
        held: the tensors that lie in each of them, in the order of the files.
    """
    if weights.beside_index:
        yield f"{SINGLE} is read, as transformers does, and not {INDEX} beside it"
    if weights.without_index:
        yield f"{INDEX} is missing; all {len(weights.files)} shards are read"
    holders: dict[str, list[str]] = {}
    for file, names in held.items():
        for name in names:
            holders.setdefault(name, []).append(file.name)
    for name, files in holders.items():
        if len(files) > 1:
            yield f"tensor {shown(name)} is in {len(files)} files; as in transformers the last counts, {files[-1]}"
        elif weights.index.get(name, files[0]) != files[0]:
            yield (
                f"the index says that tensor {shown(name)} lies in {shown(weights.index[name])}; it is read "
                f"from {files[0]}, as in transformers"
            )
