"""Merging identical experts is exact: double the experts and top-k, merge the pairs, and the model is the same."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressors.calibration.statistics import LayerStatistics
from compressors.shrink.merge import REAM, HCSMoE, MSMoE
from compressors.shrink.moe_block import Evidence, Method, MoeBlock

Blocks = Callable[[Path, int], tuple[MoeBlock, Evidence]]

# at the published group size of 16 the most salient centroid would take in the twins of others too
METHODS: dict[str, Callable[[int], Method]] = {
    "M-SMoE": MSMoE,
    "HC-SMoE": HCSMoE,
    "REAM": partial(REAM, group_size=2),
}


def _first_of_each_pair_leads(statistics: LayerStatistics) -> LayerStatistics:
    """Twins have equal scores, and both or none would be dominant; so that one of each pair is, the first ones lead."""
    n_experts = len(statistics.count_E) // 2
    lead_E = torch.cat([torch.ones(n_experts), torch.zeros(n_experts)]).double()
    count_E = statistics.count_E + lead_E * (statistics.count_E.max() + 1)
    scores_E = statistics.reap_scores() + lead_E * (statistics.reap_scores().max() + 1)
    return replace(statistics, count_E=count_E, gate_norm_sum_E=scores_E * count_E)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_merging_twins_gives_the_block_back(
    trained_block: Blocks, fine_folder: Path, method: Callable[[int], Method]
) -> None:
    """Twins of the methods that align neurons have theirs in another order."""
    block, evidence = trained_block(fine_folder, 3)
    order = torch.arange(block.width)
    if method is not HCSMoE:
        order = torch.randperm(block.width, generator=torch.Generator().manual_seed(7))
    gate_EFD, up_EFD = block.gate_up_EFD.chunk(2, dim=1)
    doubled = MoeBlock(
        block.router_ED.repeat(2, 1),
        torch.cat([block.gate_up_EFD, torch.cat([gate_EFD[:, order], up_EFD[:, order]], dim=1)]),
        torch.cat([block.down_EDF, block.down_EDF[:, :, order]]),
        2 * block.top_k,
        block.routing,
    )
    statistics = _first_of_each_pair_leads(
        replace(
            evidence.statistics,
            count_E=evidence.statistics.count_E.repeat(2),
            gate_norm_sum_E=evidence.statistics.gate_norm_sum_E.repeat(2),
            router_logit_gram_EE=evidence.statistics.router_logit_gram_EE.repeat(2, 2),
        )
    )
    result = method(block.n_experts)(doubled, Evidence(statistics, evidence.sample_TD[:1024]))
    assert result.groups == tuple((expert, expert + block.n_experts) for expert in range(block.n_experts))
    restored = replace(result.block, top_k=block.top_k)
    inputs_TD = evidence.sample_TD[-1024:]
    expected_TD = block.forward(inputs_TD)
    torch.testing.assert_close(doubled.forward(inputs_TD), expected_TD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(restored.forward(inputs_TD), expected_TD, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def doubled_folder(tmp_path_factory: pytest.TempPathFactory, fine_folder: Path) -> Path:
    """The trained model as a checkpoint with every expert and its router row twice, and twice the top-k."""
    folder = tmp_path_factory.mktemp("doubled")
    model = _load(fine_folder, torch.bfloat16)
    config = copy.deepcopy(model.config)
    config.num_experts, config.num_experts_per_tok = 2 * config.num_experts, 2 * config.num_experts_per_tok
    doubled = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = model.state_dict()
    doubled.load_state_dict(
        {
            name: torch.cat([value, value]) if ".experts." in name or name.endswith("mlp.gate.weight") else value
            for name, value in weights.items()
        }
    )
    doubled.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fine_folder / name, folder / name)
    return folder


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def _perplexity(model: Any, tokens_BT: torch.Tensor) -> float:
    return float(model(tokens_BT, labels=tokens_BT).loss.exp())


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_merging_twins_of_a_whole_model_gives_its_perplexity_back(
    trained_block: Blocks,
    fine_folder: Path,
    doubled_folder: Path,
    heldout_tokens: npt.NDArray[np.int64],
    method: Callable[[int], Method],
) -> None:
    tokens_BT = torch.from_numpy(heldout_tokens[: 4 * 256].reshape(4, 256))
    original, doubled = _load(fine_folder), _load(doubled_folder)
    merged = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(fine_folder), dtype=torch.float32).eval()
    # what is not in the blocks is the doubled model's
    merged.load_state_dict(
        {name: value for name, value in doubled.state_dict().items() if ".mlp." not in name}, strict=False
    )
    for index, layer in enumerate(merged.model.layers):
        block, evidence = trained_block(doubled_folder, index)
        if method is not HCSMoE:
            evidence = replace(evidence, statistics=_first_of_each_pair_leads(evidence.statistics))
        result = method(block.n_experts // 2)(block, replace(evidence, inputs_TD=evidence.sample_TD[:512]))
        assert all(first % 32 == second % 32 for first, second in result.groups)
        for parameter, value in (
            (layer.mlp.gate.weight, result.block.router_ED),
            (layer.mlp.experts.gate_up_proj, result.block.gate_up_EFD),
            (layer.mlp.experts.down_proj, result.block.down_EDF),
        ):
            parameter.copy_(value)
    expected = _perplexity(original, tokens_BT)
    assert _perplexity(doubled, tokens_BT) == pytest.approx(expected, rel=1e-3)
    assert _perplexity(merged, tokens_BT) == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(merged(tokens_BT).logits, original(tokens_BT).logits, rtol=1e-3, atol=1e-3)
