"""Checks that an exported folder loads in optimum's ORTModelForCausalLM and generates the right tokens.

optimum-onnx needs transformers 4, which the project itself does not use: run this in an environment of its own.

    python -m venv peers && peers/bin/pip install optimum-onnx==0.1.0 transformers==4.57.6 onnxruntime==1.31.1
    peers/bin/python benchmarks/peers/optimum_onnx.py OUT/onnx expected.json

``expected.json`` holds ``[{"prompt": [token ids], "generated": [token ids]}, ...]``, greedy, from the reference. Every
prompt is run by itself, then all of them as one batch padded on the left, as transformers pads. Prints one JSON
object; the exit code is 1 if any token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main() -> int:
    """Compares, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the exported folder: model.onnx, its data and config.json")
    parser.add_argument("expected", type=Path, help="prompts and the tokens that must follow")
    arguments = parser.parse_args()
    cases = json.loads(arguments.expected.read_text(encoding="utf-8"))
    prompts = [case["prompt"] for case in cases]
    wanted = [case["generated"] for case in cases]
    # Without IO binding, which is the default on a CPU: for model types that it does not list, such as mixtral,
    # optimum 0.1.0 binds an output with a wrong number of key-value heads.
    model = ORTModelForCausalLM.from_pretrained(arguments.folder, use_io_binding=False)
    single = [generate(model, [prompt], len(tokens))[0] for prompt, tokens in zip(prompts, wanted, strict=True)]
    length = min(len(tokens) for tokens in wanted)
    batch = generate(model, prompts, length)
    result = {"single": single == wanted, "left_padded_batch": batch == [tokens[:length] for tokens in wanted]}
    print(json.dumps(result))
    return 0 if all(result.values()) else 1


def generate(model: ORTModelForCausalLM, prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
    """Greedy continuation of all prompts as one batch, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        min_new_tokens=n_tokens,
        max_new_tokens=n_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return output[:, width:].tolist()


if __name__ == "__main__":
    sys.exit(main())
