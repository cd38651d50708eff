"""``make start``: the processor time before a person sees something. Writes ``results/start.md``.

    python -m benchmarks.start [--repeats 3]

The model is a sparse file with the real headers of Qwen3-30B-A3B: 48 layers of 128 experts, one tensor for each matrix.
It stands there three times: with the bundled tokenizer, with one of the published size, settings and class, and with a
family that nobody knows, which is refused. Importing torch, which none of these commands does, is measured beside them
for the speed of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.large_tokenizer import write_large_tokenizer
from benchmarks.scale.checkpoints import MODELS, write_checkpoint

__all__ = ["markdown"]

_RESULTS = Path(__file__).parent / "results" / "start.md"
_BUDGET = "20GB"
_PLAN = f"moe-export {{}} --budget {_BUDGET} --dry-run"
_REFUSED = "moe-export inspect MODEL-OF-AN-UNKNOWN-FAMILY"
_BARS = {
    "moe-export --help": 0.5,
    "moe-export inspect MODEL": 0.5,
    _PLAN.format("MODEL"): 3.0,
    _PLAN.format("MODEL-WITH-QWEN3'S-TOKENIZER"): 3.0,
    _REFUSED: 1.0,
}
"""The most seconds for each command."""


def _make_unknown(model: Path) -> None:
    """Gives a checkpoint's configuration the name of a family that nobody knows."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "new_hybrid", "architectures": ["NewHybridForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _commands(model: Path, with_large_tokenizer: Path, unknown: Path, out: Path) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "exporter"]
    plan = ["--budget", _BUDGET, "--dry-run", "--out", str(out)]
    known = (["inspect", str(model)], [str(model), *plan], [str(with_large_tokenizer), *plan])
    arguments = (["--help"], *known, ["inspect", str(unknown)])
    return {name: [*ours, *given] for name, given in zip(_BARS, arguments, strict=True)} | {
        "python -c 'import torch'": [sys.executable, "-c", "import torch"]
    }


def _seconds(command: Sequence[str], bytecode: Path, exit_code: int) -> float:
    """Processor time of a command and the processes that it waits for; compiled code is kept, as after installing."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(bytecode)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != exit_code:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def markdown(seconds: Mapping[str, float]) -> str:
    """The page with the table, from the seconds of each command."""
    lines = [
        "# Seconds before a person sees something",
        "",
        "Processor time, that of child processes included, the least of several repeats. MODEL is a sparse file with",
        "the real headers of Qwen3-30B-A3B (18,867 tensors, 61 GB) and the bundled tokenizer of 4,096 tokens. The",
        "other model has a tokenizer with the published size (151,643 tokens), settings and class (Qwen2Tokenizer),",
        "and random merges; the last is of no supported family, and refused. On a machine with other work all figures",
        "are larger; torch, which none of the commands imports, is there for comparison. Written by `make start`.",
        "",
        "| command | seconds | at most |",
        "|---|---:|---:|",
        *(f"| `{name}` | {value:.2f} | {_BARS.get(name, '')} |" for name, value in seconds.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, and writes the table."""
    parser = argparse.ArgumentParser(description="Measures the processor time of help, inspection and dry runs.")
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as place:
        models = [Path(place) / name for name in ("qwen3-30b", "qwen3-30b-large-tokenizer", "new-hybrid")]
        for model in models:
            write_checkpoint(MODELS["qwen3-30b"], model, sparse=True)
        write_large_tokenizer(models[1])
        _make_unknown(models[2])
        commands = _commands(*models, Path(place) / "out")
        seconds = {
            name: min(_seconds(command, Path(place) / "bytecode", 2 * (name == _REFUSED)) for _ in range(repeats))
            for name, command in commands.items()
        }
    _RESULTS.write_text(markdown(seconds), encoding="utf-8")
    print(markdown(seconds))


if __name__ == "__main__":
    main()
