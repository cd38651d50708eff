"""``make pareto``: writes ``benchmarks/results/pareto.csv``, ``pareto.md`` and ``pareto.png``.

    python -m benchmarks.pareto [--model fine] [--only presets] [--threads 1]

Every row is kept when it is measured; a second run continues. Remove rows of an earlier version from the table by hand,
or the whole table.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from benchmarks.export.llama_cpp import build_tools
from benchmarks.pareto.bars import SIZES_IN_BYTES, SIZES_OF_PRESETS, THIRD
from benchmarks.pareto.baselines import PRESETS, measure_presets, measure_pruned
from benchmarks.pareto.onnx_files import measure_onnx
from benchmarks.pareto.ours import heldout_blocks, measure_ours, searched_files
from benchmarks.pareto.subject import Subject
from benchmarks.pareto.table import write_markdown
from benchmarks.third_model import train_third_model
from exporter.curve.chart import write_chart
from exporter.curve.rows import RowFile
from exporter.hub import resolve_model

_REPOSITORY = Path(__file__).parents[2]
_RESULTS = _REPOSITORY / "benchmarks" / "results"
_MODELS = tuple(SIZES_OF_PRESETS)
_PARTS = ("presets", "ours", "onnx", "pruned")
_SMALLEST_SHARE = 0.09


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(_MODELS), default=_MODELS, show_default=True)
@click.option("--only", "parts", multiple=True, type=click.Choice(_PARTS), default=_PARTS, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--tools", default=_REPOSITORY / ".venv-llama", type=Path, help="Where llama.cpp's tools are built.")
@click.option("--folder", default=Path(tempfile.gettempdir()) / "moe-export-pareto", type=Path, help="For all files.")
@click.option("--results", default=_RESULTS, type=Path, help="For the table and the plot.")
def main(
    models: tuple[str, ...], parts: tuple[str, ...], threads: int, tools: Path, folder: Path, results: Path
) -> None:
    """Measures what is not in the table yet, and writes the table and the plot."""
    rows, onnx_rows = RowFile(results / "pareto.csv"), RowFile(results / "pareto_onnx.csv")
    llama_cpp = build_tools(tools)
    for name in models:
        subject = Subject(name, _checkpoint(name, folder), folder / name, rows, llama_cpp, threads)
        if "presets" in parts:
            measure_presets(subject)
        if "ours" in parts:
            measure_ours(subject, searched_files(subject), _sizes(subject))
        if "onnx" in parts and name != THIRD:
            files = searched_files(subject)
            measure_onnx(subject, files, heldout_blocks(subject), onnx_rows)
        if "pruned" in parts and name != THIRD:
            measure_pruned(subject, searched_files(subject))
    if rows.rows:
        write_markdown(rows.rows, onnx_rows.rows, results / "pareto.md")
        write_chart(rows.rows, results / "pareto.png")


def _checkpoint(name: str, folder: Path) -> Path:
    if name == "fine":
        return resolve_model(None)
    if name == "coarse":
        return _REPOSITORY / "tests" / "fixtures" / "coarse"
    folder.mkdir(parents=True, exist_ok=True)
    train_third_model(folder / "third-model")
    return folder / "third-model"


def _sizes(subject: Subject) -> dict[str, int]:
    """Bytes of our files by label: those of presets, and below."""
    sizes = {}
    for mix in SIZES_OF_PRESETS[subject.name]:
        preset = subject.rows.find(subject.name, PRESETS, mix)
        if preset is not None:
            sizes[mix] = preset.n_bytes
    sizes |= SIZES_IN_BYTES.get(subject.name, {})
    if subject.name != THIRD:
        sizes["9%"] = int(_SMALLEST_SHARE * subject.bf16_bytes)
    return sizes


if __name__ == "__main__":
    main()
