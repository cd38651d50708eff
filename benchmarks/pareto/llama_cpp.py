"""llama.cpp's own tools on one model: importance matrix, presets, and the divergence of a file from the F32 one."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.export.llama_cpp import Tools, patience
from exporter.hub import bundled_text

__all__ = ["Figures", "Measuring"]

IMATRIX_CHUNKS = 160  # 81,920 tokens
HELDOUT_CHUNKS = 30
_NUMBER = r"(-?[\d.]+)"


@dataclass(frozen=True)
class Figures:
    """The figures that ``llama-perplexity --kl-divergence`` prints for a file."""

    divergence: float  # mean over the scored positions, nats
    divergence_error: float  # standard error of that mean
    top1: float  # share of positions whose most probable token is the F32 file's
    perplexity: float


class Measuring:
    """A model's F32 file, the logits that it gives to held-out text, and everything that is compared with them.

    Args:
        tools: compiled from the source of the llama.cpp that llama-cpp-python ships.
        reference: the model's F32 file.
        folder: where logits and importance matrices are written.
        threads: threads of the tools.
    """

    def __init__(self, tools: Tools, reference: Path, folder: Path, threads: int) -> None:
        self._tools = tools
        self._folder = folder
        self._threads = str(threads)
        self._logits = folder / "heldout.kld"
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("calibration", "heldout"):
            _write_shuffled(split, self._text(split))
        if not self._logits.exists():
            partial = folder / "heldout.partial"
            self._perplexity(reference, "Final estimate", "-f", self._text("heldout"), "--save-all-logits", partial)
            partial.rename(self._logits)

    def quantize(self, source: Path, mix: str, target: Path) -> None:
        """Writes one of llama-quantize's mixes of an F32 file, with the importance matrix of that file."""
        command: list[str | Path] = [*self._tools.quantize, "--imatrix", self._imatrix(source)]
        _run([*command, source, target, mix, self._threads])

    def figures(self, path: Path) -> Figures:
        """Compares a file's logits with those of the F32 file."""
        printed = self._perplexity(
            path, "Same top p:", "--kl-divergence-base", self._logits, "--kl-divergence", "-f", self._text("heldout")
        )
        divergence = _numbers(rf"Mean\s+KLD:\s*{_NUMBER} ±\s*{_NUMBER}", printed)
        return Figures(
            *divergence,
            _numbers(rf"Same top p:\s*{_NUMBER}", printed)[0] / 100,
            _numbers(rf"Mean PPL\(Q\)\s*:\s*{_NUMBER}", printed)[0],
        )

    def _imatrix(self, source: Path) -> Path:
        path = self._folder / f"{source.stem}.imatrix.gguf"
        if not path.exists():
            partial = self._folder / "partial.imatrix.gguf"
            command: list[str | Path] = [*self._tools.imatrix, "-m", source, "-f", self._text("calibration")]
            command += ["-o", partial, "-c", "512", "--chunks", str(IMATRIX_CHUNKS), "--no-ppl", "-t", self._threads]
            _run(command)
            partial.rename(path)
        return path

    def _text(self, split: str) -> Path:
        return self._folder / f"{split}.txt"

    def _perplexity(self, path: Path, needed: str, *arguments: str | Path) -> str:
        command: list[str | Path] = [*self._tools.perplexity, "-m", path, "-c", "512", "-t", self._threads]
        command += ["--chunks", str(HELDOUT_CHUNKS), *arguments]
        printed = _run(command, os.environ | {"LD_PRELOAD": str(patience(self._folder))})
        if needed not in printed:
            raise SystemExit(f"{' '.join(map(str, command))} does not print {needed!r}:\n{printed}")
        return printed


def _write_shuffled(split: str, path: Path) -> None:
    """Writes a split of the bundled text as one file, with shuffled paragraphs: its first chunks are of all domains."""
    paragraphs = [
        part for file in sorted(bundled_text(split).glob("*.txt")) for part in file.read_text("utf-8").split("\n\n")
    ]
    order = np.random.default_rng(0).permutation(len(paragraphs))
    path.write_text("\n\n".join(paragraphs[index] for index in order), encoding="utf-8")


def _run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _numbers(pattern: str, printed: str) -> tuple[float, ...]:
    found = re.search(pattern, printed)
    assert found is not None, pattern
    return tuple(float(number) for number in found.groups())
