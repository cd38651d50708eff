"""Lets the teacher continue the same prompts as the files, to see how often the original loops."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.predictions.next_token import draw_tokens
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.student import Student
from compressors.recover.sampling import cache_bytes, continue_texts
from exporter.file_names import GENERATION
from exporter.stages.inputs import memory_limit, token_blocks, use_threads
from exporter.work.stage import StageContext
from validate.metrics.generation import NEW_TOKENS, GeneratedTexts, generation_figures, prompts_of, uniform_numbers

__all__ = ["streamed_texts", "teacher_texts"]


def teacher_texts(context: StageContext) -> None:
    """Writes the figures of the teacher's texts, in float32, the reference."""
    plan = context.plan
    use_threads(plan)
    teacher = Student.teacher(plan.open_source())
    model = StreamedModel(teacher, limit=memory_limit(context), device=torch.device(plan.device))
    prompts_PT = prompts_of(token_blocks(context.work).heldout.numpy())
    with context.progress.bar("tokens", 2 * len(prompts_PT) * NEW_TOKENS) as advance:
        texts = streamed_texts(model, prompts_PT, advance)
    figures = generation_figures(texts, plan.end_tokens)
    context.file(GENERATION).write_text(json.dumps(figures, indent=1), encoding="utf-8")


def streamed_texts(
    model: StreamedModel, prompts_PT: npt.NDArray[np.int64], progress: Callable[[int], None]
) -> GeneratedTexts:
    """Continues every prompt greedily and at temperature 1.

    All texts grow together, so layers are read once for a token of each; if the memory limit has no room for their keys
    and values, they are written in parts.

    Args:
        model: the model that writes.
        prompts_PT: int64 token ids.
        progress: called with the number of new tokens.

    Raises:
        InputError: not even one text's keys and values fit the memory limit.
    """
    n_prompts, n_prompt_tokens = prompts_PT.shape
    both_BT = torch.from_numpy(np.concatenate([prompts_PT, prompts_PT]))
    uniform_PN = uniform_numbers(n_prompts)
    n_together = len(both_BT)
    while n_together > 1 and not model.reserve(cache_bytes(model.spec, n_together, n_prompt_tokens + NEW_TOKENS)):
        n_together = -(-n_together // 2)
    written = []
    for part_b in torch.arange(len(both_BT)).split(n_together):

        def choose(logits_bV: torch.Tensor, texts: slice, place: int, part_b: torch.Tensor = part_b) -> torch.Tensor:
            progress(len(logits_bV))
            return _greedy_or_drawn(logits_bV, part_b[texts] - n_prompts, uniform_PN[:, place])

        written.append(continue_texts(model, both_BT[part_b], NEW_TOKENS, choose))
    new_BN = torch.cat(written)[:, n_prompt_tokens:].numpy()
    return GeneratedTexts(new_BN[:n_prompts], new_BN[n_prompts:])


def _greedy_or_drawn(logits_bV: torch.Tensor, numbers_b: torch.Tensor, uniform_P: torch.Tensor) -> torch.Tensor:
    """Each text's next token: drawn by its own number, or the most probable if it has none (a negative index)."""
    tokens_b = logits_bV.argmax(-1)
    drawn_b = numbers_b >= 0
    tokens_b[drawn_b] = draw_tokens(logits_bV[drawn_b], uniform_P[numbers_b[drawn_b]])
    return tokens_b
