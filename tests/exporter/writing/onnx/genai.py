"""onnxruntime-genai as a client of a written folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime_genai

__all__ = ["continue_prompt"]


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
