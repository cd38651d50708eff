"""The whole command against llama.cpp's own tools: converter, importance matrix, quantizer, perplexity with divergence.

    python -m benchmarks.whole_run [--layers 2] [--tools FOLDER] [--folder FOLDER]

By default the checkpoint has OLMoE-1B-7B's shape, all of it: 14 GB, and theirs needs another 14 GB of disk. Both sides
run once, with the source in the page cache, theirs first. Writes ``benchmarks/results/whole_run.json`` and ``.md``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import click

from benchmarks.export.llama_cpp import build_tools
from benchmarks.scale.checkpoints import MODELS, with_layers, write_checkpoint
from benchmarks.whole_run.llama_cpp import run_tools
from benchmarks.whole_run.ours import run_ours
from benchmarks.whole_run.table import Part, Side, record, recorded_side
from benchmarks.whole_run.texts import write_texts
from benchmarks.whole_run.watched import read_into_page_cache

_REPOSITORY = Path(__file__).parents[2]


@click.command()
@click.option("--shape", type=click.Choice(sorted(MODELS)), default="olmoe", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Decoder layers.  [default: as published]")
@click.option("--blocks", default=64, show_default=True, help="Calibration blocks of 512 tokens.")
@click.option("--chunks", default=20, show_default=True, help="Held-out chunks of 512 tokens.")
@click.option("--quant", default="Q4_K", show_default=True, help="A mix of llama-quantize.")
@click.option("--memory", default="3.5GB", show_default=True, help="What our command may use.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--hold", is_flag=True, help="Let the kernel hold all of our processes to --memory, with pages of files.")
@click.option("--keep-theirs", is_flag=True, help="Run our side alone, beside theirs of the run that is recorded.")
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
    keep_theirs: bool,
    tools: Path,
    folder: Path,
) -> None:
    """Measures both sides, prints each part, and records the run; the checkpoint is kept."""
    config = with_layers(MODELS[shape], layers)
    run = {"shape": shape, "layers": config["num_hidden_layers"], "quant": quant, "blocks": blocks, "chunks": chunks}
    run |= {"threads": threads, "memory": memory}
    source = folder / f"{shape}-{config['num_hidden_layers']}-layers"
    if not source.exists():
        write_checkpoint(config, source)
    texts = write_texts(source, folder, blocks, chunks)
    read_into_page_cache(source)
    if keep_theirs:
        theirs = recorded_side(run)
    else:
        their_folder = _emptied(folder / "theirs")
        theirs = Side(*run_tools(build_tools(tools), source, texts, their_folder, quant, threads, _show))
        shutil.rmtree(their_folder)
        read_into_page_cache(source)
    ours = run_ours(source, texts, _emptied(folder / "ours"), quant, memory, threads, hold=hold)
    for part in ours.parts:
        _show(part)
    source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    record(run, source_bytes, ours, theirs, kept_theirs=keep_theirs)


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _show(part: Part) -> None:
    print(f"{part.name}: {part.seconds:.1f} s, {(part.peak or 0) / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
