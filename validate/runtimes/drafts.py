"""Drafts texts with a written file in its runtime, in a process of the runtime's own.

    python -m validate.runtimes.drafts PARENT SECONDS gguf|onnx PATH MEMORY OPTIONS

holds itself to MEMORY bytes while it maps the file (null: to none), reads requests from standard input, in each line a
JSON list of the memory that it has now and the :class:`Wish` objects, and prints the drafts for each. Between requests
it keeps no pages of the file if there is a limit. If the runtime crashes, only this process dies; if a step takes
longer than SECONDS, it is ended; and it ends when process PARENT, which started it, is gone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from compressors.model.errors import MoeExportError
from validate.metrics.generation import greedy, sampled
from validate.runtimes import time_limit
from validate.runtimes.backend import ChooseToken
from validate.runtimes.cost import own_bytes
from validate.runtimes.last_words import telling_line
from validate.runtimes.lifetime import end_with_parent
from validate.runtimes.mapped_pages import hold_to, rest
from validate.runtimes.measure import artifact_bytes

__all__ = ["Drafter", "Wish"]


@dataclass(frozen=True)
class Wish:
    """A text for which a draft is wanted."""

    text: int  # its number among all texts
    tokens: Sequence[int]
    most: int  # tokens to draft
    prompt: int | None = None  # the prompt whose random numbers draw the tokens; None: the most probable are taken
    place: int = 0  # of the first token to draft, after the prompt
    temperature: float = 1.0  # of the draw

    @property
    def choose(self) -> ChooseToken:
        """The choice of the next tokens."""
        return greedy if self.prompt is None else sampled(self.prompt, self.place, self.temperature)


Drafts = list[list[int]]


class Drafter:
    """A process with a file's runtime that drafts texts. A runtime that dies gives no more drafts, which is no error.

    Attributes:
        error: the reason why there are no more drafts; None while there are.
        own_bytes: memory of the process with the opened file, without pages that it maps; 0 if it died.

    Args:
        artifact: ``gguf`` or ``onnx``.
        path: the GGUF file, or the folder of the ONNX model.
        n_texts: the number of texts.
        n_tokens: the most tokens of a text.
        threads: the runtime's threads.
        memory_bytes: what this process and the one that drafts are held to together if that maps the file
            (:func:`validate.runtimes.mapped_pages.hold_to`); None: there is no limit.
    """

    def __init__(
        self,
        artifact: str,
        path: Path,
        *,
        n_texts: int,
        n_tokens: int,
        threads: int,
        memory_bytes: int | None = None,
    ) -> None:
        self.error: str | None = None
        self._memory_bytes = memory_bytes
        limit = time_limit.patience(artifact_bytes(artifact, path))
        options = {"n_texts": n_texts, "n_tokens": n_tokens, "threads": threads}
        command = [sys.executable, "-m", "validate.runtimes.drafts", str(os.getpid()), str(limit), artifact]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by __exit__
        self._process = subprocess.Popen(
            [*command, str(path), json.dumps(memory_bytes), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # a debugger would print for half a minute
        )
        self.own_bytes = int(self._read(_OPENED) or 0)

    def __enter__(self) -> Drafter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def draft(self, wishes: Sequence[Wish]) -> Drafts:
        """Drafts for each wish at most as many tokens as it asks for."""
        wanted = [wish for wish in wishes if wish.most > 0]
        if self.error is not None or not wanted:
            return [[] for _ in wishes]
        left = None if self._memory_bytes is None else self._memory_bytes - own_bytes()
        answer = self._ask(json.dumps([left, [asdict(wish) for wish in wanted]]))
        by_text: dict[int, list[int]] = dict(zip([wish.text for wish in wanted], answer, strict=False))
        return [by_text.get(wish.text, []) for wish in wishes]

    def _ask(self, request: str) -> Drafts:
        """The process's answer; none if it is dead."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()
        answer = self._read(_ANSWER)
        return [] if answer is None else json.loads(answer)

    def _read(self, kind: str) -> str | None:
        """The rest of the next line that begins so; None if the process is dead."""
        assert self._process.stdout is not None
        for line in self._process.stdout:  # a library may print lines of its own
            if line.startswith(kind) and line.endswith("\n"):
                return line.removeprefix(kind)
        self.error = self._last_words()
        return None

    def _last_words(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        said = telling_line(self._said.read().decode("utf-8", errors="replace"))
        return f"the process of the runtime that drafts ended with code {code}" + (f": {said}" if said else "")


_OPENED, _ANSWER = "opened:", "drafts:"


def _opened(artifact: str, path: Path, options: dict[str, Any]) -> Callable[[Sequence[Wish]], Drafts]:
    """Loads the file; the runtimes are imported only here."""
    if artifact == "gguf":
        from validate.runtimes.llama_cpp_session import LoadedModel
        from validate.runtimes.llama_cpp_texts import LlamaCppTexts

        texts = LlamaCppTexts(LoadedModel(path), **options)

        def together(wishes: Sequence[Wish]) -> Drafts:
            most = {wish.text: wish.most for wish in wishes}
            choose = {wish.text: wish.choose for wish in wishes}
            return list(texts.extend({wish.text: wish.tokens for wish in wishes}, most, choose).values())

        return together
    from validate.runtimes.onnx import OnnxRuntimeBackend

    backend = OnnxRuntimeBackend(path, threads=options["threads"])
    return lambda wishes: [backend.generate(wish.tokens, wish.most, wish.choose) for wish in wishes]


def _main(artifact: str, path: str, memory_bytes: str, options: str) -> None:
    hold_to(json.loads(memory_bytes))
    draft = _opened(artifact, Path(path), json.loads(options))
    sys.stdout.write(f"\n{_OPENED}{own_bytes()}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        left, wishes = json.loads(line)
        hold_to(left)
        drafts = draft([Wish(**wish) for wish in wishes])
        rest()
        sys.stdout.write(f"\n{_ANSWER}{json.dumps(drafts)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    time_limit.set_limit(float(sys.argv[2]))
    try:
        _main(*sys.argv[3:])
    except MoeExportError as error:  # the last printed line becomes the message
        sys.exit(str(error))
