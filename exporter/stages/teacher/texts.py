"""Lets the teacher continue the same prompts as the files, to see how often the original loops.

The first file that was written drafts the texts in its runtime, and the teacher checks whole drafts of all texts
whenever it is streamed (:mod:`compressors.recover.drafted_texts`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import partial
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.predictions.drawn_token import drawn_token
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.student import Student
from compressors.recover.drafted_texts import Draft, Effort, write_texts
from exporter.file_names import GENERATION, TEXT_EFFORT
from exporter.stages.inputs import artifact_path, memory_limit, text_figures, token_blocks, use_threads
from exporter.work.stage import StageContext
from validate.metrics.generation import EXAMPLE_TEMPERATURE, NEW_TOKENS, GeneratedTexts, example_prompt, prompts_of
from validate.runtimes.drafts import Drafter, Wish

__all__ = ["chosen_tokens", "drafts_of", "streamed_texts", "teacher_texts"]


class _Drawn(TypedDict, total=False):
    """How a text's tokens are drawn, as :class:`~validate.runtimes.drafts.Wish` takes it."""

    prompt: int
    temperature: float


def teacher_texts(context: StageContext) -> None:
    """Writes the figures of the teacher's texts, in float32, the reference, and how many passes they took."""
    plan = context.plan
    use_threads(plan)
    teacher = Student.teacher(plan.open_source())
    prompts_PT = prompts_of(token_blocks(context.work).heldout.numpy())
    drafting = plan.recipe.artifacts[0]
    with (
        Drafter(
            drafting,
            artifact_path(context.work, drafting),
            n_texts=2 * len(prompts_PT) + 1,
            n_tokens=prompts_PT.shape[1] + NEW_TOKENS,
            threads=plan.recipe.threads,
            memory_bytes=plan.memory_bytes,
        ) as drafter,
        context.progress.bar("tokens", (2 * len(prompts_PT) + 1) * NEW_TOKENS) as advance,
    ):
        limit = memory_limit(context, beside=drafter.own_bytes)
        model = StreamedModel(teacher, limit=limit, device=torch.device(plan.device))
        draft = drafts_of(drafter, *prompts_PT.shape)
        texts, effort = streamed_texts(model, prompts_PT, advance, draft, plan.end_tokens)
    figures = text_figures(plan, prompts_PT, texts)
    context.file(GENERATION).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    kept = asdict(effort) | {"drafted_by": drafting, "drafting_ended": drafter.error}
    context.file(TEXT_EFFORT).write_text(json.dumps(kept, indent=1), encoding="utf-8")


def drafts_of(drafter: Drafter, n_prompts: int, n_prompt_tokens: int) -> Draft:
    """Drafts of a runtime: first for the greedy texts of all prompts, then for the drawn ones, last for the example."""

    def draft(texts: Sequence[int], tokens: Sequence[Sequence[int]], most: Sequence[int]) -> Sequence[Sequence[int]]:
        return drafter.draft(
            [
                Wish(text, known, n_most, place=len(known) - n_prompt_tokens, **_drawn(text, n_prompts))
                for text, known, n_most in zip(texts, tokens, most, strict=True)
            ]
        )

    return draft


def streamed_texts(
    model: StreamedModel,
    prompts_PT: npt.NDArray[np.int64],
    progress: Callable[[int], None],
    draft: Draft | None = None,
    ends: Collection[int] = (),
) -> tuple[GeneratedTexts, Effort]:
    """Continues every prompt greedily and at temperature 1, and one for people to read.

    All texts grow together, so layers are read once for a few tokens of each.

    Args:
        model: the model that writes.
        prompts_PT: int64 token ids.
        progress: called with the number of new tokens.
        draft: guesses how the texts go on; their numbers are those of :func:`drafts_of`.
        ends: tokens that end a text.
    """
    n_prompts, n_prompt_tokens = prompts_PT.shape
    example = example_prompt(n_prompts)
    prompts_BT = torch.from_numpy(np.concatenate([prompts_PT, prompts_PT, prompts_PT[example : example + 1]]))
    choose = partial(chosen_tokens, n_prompts=n_prompts)
    texts_BT, effort = write_texts(model, prompts_BT, NEW_TOKENS, choose, draft, ends=ends, progress=progress)
    new_BN = texts_BT[:, n_prompt_tokens:].numpy()
    return GeneratedTexts(new_BN[:n_prompts], new_BN[n_prompts:-1], new_BN[-1]), effort


def chosen_tokens(logits_nV: torch.Tensor, texts: Sequence[int], places: Sequence[int], n_prompts: int) -> torch.Tensor:
    """The next tokens of texts, which have the numbers of :func:`drafts_of`, at their places: int64 [n]."""
    tokens_n = logits_nV.argmax(-1)
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        if drawn := _drawn(text, n_prompts):
            tokens_n[row] = drawn_token(logits_nV[row].numpy() / drawn["temperature"], (drawn["prompt"], place))
    return tokens_n


def _drawn(text: int, n_prompts: int) -> _Drawn:
    """The prompt whose random numbers draw a text's tokens, and the temperature; empty for a greedy text."""
    if text < n_prompts:
        return {}
    if text < 2 * n_prompts:
        return {"prompt": text - n_prompts, "temperature": 1.0}
    return {"prompt": example_prompt(n_prompts), "temperature": EXAMPLE_TEMPERATURE}
