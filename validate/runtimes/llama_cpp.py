"""llama.cpp as a validation backend, through llama-cpp-python's low-level interface.

Routing is read inside the runtime: the scheduler's evaluation callback gives us the same tensors with which the MoE
layers choose and weigh their experts (:mod:`validate.runtimes.llama_cpp_routing`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt

from compressors.model.files.gguf.kv_types import KV_TYPES, is_quantized
from validate.routing.router_inputs import RouterInputs
from validate.runtimes.backend import ChooseToken, ChunkOutput, RoutingRecord, scored_positions
from validate.runtimes.cost import Feed, RuntimeCost, measure_cost
from validate.runtimes.llama_cpp_routing import RoutingCollector, ggml_function
from validate.runtimes.llama_cpp_session import PHYSICAL_BATCH, LoadedModel, Session, buffers, start_runtime
from validate.runtimes.llama_cpp_texts import LlamaCppTexts

__all__ = [
    "QUANTIZED_KV_TYPES",
    "LlamaCppBackend",
    "exact_kv_type",
    "measure",
]

QUANTIZED_KV_TYPES = tuple(name for name in KV_TYPES if is_quantized(name))
"""Types that are not used to compare a file with torch: their loss is not the file's fault, and reported apart."""


def exact_kv_type(kv_type: str) -> str:
    """The type of cache for comparing a file with torch: f16 in place of a quantized one."""
    return "f16" if kv_type in QUANTIZED_KV_TYPES else kv_type


class LlamaCppBackend:
    """A GGUF file in llama.cpp; implements :class:`validate.runtimes.backend.Backend`.

    Flash attention is on if the cache is quantized, as llama.cpp requires, and off otherwise.
    Weights stay as they are stored: repacked and AMX buffers are off, because llama.cpp dies on virtual machines that
    list the AMX instructions but trap them.

    Raises:
        InputError: the file is missing, llama.cpp cannot load it, or it cannot set up the context.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 512,
        kv_type: str = "f16",
        flash_attention: bool = False,
        threads: int,
        gpu_layers: int = 0,
    ) -> None:
        self._routing = RoutingCollector()
        flash_attention = flash_attention or kv_type in QUANTIZED_KV_TYPES
        flash = api.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._model = LoadedModel(path, gpu_layers)
        self._kv_type, self._flash, self._threads = kv_type, flash, threads
        self._session = Session(
            self._model,
            n_ctx=n_ctx,
            n_batch=n_ctx,
            kv_type=kv_type,
            flash_attention=flash,
            threads=threads,
            callback=self._routing.callback,
        )

    @property
    def runtime(self) -> str:
        """``llama.cpp``."""
        return "llama.cpp"

    @property
    def version(self) -> str:
        """The version of llama-cpp-python and, in brackets, of the ggml inside it."""
        from importlib.metadata import version  # takes as long to import as numpy does

        ggml = ctypes.string_at(ggml_function("ggml_version", ctypes.c_void_p)()).decode()
        commit = ctypes.string_at(ggml_function("ggml_commit", ctypes.c_void_p)()).decode()
        return f"{version('llama-cpp-python')} (ggml {ggml}, {commit})"

    @property
    def vocab_size(self) -> int:
        """The number of logits of one position."""
        return self._model.vocab_size

    @property
    def bos_token(self) -> int | None:
        """The token that llama.cpp puts before a text; None if it puts none."""
        return self._model.bos_token

    def run(self, tokens_BT: npt.NDArray[np.int64]) -> Iterator[ChunkOutput]:
        """Runs every row as a sequence of its own and yields its output, in order; a dense file has no routing.

        Raises:
            InputError: a row is longer than the context, or a token is not in the vocabulary.
        """
        for tokens_T in tokens_BT:
            if self._model.has_experts:
                self._routing.start()
            logits_SV = self._decode_chunk(tokens_T)
            yield ChunkOutput(logits_SV, self._routing.finish(len(tokens_T)) if self._model.has_experts else None)

    def route(self, tokens_BT: npt.NDArray[np.int64], inputs: RouterInputs) -> RoutingRecord:
        """Returns the routers' choices for these chunks when each router is given torch's hidden states.

        The states replace the normalised input of each layer's MoE block while the graph runs, so no router sees the
        effect of earlier layers.

        Raises:
            InputError: the states are of another model, or the graph's routers cannot be fed.
        """
        parts = []
        for chunk, tokens_T in enumerate(tokens_BT):
            self._routing.start(inputs, first=chunk * len(tokens_T))
            self._session.clear()
            with self._routing.without_logits(self._model.n_layers - 1):
                for half_T in np.array_split(tokens_T, 2):  # room for logits is set aside, as in _decode_chunk
                    self._session.decode(half_T, all_logits=True)
            parts.append(self._routing.finish(len(tokens_T)))
        return RoutingRecord.concatenate(parts)

    def _decode_chunk(self, tokens_T: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Runs a chunk as a sequence of its own; returns the logits at the scored positions."""
        self._session.clear()
        self._session.check(tokens_T)
        # logits at all positions, because the last layer's experts only run, and route, where an output is asked for;
        # in halves, so that only half of the logits are in memory at a time: the scored ones come last
        scored = scored_positions(len(tokens_T))
        with self._routing.without_logits(self._model.n_layers - 1):
            self._session.decode(tokens_T[: scored.start], all_logits=True)
        return self._session.decode(tokens_T[scored.start :], all_logits=True)[: scored.stop - scored.start]

    def generate(self, prompt_ids: Sequence[int], n_tokens: int, choose: ChooseToken) -> list[int]:
        """Generates at most ``n_tokens`` tokens after the prompt, each chosen from the logits of the last position."""
        self._session.clear()
        generated: list[int] = []
        logits_TV = self._session.decode(np.asarray(prompt_ids, dtype=np.int64))
        while (token := choose(logits_TV[-1])) is not None:
            generated.append(token)
            if len(generated) == n_tokens:
                break
            logits_TV = self._session.decode(np.asarray(generated[-1:], dtype=np.int64))
        return generated

    def generate_together(
        self, prompts: Sequence[Sequence[int]], n_tokens: int, choose: Sequence[ChooseToken]
    ) -> list[list[int]]:
        """Generates ``n_tokens`` tokens after each prompt, one of every text at a time."""
        longest = max(len(prompt) for prompt in prompts)
        texts = LlamaCppTexts(
            self._model,
            n_texts=len(prompts),
            n_tokens=longest + n_tokens,
            threads=self._threads,
            kv_type=self._kv_type,
            flash_attention=self._flash,
        )
        numbers = range(len(prompts))
        new = texts.extend(dict(enumerate(prompts)), dict.fromkeys(numbers, n_tokens), dict(enumerate(choose)))
        return [new[number] for number in numbers]

    def last_logits(self, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        """Yields for each text the logits of its last ``count`` positions: [count, V], valid until the next one."""
        for text, count in zip(texts, counts, strict=True):
            tokens_T = np.asarray(text, dtype=np.int64)
            self._session.clear()
            self._session.check(tokens_T)
            if count < len(tokens_T):
                self._session.decode(tokens_T[:-count])
            yield self._session.decode(tokens_T[-count:], all_logits=True)


def measure(
    path: Path, *, context: int, kv_type: str, threads: int, prompt_tokens: Sequence[int], gpu_layers: int = 0
) -> RuntimeCost:
    """Runs :func:`validate.runtimes.cost.measure_cost`, and adds the buffers that llama.cpp's log names.

    Flash attention is left to llama.cpp's choice.

    Args:
        path: the GGUF file.
        context: tokens of cache to fill, at least 64.
        kv_type: a key of :data:`~compressors.model.files.gguf.kv_types.KV_TYPES`.
        threads: threads for prompt and generation.
        prompt_tokens: the text to feed, repeated until the context is full.
        gpu_layers: layers on a GPU.

    Raises:
        InputError: the model cannot be loaded, the context is too short or the prompt is empty.
    """

    def load() -> Feed:
        session = Session(
            LoadedModel(path, gpu_layers),
            n_ctx=context,
            n_batch=min(context, PHYSICAL_BATCH),
            kv_type=kv_type,
            flash_attention=api.LLAMA_FLASH_ATTN_TYPE_AUTO,
            threads=threads,
        )
        return lambda tokens_T: session.decode(tokens_T)[-1]

    start_runtime()
    buffers.clear()
    cost = measure_cost(load, context=context, prompt_tokens=prompt_tokens)
    return replace(cost, buffers=buffers.by_purpose, device_bytes=buffers.on_device)
