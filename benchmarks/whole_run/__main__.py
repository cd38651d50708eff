"""The whole command against llama.cpp's own tools: converter, importance matrix, quantizer, perplexity with divergence.

    python -m benchmarks.whole_run [--layers 2] [--only theirs|ours] [--tools FOLDER] [--folder FOLDER]

By default the checkpoint has OLMoE-1B-7B's shape, all of it: 14 GB, and theirs needs another 14 GB of disk. Both sides
run once, with the source in the page cache, theirs first. On a slow machine that takes hours, so each can be run alone.
Writes ``benchmarks/results/whole_run.json`` and ``.md``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from benchmarks.export.llama_cpp import build_tools
from benchmarks.scale.checkpoints import MODELS, with_layers, write_checkpoint
from benchmarks.whole_run.llama_cpp import run_tools
from benchmarks.whole_run.ours import run_ours
from benchmarks.whole_run.table import Part, Side, keep_side, kept_side, record
from benchmarks.whole_run.texts import write_texts
from benchmarks.whole_run.watched import read_into_page_cache

_REPOSITORY = Path(__file__).parents[2]
_SIDES = ("theirs", "ours")


@click.command()
@click.option("--shape", type=click.Choice(sorted(MODELS)), default="olmoe", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Decoder layers.  [default: as published]")
@click.option("--blocks", default=64, show_default=True, help="Calibration blocks of 512 tokens.")
@click.option("--chunks", default=20, show_default=True, help="Held-out chunks of 512 tokens.")
@click.option("--quant", default="Q4_K", show_default=True, help="A mix of llama-quantize.")
@click.option("--memory", default="3.5GB", show_default=True, help="What our command may use.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--hold", is_flag=True, help="Let the kernel hold all of our processes to --memory, with pages of files.")
@click.option("--only", type=click.Choice(_SIDES), help="Run this side alone, beside the other one's last run.")
@click.option("--tools", default=_REPOSITORY / ".venv-llama", type=Path, help="Where the tools are built.")
@click.option(
    "--folder", default=Path(tempfile.gettempdir()) / "moe-export-whole-run", type=Path, help="For all files."
)
def main(
    shape: str,
    layers: int | None,
    blocks: int,
    chunks: int,
    quant: str,
    memory: str,
    threads: int,
    hold: bool,
    only: str | None,
    tools: Path,
    folder: Path,
) -> None:
    """Measures both sides, prints each part, and records the run; the checkpoint and the sides stay in the folder."""
    config = with_layers(MODELS[shape], layers)
    run = {"shape": shape, "layers": config["num_hidden_layers"], "quant": quant, "blocks": blocks, "chunks": chunks}
    run |= {"threads": threads, "memory": memory, "instructions": torch.backends.cpu.get_cpu_capability()}
    source = folder / f"{shape}-{config['num_hidden_layers']}-layers"
    if not source.exists():
        write_checkpoint(config, source)
    texts = write_texts(source, folder, blocks, chunks)
    sides: dict[str, Side | None] = {}
    for name in _SIDES:
        path, place = folder / f"{name}.json", folder / name
        if only in (None, name):
            read_into_page_cache(source)
            with _empty(place):
                side = (
                    Side(*run_tools(build_tools(tools), source, texts, place, quant, threads, _show))
                    if name == "theirs"
                    else run_ours(source, texts, place, quant, memory, threads, hold=hold)
                )
            keep_side(path, run, side)
        sides[name] = kept_side(path, run)
    theirs, ours = sides["theirs"], sides["ours"]
    if theirs is None or ours is None:
        print(f"{only} is kept in {folder}; the table is written when the other side was measured there too")
        return
    for part in ours.parts:
        _show(part)
    source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    record(run, source_bytes, ours, theirs, in_parts=only is not None)


@contextmanager
def _empty(folder: Path) -> Iterator[None]:
    """Makes an empty folder, which goes when its side was measured; after an error it stays, to be looked at."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield
    shutil.rmtree(folder)


def _show(part: Part) -> None:
    print(f"{part.name}: {part.seconds:.1f} s, {(part.peak or 0) / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
