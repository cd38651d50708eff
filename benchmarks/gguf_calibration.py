"""Measures what calibration inside llama.cpp would cost where the original is a GGUF file, beside ours in torch.

    python -m benchmarks.gguf_calibration [--type Q8_0] [--blocks 64] [--olmoe]

A checkpoint (the bundled model, or two layers of OLMoE's shape) is written as GGUF. Torch streams its dequantized
layers and gathers the statistics of calibration. llama.cpp runs the same text with a callback that copies all that
these sums need out of the graph, and adds them up; then once more without copying, the least that any such pass costs.
One thread each. It prints CPU seconds, and per layer the difference of REAP's scores and of the experts that stay.
Families whose graph has the nodes below: Qwen3-MoE and OLMoE.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import llama_cpp.llama_cpp as api
import torch

from benchmarks.scale.checkpoints import MODELS, with_layers, write_checkpoint
from compressors.calibration.splits import BlockCounts, read_splits, tokenize
from compressors.calibration.statistics import LayerStatistics, StatisticsCollector
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.gguf_source import GgufSource
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.hub import bundled_text, resolve_model
from exporter.writing.gguf.writer import write_gguf
from validate.runtimes.llama_cpp_routing import node_name, node_values
from validate.runtimes.llama_cpp_session import LoadedModel, Row, Session

_BLOCK, _KEPT = 512, 0.75  # tokens of a block; the share of experts that stays
_EMBEDDED, _END = "embd", "result_norm"
_NODES = "embd|attn_norm|kqv_out|ffn_inp|ffn_norm|ffn_moe_(?:logits|topk|weights|weights_norm|swiglu|down)|l_out"
_NODE = re.compile(rf"({_NODES})(?:-([0-9]+))?")


class _Sums:
    """Adds up one layer after the other from copies of the graph's nodes."""

    def __init__(self, spec: ModelSpec, *, copies: bool) -> None:
        self.statistics = [LayerStatistics.zeros(layer) for layer in spec.layers]
        self.callback = api.ggml_backend_sched_eval_callback(self._visit)
        self._spec = spec
        self._copies = copies
        self._seen: dict[str, torch.Tensor] = {}

    def _visit(self, address: int, ask: bool, _user_data: int) -> bool:
        name = node_name(address)
        if name == _END:
            return bool(ask)  # false afterwards: the graph ends before the head
        matched = _NODE.fullmatch(name)
        if ask or matched is None:
            return not ask or (self._copies and matched is not None)
        self._seen[matched[1]] = torch.from_numpy(node_values(address))
        if matched[1] == "l_out":
            self._add(int(matched[2]))
        return True

    def _add(self, index: int) -> None:
        seen, sums, routed = self._seen, self.statistics[index], self._spec.layers[index].routed
        assert routed is not None
        logits_TE, chosen_TK, inputs_TD = seen["ffn_moe_logits"], seen["ffn_moe_topk"].long(), seen["ffn_norm"]
        gates_TK = seen.get("ffn_moe_weights_norm", seen["ffn_moe_weights"]).reshape(chosen_TK.shape)
        chosen_TE = torch.zeros_like(logits_TE).scatter_(1, chosen_TK, 1.0)
        sums.count_E += chosen_TE.sum(0)
        sums.gate_sum_E += torch.zeros_like(logits_TE).scatter_(1, chosen_TK, gates_TK).sum(0)
        sums.gate_up_input_square_ED += chosen_TE.T @ inputs_TD.square()
        sums.router_logit_gram_EE += logits_TE.T @ logits_TE
        sums.router_probability_sum_E += routed.routing.torch_probabilities(logits_TE).sum(0)
        self._add_experts(sums, chosen_TK.flatten(), gates_TK.flatten())
        sums.input_squares[Role.QUERY] += seen["attn_norm"].square().sum(0)
        sums.input_squares[Role.ATTENTION_OUTPUT] += seen["kqv_out"].square().sum(0)
        output_TD = seen["l_out"]
        sums.n_tokens += len(output_TD)
        for total, before in ((sums.moe_cosine_sum, seen["ffn_inp"]), (sums.block_cosine_sum, seen[_EMBEDDED])):
            total += torch.cosine_similarity(before, output_TD, dim=-1).sum()
        self._seen = {_EMBEDDED: output_TD}

    def _add_experts(self, sums: LayerStatistics, chosen_S: torch.Tensor, gates_S: torch.Tensor) -> None:
        hidden_SF, outputs_SD = (self._seen[name].flatten(0, 1) for name in ("ffn_moe_swiglu", "ffn_moe_down"))
        norms_S = torch.linalg.vector_norm(outputs_SD, dim=-1)
        order = chosen_S.argsort(stable=True)
        experts, counts = chosen_S[order].unique_consecutive(return_counts=True)
        for expert, rows in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
            norms_n, outputs_nD = norms_S[rows], outputs_SD[rows]
            sums.norm_sum_E[expert] += norms_n.sum()
            sums.gate_norm_sum_E[expert] += (gates_S[rows] * norms_n).sum()
            sums.norm_square_sum_E[expert] += norms_n.square().sum()
            sums.norm_max_E[expert] = max(sums.norm_max_E[expert], norms_n.max())
            sums.output_max_E[expert] = max(sums.output_max_E[expert], outputs_nD.abs().max())
            sums.output_sum_ED[expert] += outputs_nD.sum(0)
            sums.down_input_square_EF[expert] += hidden_SF[rows].square().sum(0)


def _by_torch(source: GgufSource, tokens_BT: torch.Tensor) -> list[LayerStatistics]:
    collector, model = StatisticsCollector(source.spec), StreamedModel(Student.teacher(source), check_finite=True)
    groups = [TokenGroup(tokens_BT, [collector.observe])]
    layers = model.advance(groups, model.first_states(groups), range(source.spec.n_layers))
    return [collector.take(layer) for layer in layers]


def _by_llama_cpp(source: GgufSource, tokens_BT: torch.Tensor, *, copies: bool) -> list[LayerStatistics]:
    sums = _Sums(source.spec, copies=copies)
    session = Session(
        LoadedModel(source.path),
        n_ctx=_BLOCK,
        n_batch=_BLOCK,
        kv_type="f16",
        flash_attention=api.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        threads=1,
        callback=sums.callback,
    )
    for block_T in tokens_BT.tolist():
        session.clear()
        session.decode_rows([Row(token, place, wants_logits=True) for place, token in enumerate(block_T)])
    return sums.statistics


@click.command()
@click.option("--type", "type_name", default="Q8_0", show_default=True, help="A mix of llama-quantize.")
@click.option("--blocks", default=64, show_default=True, help=f"Blocks of {_BLOCK} tokens.")
@click.option("--olmoe", is_flag=True, help="Two layers of OLMoE's shape in place of the bundled model.")
def main(type_name: str, blocks: int, olmoe: bool) -> None:
    """Measures and prints."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        source, path = resolve_model(None), Path(name) / "model.gguf"
        if olmoe:
            source = Path(name) / "olmoe"
            write_checkpoint(with_layers(MODELS["olmoe"], 2), source)
        write_gguf(Student.teacher(open_source(source)), type_name, path, name="model", threads=1)
        opened = GgufSource(path)
        splits, counts = read_splits(bundled_text("calibration")), BlockCounts(blocks, 1, 1)
        calibration, *_ = tokenize(splits, opened.tokenizer_folder, _BLOCK, counts)
        tokens_BT = calibration.spread(blocks).tokens_BT
        found = {}
        for side, run in {
            "torch": partial(_by_torch, opened),
            "llama.cpp": partial(_by_llama_cpp, opened, copies=True),
            "llama.cpp, its graph alone": partial(_by_llama_cpp, opened, copies=False),
        }.items():
            run(tokens_BT[:1])  # imports libraries, and reads the file once
            start = time.process_time()
            found[side] = run(tokens_BT)
            print(f"{side}: {time.process_time() - start:.1f} s of CPU for {tokens_BT.numel()} tokens", flush=True)
    _compare(found["torch"], found["llama.cpp"])


def _compare(ours: Sequence[LayerStatistics], theirs: Sequence[LayerStatistics]) -> None:
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        scores, others = one.reap_scores(), other.reap_scores()
        n_kept = int(_KEPT * len(scores))
        kept, also = (set(each.topk(n_kept).indices.tolist()) for each in (scores, others))
        changed = int((one.count_E - other.count_E).abs().sum()) // 2
        by_score = ((scores - others).abs() / scores.clamp_min(1e-9)).max()
        squares, of_others = one.down_input_square_EF, other.down_input_square_EF
        print(
            f"layer {index}: scores differ by up to {by_score:.1e}, at least {changed} of {int(one.count_E.sum())} "
            f"choices, squared inputs of down by {(squares - of_others).norm() / squares.norm():.1e}; "
            f"{len(kept - also)} of the {n_kept} experts that stay are others"
        )


if __name__ == "__main__":
    main()
