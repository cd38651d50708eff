"""``make start``: the processor time before a person sees something. Writes ``results/start.md``.

    python -m benchmarks.start [--repeats 3]

The model is a sparse file with the real headers of Qwen3-30B-A3B: 48 layers of 128 experts, one tensor for each matrix.
Importing torch, which none of these commands does, is measured beside them for the speed of the machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.scale.checkpoints import MODELS, write_checkpoint

__all__ = ["markdown"]

_RESULTS = Path(__file__).parent / "results" / "start.md"
_BUDGET = "20GB"
_BARS = {
    "moe-export --help": 0.5,
    "moe-export inspect MODEL": 0.5,
    f"moe-export MODEL --budget {_BUDGET} --dry-run": 3.0,
}
"""The most seconds for each command."""


def _commands(model: Path, out: Path) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "exporter"]
    arguments = (["--help"], ["inspect", str(model)], [str(model), "--budget", _BUDGET, "--dry-run", "--out", str(out)])
    return {name: [*ours, *given] for name, given in zip(_BARS, arguments, strict=True)} | {
        "python -c 'import torch'": [sys.executable, "-c", "import torch"]
    }


def _seconds(command: Sequence[str], bytecode: Path) -> float:
    """Processor time of a command and the processes that it waits for; compiled code is kept, as after installing."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(bytecode)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def markdown(seconds: Mapping[str, float]) -> str:
    """The page with the table, from the seconds of each command."""
    lines = [
        "# Seconds before a person sees something",
        "",
        "Processor time, that of child processes included, the least of several repeats. MODEL is a sparse file with",
        "the real headers of Qwen3-30B-A3B (18,867 tensors, 61 GB) and the bundled tokenizer; a tokenizer for which",
        "transformers has a class of its own, such as Qwen2Tokenizer, is loaded by transformers, which imports torch.",
        "`make start` writes this page.",
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
        model = Path(place) / "qwen3-30b"
        write_checkpoint(MODELS["qwen3-30b"], model, sparse=True)
        commands = _commands(model, Path(place) / "out")
        seconds = {
            name: min(_seconds(command, Path(place) / "bytecode") for _ in range(repeats))
            for name, command in commands.items()
        }
    _RESULTS.write_text(markdown(seconds), encoding="utf-8")
    print(markdown(seconds))


if __name__ == "__main__":
    main()
