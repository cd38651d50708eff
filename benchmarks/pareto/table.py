"""``pareto.md``: promised figures beside measured ones, and every measured file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.pareto.bars import Judged, judged
from benchmarks.pareto.llama_cpp import HELDOUT_CHUNKS, IMATRIX_CHUNKS
from benchmarks.pareto.onnx_files import BARS, PRESET
from exporter.curve.rows import OURS, ParetoRow
from exporter.curve.table import markdown_lines

__all__ = ["write_markdown"]

_EXPLANATION = f"""\
# Divergence against bytes

Three trained models: the bundled one (*fine*: 32 experts, rows of 128 in ffn_down), the one of the tests (*coarse*: 8
experts) and one that nothing was developed on (*third*, `benchmarks/third_model.py`). Everything is measured by
llama.cpp's own tools, compiled from the source of the llama-cpp-python that is installed: `llama-imatrix` on
{IMATRIX_CHUNKS} chunks of the bundled calibration text and `llama-quantize` make the baselines, and
`llama-perplexity --kl-divergence` compares every file with the F32 one on {HELDOUT_CHUNKS} chunks of 512 tokens of the
bundled held-out text, paragraphs shuffled. Our files come from the functions of an export with that size as its budget:
they know the calibration text, and choices were made on its selection split. *Predicted*: what the search expected.
Written by `make pareto`.

## What was promised

*Bar*: the most that the divergence may be, times that of the best baseline of no more bytes or in nats; none may be
worse than a baseline of no more bytes.
"""


_ONNX = """\
## ONNX

Measured by ONNX Runtime, divergence from the float32 file of the same writer, on 25 chunks of the held-out text. The
baseline is today's 4-bit file; a size in bits is that of all matrices together, scales included. Wanted: at most 0.6
times its divergence at its bytes, 0.4 times at 1.1 times its bytes.
"""


def write_markdown(rows: Sequence[ParetoRow], onnx_rows: Sequence[ParetoRow], path: Path) -> None:
    """Writes the table."""
    lines = [*_EXPLANATION.splitlines(), "", *_promises(judged(rows))]
    for model in dict.fromkeys(row.model for row in rows):
        lines += ["", f"## {model}", "", *markdown_lines([row for row in rows if row.model == model])]
    if onnx_rows:
        lines += ["", *_ONNX.splitlines(), "", *_onnx_promises(onnx_rows)]
        for model in dict.fromkeys(row.model for row in onnx_rows):
            of_model = [row for row in onnx_rows if row.model == model]
            lines += ["", f"### {model}, ONNX", "", *markdown_lines(of_model)]
    lines += ["", "![divergence against bytes](pareto.png)"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _promises(found: Iterable[Judged]) -> list[str]:
    lines = [
        "| model | size | bytes | structure | divergence | predicted | best baseline, no larger | ratio | bar | kept |",
        f"|{'---|' * 10}",
    ]
    for one in found:
        row, best = one.row, one.baseline
        cells = [row.model, row.mix, f"{row.n_bytes:,}", row.structure, f"{row.divergence:.5f}"]
        cells.append("" if row.predicted is None else f"{row.predicted:.5f}")
        cells.append("none" if best is None else f"{best.method}, {best.mix}: {best.divergence:.5f}")
        cells.append("" if best is None else f"{row.divergence / best.divergence:.2f}")
        cells += [one.said, "kept" if one.is_kept else "MISSED"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _onnx_promises(rows: Sequence[ParetoRow]) -> list[str]:
    lines = ["| model | size | divergence | preset's | ratio | bar | kept |", "|---|---|---|---|---|---|---|"]
    presets = {row.model: row for row in rows if row.mix == PRESET}
    for row in rows:
        if row.method == OURS and row.mix in BARS:
            ratio = row.divergence / presets[row.model].divergence
            said = "kept" if ratio <= BARS[row.mix] else "MISSED"
            cells = [row.model, row.mix, f"{row.divergence:.5f}", f"{presets[row.model].divergence:.5f}"]
            lines.append(f"| {' | '.join([*cells, f'{ratio:.2f}', f'{BARS[row.mix]:g} x', said])} |")
    return lines
