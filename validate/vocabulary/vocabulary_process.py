"""Asks llama.cpp about a GGUF file's vocabulary in a separate process: a bad one makes llama.cpp abort.

    python -m validate.vocabulary.vocabulary_process PARENT FILE

reads a JSON list of texts from standard input and prints one JSON object. The process imports neither torch nor
transformers, and ends when process PARENT, which started it, is gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compressors.model.errors import InputError, MoeExportError
from validate.runtimes.lifetime import end_with_parent

__all__ = ["LlamaTokens", "ask_llama_cpp"]

_TIME_LIMIT = 120  # seconds; 150,000 tokens and a page of text take one


@dataclass(frozen=True)
class LlamaTokens:
    """llama.cpp's tokens for some texts, and facts about its special tokens."""

    parsed: tuple[tuple[int, ...], ...]  # special tokens inside a text are recognised
    plain: tuple[tuple[int, ...], ...]  # special tokens are not recognised
    whole: tuple[tuple[int, ...], ...]  # recognised, with the tokens that begin and end a text around it
    ends: frozenset[int]
    marks: frozenset[str]  # texts of the tokens that it takes for special, some by their text alone


def ask_llama_cpp(path: Path, texts: Sequence[str]) -> LlamaTokens:
    """Tokenizes texts with the vocabulary of a GGUF file; no weight is loaded.

    Raises:
        InputError: llama.cpp refuses the vocabulary, dies of it, or does not answer in time.
    """
    command = [sys.executable, "-m", "validate.vocabulary.vocabulary_process", str(os.getpid()), str(path)]
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    try:
        result = subprocess.run(
            command, input=json.dumps(texts).encode(), capture_output=True, env=environment, timeout=_TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"{path}: llama.cpp did not cut a page of text in {_TIME_LIMIT} s") from None
    if result.returncode < 0:
        raise InputError(f"{path}: llama.cpp died of the vocabulary ({signal.Signals(-result.returncode).name})")
    if result.returncode > 0 or not result.stdout:
        last = result.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it gave no reason"]
        raise InputError(last[0])
    answer = json.loads(result.stdout.splitlines()[-1])
    modes = {name: tuple(map(tuple, answer[name])) for name in ("parsed", "plain", "whole")}
    return LlamaTokens(**modes, ends=frozenset(answer["ends"]), marks=frozenset(answer["marks"]))


def _answer(path: Path, texts: Sequence[str]) -> dict[str, object]:
    from validate.vocabulary.vocabulary import GgufVocabulary  # loads llama.cpp, which the caller does not need

    vocabulary = GgufVocabulary(path)
    return {
        "parsed": [vocabulary.encode(text, add_special_tokens=False, parse_special=True) for text in texts],
        "plain": [vocabulary.encode(text, add_special_tokens=False, parse_special=False) for text in texts],
        "whole": [vocabulary.encode(text, add_special_tokens=True, parse_special=True) for text in texts],
        "ends": sorted(vocabulary.end_tokens),
        "marks": sorted(vocabulary.marks),
    }


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    try:
        sys.stdout.write(f"\n{json.dumps(_answer(Path(sys.argv[2]), json.load(sys.stdin)))}\n")
    except MoeExportError as error:  # the last printed line becomes the message
        sys.exit(str(error))
