"""Our backends as a language model of lm-evaluation-harness; needs the extra ``tasks``.

Texts become tokens as in the harness's own ``hf`` model (``lm_eval/models/huggingface.py``), so that a model gets the
same answers wherever it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from compressors.model.errors import InputError
from validate.runtimes.backend import TextModel

__all__ = ["HarnessModel"]

_Request = tuple[Any, Sequence[int], Sequence[int]]  # its identity, context, continuation


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the extra may be missing
    """Answers the harness's three kinds of requests.

    Args:
        model: the model that answers.
        tokenizer: the model's tokenizer, of transformers.
        max_length: tokens of the longest text; longer ones are cut off at the left.
    """

    def __init__(self, model: TextModel, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self._model = model
        self.tokenizer = tokenizer
        self._max_length = max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; for a tokenizer without one, another that no text holds."""
        named = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, self.tokenizer.pad_token_id)
        return next((int(token) for token in named if token is not None), 0)

    @property
    def prefix_token_id(self) -> int:
        """The token put before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns token ids, by default with the special tokens that the tokenizer adds, but without a second BOS."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns for each continuation its log-likelihood, and whether greedy decoding gives it."""
        texts = [[*context, *continuation][-(self._max_length + 1) :][:-1] for _, context, continuation in requests]
        counts = [len(continuation) for _, _, continuation in requests]
        answers = self._model.last_logits(texts, counts)
        return [
            _score(logits_NV, np.asarray(continuation))
            for (_, _, continuation), logits_NV in zip(requests, answers, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, in windows of the model's length."""
        windows: list[_Request] = [
            (index, *make_disjoint_window(window))
            for index, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
        ]
        totals = [0.0] * len(requests)
        for (index, _, _), (likelihood, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the greedy continuation of each prompt, up to its first stop sequence.

        Raises:
            InputError: a task asks for sampling, or for longer answers than the model's context.
        """
        return [self._answer(*request.args) for request in requests]

    def _answer(self, prompt: str, arguments: dict[str, Any]) -> str:
        wanted = normalize_gen_kwargs(arguments)
        if wanted["do_sample"]:
            raise InputError("--tasks: a task asks for sampled answers (do_sample); only greedy ones are compared")
        n_new = int(wanted["max_gen_toks"])
        if n_new >= self._max_length:
            raise InputError(
                f"--tasks: a task asks for answers of {n_new} tokens (max_gen_toks), and the context has "
                f"{self._max_length}; lower it in the task's generation_kwargs"
            )
        end_of_text = self.tokenizer.decode([self.eot_token_id])
        stops = handle_stop_sequences(wanted["until"], eos=end_of_text)
        written: list[int] = []

        def choose(logits_V: npt.NDArray[np.float32]) -> int | None:
            if any(stop and stop in self.tokenizer.decode(written) for stop in stops):
                return None
            written.append(int(logits_V.argmax()))
            return written[-1]

        self._model.generate(self.tok_encode(prompt)[-(self._max_length - n_new) :], n_new, choose)
        answer: str = postprocess_generated_text(self.tokenizer.decode(written), stops, None)
        return answer


def _score(logits_NV: npt.NDArray[np.float32], tokens_N: npt.NDArray[np.int64]) -> tuple[float, bool]:
    logits = logits_NV.astype(np.float64)
    largest_N = logits.max(axis=1)
    normalizer_N = largest_N + np.log(np.exp(logits - largest_N[:, None]).sum(axis=1))
    chosen_N = logits[np.arange(len(tokens_N)), tokens_N]
    return float((chosen_N - normalizer_N).sum()), bool((logits_NV.argmax(axis=1) == tokens_N).all())
