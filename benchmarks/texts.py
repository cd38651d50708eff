"""The original's texts, drafted by a file: passes over the original, and the same texts and bits as one pass a token.

    python -m benchmarks.texts MODEL ...           # writes results/texts.csv and texts.md
    python -m benchmarks.texts --shape FOLDER      # the time of passes over a large checkpoint of random weights

For each model the texts of the generation gate (24 prompts, 64 tokens, greedy and drawn) are written in three ways:
with the cache that other texts are written with, one token of each text in a pass
(:func:`compressors.recover.sampling.continue_texts`); by checked rows without drafts; and drafted by files of several
types. The logits of every token are compared to the last bit.

For a large shape of random weights the tokens are prescribed: in the place of the model's choice stands a fixed random
text, so that drafts are right as often as those of the trained models. Every product, and every byte that is read, is
that of a real run. Seconds are of the processor, all threads together.
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from compressors.recover.drafted_texts import Draft, write_texts
from compressors.recover.sampling import continue_texts
from exporter.hub import resolve_model
from exporter.stages.teacher.texts import chosen_tokens, drafts_of
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from validate.metrics.generation import NEW_TOKENS, PROMPT_TOKENS, prompts_of
from validate.runtimes.drafts import Drafter

_RESULTS = Path(__file__).parent / "results"
_MODELS, _SHAPE = _RESULTS / "texts.csv", _RESULTS / "texts_shape.csv"
_DRAFTS = (("gguf", "Q8_0"), ("gguf", "Q4_K"), ("gguf", "Q4_0"), ("gguf", "Q2_K"), ("onnx", "Q4_0"))
_FEWEST_TOKENS = 4096  # of any vocabulary here
_RIGHT_OF_GREEDY, _RIGHT_OF_DRAWN = 0.97, 0.92  # shares of right tokens after right ones, as in results/texts.csv


@dataclass(frozen=True)
class Drafted:
    """The figures of one model and one draft; texts are compared with those that are written token by token."""

    model: str
    draft: str  # artifact and type; empty: no drafts
    passes: int
    passes_greedy: int  # passes that the greedy texts alone would have taken
    drafted: int
    accepted: int
    different_texts: int
    different_logits: int  # places whose logits are not the same bits as without drafts
    least_gap: float  # the smallest distance between the two largest logits of a greedy text's place
    seconds: float  # of this process's processors, drafting not included


class _Watched:
    """Chooses tokens as the stage does, and keeps the last logits of each place."""

    def __init__(self, n_prompts: int) -> None:
        self._n_prompts = n_prompts
        self.logits: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, logits_nV: torch.Tensor, texts: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        self.logits |= dict(zip(zip(texts, places, strict=True), logits_nV.clone(), strict=True))
        return chosen_tokens(logits_nV, texts, places, self._n_prompts)

    def least_gap(self) -> float:
        """The smallest distance between the best two tokens of the greedy texts."""
        best = [logits_V.topk(2).values for (text, _), logits_V in self.logits.items() if text < self._n_prompts]
        return min(float(two[0] - two[1]) for two in best)


def measure_model(folder: Path, work: Path) -> Iterator[Drafted]:
    """Writes the texts of a model alone, then drafted by each type of file."""
    torch.set_num_threads(1)
    teacher, prompts_PT = Student.teacher(open_source(folder)), _prompts(folder)
    both_BT, n_prompts = torch.from_numpy(np.concatenate([prompts_PT, prompts_PT])), len(prompts_PT)
    expected_BT = _token_by_token(teacher, both_BT, n_prompts)
    alone = _Watched(n_prompts)
    yield _drafted(folder.name, "", teacher, both_BT, expected_BT, alone, alone, None)
    for artifact, mix in _DRAFTS:
        path = work / f"{folder.name}-{mix}-{artifact}"
        if artifact == "gguf":
            write_gguf(teacher, mix, path, name="draft", threads=1)
        else:
            write_onnx(teacher, mix, path, threads=1)
        with Drafter(
            artifact, path, n_texts=2 * n_prompts, n_tokens=both_BT.shape[1] + NEW_TOKENS, threads=1
        ) as drafter:
            draft, watched = drafts_of(drafter, *prompts_PT.shape), _Watched(n_prompts)
            yield _drafted(folder.name, f"{artifact} {mix}", teacher, both_BT, expected_BT, watched, alone, draft)
            assert drafter.error is None, drafter.error


def _drafted(
    name: str,
    drafted_by: str,
    teacher: Student,
    prompts_BT: torch.Tensor,
    expected_BT: torch.Tensor,
    watched: _Watched,
    alone: _Watched,
    draft: Draft | None,
) -> Drafted:
    n_greedy, passes_greedy = len(prompts_BT) // 2, 0

    def counted(texts: Sequence[int], tokens: Sequence[Sequence[int]], most: Sequence[int]) -> Sequence[Sequence[int]]:
        nonlocal passes_greedy
        assert draft is not None
        passes_greedy += min(texts) < n_greedy
        return draft(texts, tokens, most)

    start = time.process_time()
    drafting = None if draft is None else counted
    texts_BT, effort = write_texts(StreamedModel(teacher), prompts_BT, NEW_TOKENS, watched, drafting)
    seconds = time.process_time() - start
    same = sum(torch.equal(logits_V, watched.logits[place]) for place, logits_V in alone.logits.items())
    different_texts = int((texts_BT != expected_BT).any(1).sum())
    return Drafted(
        name,
        drafted_by,
        effort.passes,
        effort.passes if draft is None else passes_greedy,
        effort.drafted,
        effort.accepted,
        different_texts,
        len(alone.logits) - same,
        watched.least_gap(),
        round(seconds, 1),
    )


def _token_by_token(teacher: Student, prompts_BT: torch.Tensor, n_prompts: int) -> torch.Tensor:
    """The texts that take a pass for each token, with the cache of other texts."""

    def choose(logits_bV: torch.Tensor, texts: slice, place: int) -> torch.Tensor:
        numbers = range(*texts.indices(len(prompts_BT)))[: len(logits_bV)]
        return chosen_tokens(logits_bV, numbers, [place] * len(logits_bV), n_prompts)

    return continue_texts(StreamedModel(teacher), prompts_BT, NEW_TOKENS, choose)


def _prompts(folder: Path) -> npt.NDArray[np.int64]:
    text_folder = resolve_model(None).parent / "text" / "heldout"
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(text_folder.glob("*.txt")))
    tokens = np.array(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids, dtype=np.int64)
    n_chunks = len(tokens) // 512
    return prompts_of(tokens[: n_chunks * 512].reshape(n_chunks, 512))


@dataclass(frozen=True)
class Shaped:
    """The time of passes over a large checkpoint, with prescribed tokens."""

    drafted: bool
    new_tokens: int
    passes: int
    accepted: int
    n_drafted: int
    seconds: float  # of the clock
    first_pass_seconds: float  # of these, for the pass that runs the prompts too
    processor_seconds: float


def measure_shape(folder: Path, memory: float, threads: int, new_tokens: Sequence[int]) -> Iterator[Shaped]:
    """Times texts without drafts, of the first length, and with drafts, of the second."""
    torch.set_num_threads(threads)
    prompts_BT = torch.from_numpy(np.concatenate([_prompts(folder)] * 2))
    teacher = Student.teacher(open_source(folder))
    for n_new, drafts in zip(new_tokens, (False, True), strict=True):
        with tempfile.TemporaryDirectory() as spill:
            model = StreamedModel(teacher, limit=MemoryLimit(int(memory), Path(spill)))
            yield _prescribed_texts(model, prompts_BT, n_new, drafts=drafts)


def _prescribed_texts(model: StreamedModel, prompts_BT: torch.Tensor, n_new: int, *, drafts: bool) -> Shaped:
    texts_BN = np.random.default_rng(1).integers(0, _FEWEST_TOKENS, (len(prompts_BT), n_new))

    def choose(_: torch.Tensor, texts: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(texts_BN[list(texts), list(places)])

    def tell(n_tokens: int) -> None:
        passed.append(time.monotonic() - start)
        print(f"{n_tokens} tokens after {passed[-1]:.1f} s", flush=True)

    passed: list[float] = []
    start, began = time.monotonic(), time.process_time()
    draft = _prescribed(texts_BN) if drafts else None
    written_BT, effort = write_texts(model, prompts_BT, n_new, choose, draft, progress=tell)
    clock, processor = time.monotonic() - start, time.process_time() - began
    assert (written_BT[:, PROMPT_TOKENS:].numpy() == texts_BN).all()
    seconds = round(clock, 1), round(passed[0], 1), round(processor, 1)
    return Shaped(drafts, n_new, effort.passes, effort.accepted, effort.drafted, *seconds)


def _prescribed(texts_BN: npt.NDArray[np.int64]) -> Draft:
    """Drafts of these texts with as many wrong tokens as those of the trained models have."""
    generator = np.random.default_rng(2)

    def draft(texts: Sequence[int], tokens: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        found = []
        for text, known, n_most in zip(texts, tokens, most, strict=True):
            place = len(known) - PROMPT_TOKENS
            right_n = texts_BN[text, place : place + n_most]
            share = _RIGHT_OF_GREEDY if text < len(texts_BN) // 2 else _RIGHT_OF_DRAWN
            found.append((right_n + (generator.random(len(right_n)) >= share)).tolist())
        return found

    return draft


def _write(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _page() -> str:
    """The committed page, of both tables as they are on the disk."""
    lines = [_PAGE, *(f"| {' | '.join(_cells(row))} |" for row in _rows(_MODELS))]
    alone, drafted = _rows(_SHAPE)
    first = float(alone["first_pass_seconds"])
    per_pass = (float(alone["seconds"]) - first) / (int(alone["passes"]) - 1)
    one_by_one = first + (NEW_TOKENS - 1) * per_pass
    parts = f"{one_by_one:,.0f}: {first:.1f} for the first pass, then {per_pass:.1f} each"
    ratio = one_by_one / float(drafted["seconds"])
    lines += [
        _SHAPE_PAGE,
        f"| none; {alone['passes']} passes measured | {NEW_TOKENS} | | | {parts} | |",
        f"| as prescribed | {drafted['passes']} | {drafted['n_drafted']} | {drafted['accepted']} | "
        f"{float(drafted['seconds']):,.0f} | {ratio:.1f} |",
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, str]) -> list[str]:
    return list((dict(row) | {"draft": row["draft"] or "none", "least_gap": f"{float(row['least_gap']):.4f}"}).values())


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


_PAGE = """# The original's texts, drafted by a file

48 texts of 64 tokens after 24 prompts, greedy and drawn, as the generation gate has them; texts leave the batch when
they are complete. Passes: times that the original is read, where one for each token makes 64. Other texts: those
that are not the texts of one pass for each token, written with the cache of other texts. Other logits: places
whose logits are not the same bits as without drafts. Least gap: between the two largest logits of any place in a
greedy text. Seconds of one processor, drafting not included. Written by `python -m benchmarks.texts`.

| model | draft | passes | greedy alone | drafted | accepted | other texts | other logits | least gap | seconds |
|---|---|---|---|---|---|---|---|---|---|"""

_SHAPE_PAGE = """
## Time at real shape

6 layers of Qwen3-30B-A3B's shape, 8.7 GB of random weights, --memory 5GB, 2 threads, the page cache warm. A draft of
random weights is hardly ever right, so the tokens are prescribed, and drafts of them are right about as often as those
of `fine` in Q4_0: the products and the bytes read are those of a real run. With the real draft of such weights, a pass
gives little more than one token. Drafting itself is not included: it is decoding in llama.cpp, as much as the gate's
own texts and the rejected tokens. Here the head (a vocabulary of 151,936) takes many of the products; it runs a few
tokens beyond the first wrong one of a draft. Where reading takes the time, the number of passes counts instead.

| drafts | passes | drafted | accepted | seconds | times faster |
|---|---|---|---|---|---|"""


@click.command()
@click.argument("models", nargs=-1, type=click.Path(path_type=Path))
@click.option("--shape", type=click.Path(path_type=Path), help="A checkpoint of benchmarks.scale.checkpoints.")
@click.option("--memory", default=5e9, show_default=True, help="Bytes that the process may use for --shape.")
@click.option("--threads", default=2, show_default=True)
@click.option("--lengths", default="6,64", show_default=True, help="New tokens without drafts, and with drafts.")
def main(models: Sequence[Path], shape: Path | None, memory: float, threads: int, lengths: str) -> None:
    """Measure the original's texts of MODELS, folders with trained weights."""
    with tempfile.TemporaryDirectory() as work:
        _record((row for folder in models for row in measure_model(folder, Path(work))), _MODELS)
    if shape is not None:
        _record(measure_shape(shape, memory, threads, [int(length) for length in lengths.split(",")]), _SHAPE)
    (_RESULTS / "texts.md").write_text(_page(), encoding="utf-8")


def _record(measured: Iterator[Drafted] | Iterator[Shaped], path: Path) -> None:
    rows = []
    for row in measured:
        click.echo(row)
        rows.append(asdict(row))
        _write(rows, path)


if __name__ == "__main__":
    main()
