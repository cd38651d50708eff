"""Lists the experts that llm-compressor's REAP modifier keeps, given a model and tokens.

llm-compressor needs an older transformers than the project: run this in an environment of its own.

    python -m venv peer && peer/bin/pip install llmcompressor==0.14.0.1
    peer/bin/python benchmarks/peers/llm_compressor_survivors.py MODEL tokens.safetensors 0.5 choice.json

``tokens.safetensors`` holds ``tokens``, int64 [blocks, tokens]: each block is one calibration sample, a batch of its
own. The model computes in float32. ``choice.json`` gets two choices: ``causal``, with the causal mask as part of each
sample, and ``own_mask``, with the attention mask of ones that a tokenizer gives. They should be the same. In 0.14.0.1
they are not: its sequential pipeline has transformers build the mask from a copy of the configuration that no longer
names an attention implementation; the mask is then None, the pipeline's eager attention applies none, and the model is
calibrated with every token seeing the whole block. A mask that is ready to be added is passed on as it is.

A choice is, for each layer in order, the experts that are kept, and every expert's saliency and token count at that
moment.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from pydantic import PrivateAttr
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


class RecordingModifier(REAPPruningModifier):
    """The modifier as it is; what it measured is noted before it prunes and forgets."""

    _measured: dict[str, dict[str, list[float]]] = PrivateAttr(default_factory=dict)

    @property
    def measured(self) -> dict[str, dict[str, list[float]]]:
        """Saliency and token count of every expert, by the name of the MoE block."""
        return self._measured

    def on_sequential_epoch_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Called when all samples went through a layer; the parent prunes it."""
        for name, tracker in self._saliency_trackers.items():
            if tracker.total_count > 0:
                self._measured[name] = {"scores": tracker.mean_saliency.tolist(), "counts": tracker.count.tolist()}
        super().on_sequential_epoch_end(state, event, **kwargs)


def main() -> None:
    """Prunes the model twice, in memory, and writes what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face checkpoint")
    parser.add_argument("tokens", type=Path, help="safetensors file")
    parser.add_argument("sparsity", type=float, help="share of the experts to drop")
    parser.add_argument("out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    tokens_BT = load_file(arguments.tokens)["tokens"]
    length = tokens_BT.shape[1]
    masks = {
        "causal": torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None],  # is added
        "own_mask": torch.ones(1, length, dtype=torch.int64),
    }
    result: dict[str, Any] = {"versions": {name: version(name) for name in ("llmcompressor", "transformers", "torch")}}
    for name, mask in masks.items():
        samples = [{"input_ids": tokens_T[None], "attention_mask": mask} for tokens_T in tokens_BT]
        result[name] = choose(arguments.model, samples, arguments.sparsity)
    arguments.out.write_text(json.dumps(result), encoding="utf-8")


def choose(source: Path, samples: list[dict[str, torch.Tensor]], sparsity: float) -> list[dict[str, list[Any]]]:
    """The modifier's choice for each layer."""
    # oneshot itself splits the fused experts into modules; the peer's loader that does so earlier needs torchvision
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "retained.json"
        modifier = RecordingModifier(sparsity=sparsity, report_path=str(report))
        oneshot(
            model=model,
            tokenizer=str(source),
            dataset=DataLoader(samples, batch_size=None),
            recipe=modifier,
            moe_calibrate_all_experts=False,  # each expert sees the tokens that chose it
        )
        kept = json.loads(report.read_text(encoding="utf-8"))
    in_order = sorted(kept, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    return [{"kept": kept[name], **modifier.measured[name]} for name in in_order]


if __name__ == "__main__":
    main()
