"""Checks that llama-perplexity prints the figures of our report about the same GGUF file and text.

The tool is compiled from the sources that the installed llama-cpp-python was built from. Both evaluate chunks of 512
tokens in halves of 256, with an F16 cache, no flash attention, weights as stored and one thread: then the arithmetic of
the runtime is the same, and every further difference would be in our statistics.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.export.llama_cpp import build_tools
from benchmarks.peers.environment import REPOSITORY
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf
from validate.metrics.evaluation import evaluate
from validate.metrics.figures import fidelity_figures
from validate.metrics.logits_file import LogitsFile, LogitsFileWriter
from validate.report import numbers
from validate.report.facts import find
from validate.report.statistics import STATISTICS, Statistic
from validate.runtimes.llama_cpp import LlamaCppBackend

__all__ = ["compare"]

_MODELS = {"fine": REPOSITORY / "exporter/demo/model", "coarse": REPOSITORY / "tests/fixtures/coarse"}
_TYPES = ("F32", "Q8_0", "Q4_K")
_TEXT = REPOSITORY / "exporter/demo/text/heldout"
_CHUNKS = 10
_SAME_ARITHMETIC = ("-b", "256", "-ub", "256", "-fa", "off", "--no-repack", "-t", "1")
_NUMBER = r"(-?[\d.]+|-?nan)"
_ATTEMPTS = 10  # it ends without waiting for the thread that writes its log: on a busy machine the end is missing


@dataclass(frozen=True)
class _Compared:
    """One file in both."""

    model: str
    preset: str
    theirs: Mapping[str, float]  # figures and, as "NAME ±", their errors
    ours: Mapping[str, float]  # rounded to as many digits
    estimate: float  # the perplexity that the tool prints without --kl-divergence
    defaults: float  # the same with its own settings

    @property
    def differing(self) -> list[str]:
        """The figures that are not the same to the last printed digit. What the tool cannot tell is not compared."""
        return [name for name, value in self.theirs.items() if not np.isnan(value) and value != self.ours[name]]

    @property
    def agrees(self) -> bool:
        """Whether all figures are the same."""
        return not self.differing and self.same_estimate

    @property
    def same_estimate(self) -> bool:
        """Whether the perplexity is the same to four decimals."""
        return round(self.ours["Mean PPL(Q)"], 4) == self.estimate


def compare() -> tuple[list[str], bool]:
    """Runs both on every file: the lines of the report, and whether all figures are the same."""
    tool = build_tools(REPOSITORY / ".venv-llama").perplexity
    compared: list[_Compared] = []
    equal_bytes = {}
    for name, source in _MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            files = _write_files(source, Path(folder))
            text = _write_text(Path(folder))
            base = Path(folder) / "base.kld"
            estimates = {"F32": _estimate(tool, files["F32"], text, *_SAME_ARITHMETIC, "--kl-divergence-base", base)}
            _refuse_other_tokens(base, text, source)
            for preset, path in files.items():
                if preset not in estimates:
                    estimates[preset] = _estimate(tool, path, text, *_SAME_ARITHMETIC)
                ours = _ours(path, base, Path(folder) / "ours.kld")
                if preset == "F32":
                    equal_bytes[name] = base.read_bytes() == (Path(folder) / "ours.kld").read_bytes()
                theirs = _statistics(tool, path, base)
                defaults = _estimate(tool, path, text, "--no-repack", "-t", "1")
                compared.append(_Compared(name, preset, theirs, ours, estimates[preset], defaults))
                print(name, preset, "agrees" if compared[-1].agrees else f"DIFFERENT: {compared[-1].differing}")
    passed = all(one.agrees for one in compared) and all(equal_bytes.values())
    return _section(compared, equal_bytes), passed


def _write_files(source: Path, folder: Path) -> dict[str, Path]:
    paths = {preset: folder / f"{preset}.gguf" for preset in _TYPES}
    for preset, path in paths.items():
        write_gguf(Student.teacher(Checkpoint(source)), preset, path, name="model", threads=1)
    return paths


def _write_text(folder: Path) -> Path:
    """The held-out text as one file, paragraphs shuffled, so that its first chunks are of all domains."""
    paragraphs = [part for file in sorted(_TEXT.glob("*.txt")) for part in file.read_text("utf-8").split("\n\n")]
    order = np.random.default_rng(0).permutation(len(paragraphs))
    path = folder / "text.txt"
    path.write_text("\n\n".join(paragraphs[index] for index in order), encoding="utf-8")
    return path


def _refuse_other_tokens(base: Path, text: Path, source: Path) -> None:
    """Both must read the same tokens in the text."""
    tokens = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text.read_text("utf-8")).ids
    theirs = LogitsFile(base).tokens_BT.ravel()
    assert theirs.tolist() == tokens[: len(theirs)], "llama.cpp and the tokenizer disagree"


def _run(tool: Sequence[str], path: Path, arguments: Sequence[str | Path], needed: str) -> str:
    command = [*tool, "-m", path, "-c", "512", "--chunks", str(_CHUNKS), *arguments]
    for _ in range(_ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
        if needed in done.stdout + done.stderr:
            return done.stdout + done.stderr
    raise SystemExit(f"{' '.join(map(str, command))} does not print {needed!r}:\n{done.stdout}{done.stderr}")


def _estimate(tool: Sequence[str], path: Path, text: Path, *options: str | Path) -> float:
    printed = re.search(rf"PPL = {_NUMBER}", _run(tool, path, ["-f", text, *options], "Final estimate"))
    assert printed is not None
    return float(printed[1])


def _statistics(tool: Sequence[str], path: Path, base: Path) -> dict[str, float]:
    arguments = [*_SAME_ARITHMETIC, "--kl-divergence-base", base, "--kl-divergence"]
    printed = _run(tool, path, arguments, "Same top p:")
    figures = {}
    for statistic in STATISTICS:
        name = r"\s+".join(map(re.escape, statistic.name.split()))
        line = re.search(rf"^\s*{name}\s*:\s*{_NUMBER}\s*%?\s*(?:±\s*{_NUMBER})?", printed, re.MULTILINE)
        assert line is not None, statistic.name
        figures[statistic.name] = float(line[1])
        if line[2] is not None:
            figures[f"{statistic.name} ±"] = float(line[2])
    return figures


def _ours(path: Path, base: Path, recorded: Path) -> dict[str, float]:
    """Returns the report's figures, rounded to the digits that the tool prints; also writes a logits file."""
    torch.set_num_threads(1)
    reference = LogitsFile(base)
    writer = LogitsFileWriter(recorded, reference.tokens_BT, reference.vocab_size)
    backend = LlamaCppBackend(path, threads=1)
    row = fidelity_figures(evaluate(backend, reference.tokens_BT, {"base": reference}, record=writer), "base")
    figures = {}
    for statistic in STATISTICS:
        error_keys = (*statistic.keys[:-1], f"{statistic.keys[-1]}_error")
        figures[statistic.name] = _rounded(row, statistic.keys, statistic)
        figures[f"{statistic.name} ±"] = _rounded(row, error_keys, statistic)
    return figures


def _rounded(row: Mapping[str, Any], keys: tuple[str, ...], statistic: Statistic) -> float:
    value = find(row, *keys)
    return float("nan") if value is None else round((100 if statistic.percent else 1) * value, statistic.decimals)


def _section(compared: Sequence[_Compared], equal_bytes: Mapping[str, bool]) -> list[str]:
    shown = ("Mean PPL(Q)", "Mean ln(PPL(Q)/PPL(base))", "Mean KLD", "99.0% KLD", "Maximum KLD", "RMS Δp", "Same top p")
    same_files = ", ".join(f"{name}: {'yes' if same else 'NO'}" for name, same in equal_bytes.items())
    return [
        "## The statistics of llama-perplexity",
        "",
        f"llama-perplexity compiled from the sources of llama-cpp-python {version('llama-cpp-python')}, against our",
        f"validation in llama.cpp: {_CHUNKS} chunks of 512 tokens of the shuffled held-out text, the same GGUF files,",
        f"`{' '.join(_SAME_ARITHMETIC)}`. The base of every divergence is the tool's own logits",
        "file of the F32 file, which we read. *Same* counts the printed figures, errors included, that are ours to the",
        "last printed digit; *unknown* those that the tool prints as nan. *Estimate* is what it prints without",
        "`--kl-divergence`, and *defaults* the same with its own settings (four chunks to a batch, flash attention",
        "where it can): what a difference in settings is worth.",
        "",
        f"Our logits file of the F32 file equals the tool's byte for byte: {same_files}.",
        "",
        f"| model | type | same | unknown | {' | '.join(shown)} | estimate | defaults |",
        f"|---|---|---|---|{'---|' * len(shown)}---|---|",
        *(_row(one, shown) for one in compared),
        "",
    ]


def _row(one: _Compared, shown: Sequence[str]) -> str:
    unknown = sum(np.isnan(value) for value in one.theirs.values())
    n_known = len(one.theirs) - unknown
    same = f"{n_known - len(one.differing)} of {n_known}"
    if one.differing:
        same += f" (DIFFERENT: {', '.join(one.differing)})"
    decimals = {statistic.name: statistic.decimals for statistic in STATISTICS}
    figures = (numbers.fixed(one.theirs[name], decimals[name]) for name in shown)
    estimate = f"{one.estimate:.4f} ({'same' if one.same_estimate else 'DIFFERENT'})"
    cells = (one.model, one.preset, same, str(unknown), *figures, estimate, f"{one.defaults:.4f}")
    return f"| {' | '.join(cells)} |"
