"""Lets a model that is read from the disk write texts in few passes: others draft them, and each pass checks drafts.

Speculative decoding (Y. Leviathan et al., Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192).
One pass runs the drafted tokens of all texts; the model's own choice at each of them decides how many are right, and
corrects the first wrong one. A choice depends on nothing but the logits and the place, also where it is drawn by
random numbers, so the texts are those that the model writes alone, for every draft (drafter-invariant, M. Daliri et
al., Coupling without Communication and Drafter-Invariant Speculative Decoding, arXiv 2408.07978).

For that a position's logits must not depend on its company. A drafted position is a row of its own, with the same
number of cached keys in every call, attention is made of plain products, and products take at least 16 rows, in
multiples of 16: from there on the rows of a product do not depend on each other in the libraries that were measured
(MKL; ``benchmarks/texts.py``).

Letters: L different prompts of P positions, N new tokens, n rows, each one position of a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from compressors.model.running.experts import padded_products
from compressors.model.running.masks import SinglePositions
from compressors.model.running.memory import blocks_at_once, position_chunks, rows_at_once
from compressors.model.running.streaming import StreamedModel
from compressors.recover.row_attention import attends_by_text, attention_by_text, padded
from compressors.recover.text_cache import TextCache, cache_bytes

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["ChooseTokens", "Draft", "Effort", "write_texts"]

ChooseTokens = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]
"""(logits [n, V], the text of each row, the place of its next token among the new ones) -> tokens, int64 [n]."""

Draft = Callable[[Sequence[int], Sequence[Sequence[int]], Sequence[int]], Sequence[Sequence[int]]]
"""(texts, the tokens of each so far, the most tokens to draft for each) -> the drafts."""

_MOST_ROWS = 4096  # in one call of a layer: as many tokens as other passes take together
_LONGEST_DRAFT = 32
_STILL_RIGHT = 0.25  # a draft ends where only this share of drafts is expected to be right as a whole
_ROWS_OF_THE_HEAD = 192  # that it runs together: a call of a large head takes as long as 30 rows, whatever it runs
_EXPECTED_RIGHT, _EXPECTED_WRONG = 8, 1  # tokens that count as judged before the first pass


@dataclass(frozen=True)
class Effort:
    """The work that texts took."""

    passes: int  # times that the model was read
    drafted: int  # tokens that were drafted
    accepted: int  # drafted tokens that were right, with all before them


@dataclass
class _Text:
    number: int
    tokens: list[int]
    n_cached: int = 0  # tokens whose keys, values and states in the cache are final
    draft: list[int] = field(default_factory=list)

    @property
    def rows(self) -> list[int]:
        """The tokens that a pass runs."""
        return [*self.tokens, *self.draft][self.n_cached :]

    def add(self, tokens: Sequence[int], ends: Collection[int], n_tokens: int) -> None:
        """Adds tokens; one that ends the text fills it up."""
        for token in tokens:
            self.tokens += [token] * (n_tokens - len(self.tokens) if token in ends else 1)
            if token in ends:
                break


@torch.no_grad()
def write_texts(
    model: StreamedModel,
    prompts_BP: torch.Tensor,
    n_new: int,
    choose: ChooseTokens,
    draft: Draft | None = None,
    *,
    ends: Collection[int] = (),
    progress: Callable[[int], None] = lambda _: None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, Effort]:
    """Continues each prompt by N tokens.

    The texts do not depend on the drafts; without drafts a pass gives one token of each text.

    Keys and values of layers that the model's memory limit has no room for lie on the disk while other layers run.

    Args:
        model: the model that writes.
        prompts_BP: int64 token ids. Equal ones are run once.
        n_new: N.
        choose: picks the next tokens. It must depend on nothing but its arguments.
        draft: guesses how texts go on.
        ends: tokens that end a text; the rest of its tokens are the same.
        progress: called with the number of new tokens after each pass.
        dtype: the dtype of the arithmetic.

    Returns:
        int64 [B, P + N], and the effort.
    """
    writing = _Writing(model, prompts_BP, n_new, choose, dtype)
    n_tokens = prompts_BP.shape[1] + n_new
    texts = [_Text(number, tokens) for number, tokens in enumerate(prompts_BP.tolist())]
    growing, passes, lengths = texts, 0, _DraftLengths()
    while growing:
        if draft is not None:
            lengths.draft(growing, n_tokens, draft)
        n_before = sum(len(text.tokens) for text in texts)
        for text, wanted in zip(growing, writing.wanted_tokens(growing), strict=True):
            n_right = lengths.judge(text.draft, wanted)
            writing.accept(text, n_right)
            text.add(wanted[: n_right + 1], ends, n_tokens)
        passes += 1
        growing = [text for text in growing if len(text.tokens) < n_tokens]
        progress(sum(len(text.tokens) for text in texts) - n_before)
    return torch.tensor([text.tokens for text in texts]), Effort(passes, lengths.drafted, lengths.accepted)


def _cache(model: StreamedModel, n_texts: int, n_tokens: int, dtype: torch.dtype) -> TextCache:
    """A cache with the keys and values of as many layers in memory as its limit has room for."""
    choices = range(model.spec.n_layers, -1, -1)
    sizes = [cache_bytes(model.spec, n_texts, n_tokens, dtype, n_in_memory) for n_in_memory in choices]
    found = model.reserve(sizes)
    spill = None if model.limit is None else model.limit.spill
    return TextCache(n_texts, n_tokens, spill, 0 if found is None else choices[found])


class _DraftLengths:
    """Chooses how many tokens to draft, by the share of drafted tokens that were right so far."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self._n_wrong = 0

    def draft(self, texts: Sequence[_Text], n_tokens: int, draft: Draft) -> None:
        """Gives texts their drafts. The last token of a text needs none: the check of the one before gives it."""
        right = self.accepted + _EXPECTED_RIGHT
        share = right / (right + self._n_wrong + _EXPECTED_WRONG)
        length = min(_LONGEST_DRAFT, max(1, math.floor(math.log(_STILL_RIGHT) / math.log(share))))
        most = [min(length, n_tokens - len(text.tokens) - 1) for text in texts]
        drafts = draft([text.number for text in texts], [text.tokens for text in texts], most)
        for text, tokens, n_most in zip(texts, drafts, most, strict=True):
            text.draft = list(tokens[:n_most])

    def judge(self, draft: Sequence[int], wanted: Sequence[int]) -> int:
        """Counts a draft; returns how many of its first tokens the model wanted."""
        n_right = 0
        while n_right < len(draft) and draft[n_right] == wanted[n_right]:
            n_right += 1
        self.drafted += len(draft)
        self.accepted += n_right
        self._n_wrong += n_right < len(draft)
        return n_right


class _Writing:
    """The passes over the model, for texts that grow by different numbers of tokens."""

    def __init__(
        self, model: StreamedModel, prompts_BP: torch.Tensor, n_new: int, choose: ChooseTokens, dtype: torch.dtype
    ) -> None:
        self._model = model
        self._prompts_BP = prompts_BP
        self._n_tokens = prompts_BP.shape[1] + n_new
        self._choose = choose
        self._dtype = dtype
        self._cache = _cache(model, len(prompts_BP), self._n_tokens, dtype)
        # the different prompts, the one of each text, and a text of each
        self._different_LP, self._prompt_of_B = prompts_BP.unique(dim=0, return_inverse=True)
        prompts = range(len(self._different_LP))
        self._text_of_L = torch.stack([(self._prompt_of_B == prompt).nonzero()[0, 0] for prompt in prompts])
        self._rows_at_once = rows_at_once(model.spec, self._n_tokens)
        self._is_recurrent = any(layer.mixer.state_values for layer in model.spec.layers)

    def wanted_tokens(self, texts: Sequence[_Text]) -> list[list[int]]:
        """Reads the model once; returns what it wants after the last token of each text and each of its draft.

        Behind the first wrong token of a draft the rest may be missing.

        All texts must take part in the first pass, which runs their prompts too.
        """
        is_first = not texts[0].n_cached
        for text in texts:
            text.n_cached = len(text.tokens) if is_first else text.n_cached
        prompts_LPD, states_nD = self._through_layers(_Rows.of(texts), with_prompts=is_first)
        judged = []
        for text, part in zip(texts, states_nD.split([len(text.rows) for text in texts]), strict=True):
            before = [] if prompts_LPD is None else [prompts_LPD[self._prompt_of_B[text.number], -1:]]
            judged.append(torch.cat([*before, part])[-len(text.draft) - 1 :])
            # a state cannot go back to the last right token, so it stays behind the tokens that are known already
            text.n_cached = len(text.tokens)
        return self._chosen(judged, texts)

    def accept(self, text: _Text, n_right: int) -> None:
        """Notes that the first tokens of a text's draft belong to it."""
        text.n_cached += 0 if self._is_recurrent else n_right

    def _through_layers(self, rows: _Rows, *, with_prompts: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Hidden states after the last layer: of the prompts, if they are run, [L, P, D], and of the rows, [n, D]."""
        model = self._model
        prompts_LPD = model.embed(self._different_LP).to(self._dtype) if with_prompts else None
        states_nD = self._embedded(rows.tokens_n)
        for index, weights in model.weights(range(model.spec.n_layers)):
            described = model.spec.layers[index]
            with model.layer(index, weights, self._dtype) as layer:
                experts = None if described.routed is None else layer.get_submodule(described.routed.experts_module)
                with padded_products(experts):
                    if prompts_LPD is not None:
                        self._run_prompts(index, layer, prompts_LPD)
                    for wave_n in rows.waves(one_by_one=described.mixer.state_values > 0):
                        self._run_rows(layer, rows, states_nD, wave_n)
            self._cache.leave(index)
        return prompts_LPD, states_nD

    def _embedded(self, tokens_n: torch.Tensor) -> torch.Tensor:
        if not len(tokens_n):
            return torch.empty(0, self._model.spec.hidden_size, dtype=self._dtype)
        return self._model.embed(tokens_n).to(self._dtype)

    def _run_prompts(self, index: int, layer: nn.Module, prompts_LPD: torch.Tensor) -> None:
        """Takes the different prompts through a layer, in place, and gives each text the keys and values of its own."""
        n_prompts = blocks_at_once(self._dtype)
        for start in range(0, len(prompts_LPD), n_prompts):
            prompts = slice(start, start + n_prompts)
            states = prompts_LPD[prompts].to(self._model.device)
            cache = self._cache.of(self._text_of_L[prompts], 0)
            prompts_LPD[prompts] = self._model.run_layer(layer, states, 0, cache).to("cpu")
        self._cache.repeat(index, self._text_of_L[self._prompt_of_B], prompts_LPD.shape[1])

    def _run_rows(self, layer: nn.Module, rows: _Rows, states_nD: torch.Tensor, wave_n: torch.Tensor) -> None:
        """Takes rows through a layer, in place, and settles the states of texts whose known tokens end there."""
        device, by_text = self._model.device, attends_by_text(layer)
        for part_n in wave_n.split(_MOST_ROWS if by_text else self._rows_at_once):
            padded_n = padded(part_n)
            texts_n = rows.texts_n[padded_n]
            cache = self._cache.at(texts_n, rows.positions_n[padded_n], gathers=not by_text)
            place = SinglePositions(rows.positions_n[padded_n].to(device), self._n_tokens)
            attention = attention_by_text(texts_n.to(device)) if by_text else nullcontext()
            # fused attention on a CPU gives each thread a buffer of its own, and a row's bits depend on its alignment
            with attention, sdpa_kernel(SDPBackend.MATH):
                output = self._model.run_layer(layer, states_nD[padded_n, None].to(device), place, cast("Cache", cache))
            cache.keep()
            states_nD[part_n] = output[: len(part_n), 0].to("cpu")
        self._cache.settle(rows.texts_n[wave_n[rows.is_last_known_n[wave_n]]])

    def _chosen(self, judged: Sequence[torch.Tensor], texts: Sequence[_Text]) -> list[list[int]]:
        """The tokens that the model wants after these states, [n, D] of each text, up to its first wrong one at least.

        The head runs for a few tokens of each text at a time, and no further where one of them is wrong.
        """
        wanted: list[list[int]] = [[] for _ in texts]
        right = list(range(len(texts)))
        with self._model.head(self._dtype) as head:
            while right:
                n_each = max(1, _ROWS_OF_THE_HEAD // len(right))
                rows = [
                    (number, extra)
                    for number in right
                    for extra in range(len(wanted[number]), len(judged[number]))[:n_each]
                ]
                states_nD = torch.stack([judged[number][extra] for number, extra in rows])
                chosen_n = self._after(head, states_nD, [(texts[number], extra) for number, extra in rows])
                for (number, _), token in zip(rows, chosen_n.tolist(), strict=True):
                    wanted[number].append(token)
                right = [
                    number
                    for number in right
                    if len(wanted[number]) < len(judged[number])
                    and wanted[number] == texts[number].draft[: len(wanted[number])]
                ]
        return wanted

    def _after(
        self, head: Callable[[torch.Tensor], torch.Tensor], states_nD: torch.Tensor, owners: Sequence[tuple[_Text, int]]
    ) -> torch.Tensor:
        """The tokens that are chosen after states, each of a text and so many tokens of its draft: int64 [n]."""
        n_prompt, vocab_size, chosen = self._prompts_BP.shape[1], self._model.spec.vocab_size, []
        padded_nD = states_nD[padded(torch.arange(len(states_nD)))]
        for start, part_nD in position_chunks(padded_nD, vocab_size):
            of_part = owners[start : start + len(part_nD)]
            logits_nV = head(part_nD.to(self._model.device)).cpu()[: len(of_part)]
            places = [len(text.tokens) + extra - n_prompt for text, extra in of_part]
            chosen.append(self._choose(logits_nV, [text.number for text, _ in of_part], places))
        return torch.cat(chosen)


@dataclass(frozen=True)
class _Rows:
    """The tokens that a pass runs, each as a row: int64 [n], those of a text side by side."""

    tokens_n: torch.Tensor
    texts_n: torch.Tensor
    positions_n: torch.Tensor
    turns_n: torch.Tensor  # the number of the row among those of its text
    is_last_known_n: torch.Tensor  # bool: the token before a text's draft

    @classmethod
    def of(cls, texts: Sequence[_Text]) -> _Rows:
        """The rows of texts: known tokens that are not cached for good, then the draft."""
        rows = [(text, turn, token) for text in texts for turn, token in enumerate(text.rows)]
        positions = [text.n_cached + turn for text, turn, _ in rows]
        return cls(
            torch.tensor([token for _, _, token in rows], dtype=torch.int64),
            torch.tensor([text.number for text, _, _ in rows], dtype=torch.int64),
            torch.tensor(positions, dtype=torch.int64),
            torch.tensor([turn for _, turn, _ in rows], dtype=torch.int64),
            torch.tensor([at == len(text.tokens) - 1 for at, (text, _, _) in zip(positions, rows, strict=True)]).bool(),
        )

    def waves(self, *, one_by_one: bool) -> Iterator[torch.Tensor]:
        """Yields rows that are run together: all, or each text's first, then each one's second, and so on."""
        n_waves = int(self.turns_n.max()) + 1 if one_by_one and len(self.turns_n) else 1
        for turn in range(n_waves):
            wave_n = (self.turns_n == turn).nonzero()[:, 0] if one_by_one else torch.arange(len(self.turns_n))
            if len(wave_n):
                yield wave_n
