"""onnxruntime-genai as a client of a written folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime_genai

__all__ = ["continue_batch", "continue_prompt"]


def continue_prompt(
    folder: Path, prompt: Sequence[int], n_tokens: int
) -> tuple[list[int], onnxruntime_genai.Generator]:
    """Continues a prompt greedily by at most so many tokens; the generator still holds its caches."""
    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + n_tokens)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens, generator


def continue_batch(folder: Path, prompts: Sequence[str], n_tokens: int) -> list[list[int]]:
    """Continues texts greedily as one batch, whose shorter rows are padded on the right by the tokenizer."""
    model = onnxruntime_genai.Model(str(folder))
    tokens_BT = onnxruntime_genai.Tokenizer(model).encode_batch(prompts).as_numpy()
    parameters = onnxruntime_genai.GeneratorParams(model)
    n_columns = tokens_BT.shape[1]
    parameters.set_search_options(max_length=n_columns + n_tokens, batch_size=len(prompts))
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(tokens_BT)
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[n_columns:].tolist() for row in range(len(prompts))]
