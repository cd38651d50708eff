"""LightMoE beside plain replacing on five times as much held-out text; writes ``results/lightmoe_more_text.md``.

    python -m benchmarks.lightmoe.more_text [FOLDER]

Where 30 % of the bytes go, their difference is smaller than the noise of ``make lightmoe``'s 20 chunks. Both students
are built and trained as there, and compared over 100 chunks. What is measured lies in FOLDER, from which a run that was
killed goes on; so may two runs of one model each: ``python -m benchmarks.lightmoe.more_text FOLDER fine``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.lightmoe.arms import LIGHT, PLAIN
from benchmarks.lightmoe.measure import Measured, load, measure_into, prepare
from benchmarks.lightmoe.table import beside
from benchmarks.quality.measure import MODELS

__all__ = ["main"]

_RESULT = Path(__file__).parents[1] / "results/lightmoe_more_text.md"
_SHARE, _CHUNKS = 0.3, 100
_ARMS = (LIGHT, PLAIN)


def main() -> None:
    """Measures, and writes the page when all models are done."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "moe-export-more-text"
    for model in sys.argv[2:] or MODELS:
        prepare(model, folder / model, _CHUNKS)
        for arm in _ARMS:
            if not _path(folder, model, arm).exists():
                measure_into(_path(folder, model, arm), model, arm, _SHARE, folder / model)
    if all(_path(folder, model, arm).exists() for model in MODELS for arm in _ARMS):
        results = [load(_path(folder, model, arm)) for model in MODELS for arm in _ARMS]
        _RESULT.write_text("\n".join(_page(results)) + "\n", encoding="utf-8")


def _path(folder: Path, model: str, arm: str) -> Path:
    return folder / model / f"{arm} {_SHARE}.json"


def _page(results: Sequence[Measured]) -> Iterator[str]:
    yield "# LightMoE beside plain replacing, on more text"
    yield ""
    yield f"Both as in [lightmoe.md](lightmoe.md), with {_SHARE:.0%} of the experts' bytes removed, over {_CHUNKS}"
    yield "held-out chunks in place of 20. Written by `python -m benchmarks.lightmoe.more_text`."
    yield ""
    yield "| model | LightMoE, KL | plain replacing, KL | difference, with two standard errors |"
    yield "|---|---|---|---|"
    for light, plain in zip(results[::2], results[1::2], strict=True):
        difference = beside(plain, light)
        shown = f"{difference.mean:+.3f} ± {difference.two_errors:.3f} {difference.verdict}"
        yield f"| {light.model} | {light.divergence:.4f} | {plain.divergence:.4f} | {shown} |"


if __name__ == "__main__":
    main()
