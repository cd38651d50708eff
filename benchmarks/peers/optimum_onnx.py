"""Checks that exported folders load in transformers 4.57 and optimum's ORTModelForCausalLM, and continue texts alike.

optimum-onnx needs transformers 4, which the project itself does not use: run this in an environment of its own.

    python -m venv peers && peers/bin/pip install optimum-onnx==0.1.0 transformers==4.57.6 onnxruntime==1.31.1
    peers/bin/python benchmarks/peers/optimum_onnx.py OUT/onnx ...

Beside each folder lies ``expected.json``, which holds a list of ``{"text": text, "prompt": [token ids], "generated":
[token ids]}``, greedy, from the reference. ``AutoTokenizer`` must cut each text into the prompt's tokens. Every prompt
is run by itself, then all of them as one batch padded on the left, as transformers pads. Prints a JSON object for each
folder; the value of a check that could not run is the error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def main() -> None:
    """Compares each folder and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="exported folders: model.onnx, its data and config.json")
    for folder in parser.parse_args().folders:
        print(json.dumps({"folder": folder.name, **checks(folder)}), flush=True)


def checks(folder: Path) -> dict[str, bool | str]:
    """The outcome of each check of a folder."""
    cases = json.loads((folder.parent / "expected.json").read_text(encoding="utf-8"))
    prompts, wanted = [case["prompt"] for case in cases], [case["generated"] for case in cases]
    length = min(len(tokens) for tokens in wanted)

    def tokenizes() -> bool:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return [tokenizer.encode(case["text"]) for case in cases] == prompts

    def generates_alone() -> bool:
        # Without IO binding, which is the default on a CPU: for model types that it does not list, such as mixtral,
        # optimum 0.1.0 binds an output with a wrong number of key-value heads.
        model = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=False)
        return [generate(model, [prompt], length)[0] for prompt in prompts] == [tokens[:length] for tokens in wanted]

    def generates_as_batch() -> bool:
        model = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=False)
        return generate(model, prompts, length) == [tokens[:length] for tokens in wanted]

    every = {"tokenizer": tokenizes, "single": generates_alone, "left_padded_batch": generates_as_batch}
    return {name: outcome(check) for name, check in every.items()}


def outcome(check: Callable[[], bool]) -> bool | str:
    """The result of a check, or the first line of its error."""
    try:
        return check()
    except Exception as error:  # libraries raise anything for a model that they do not take
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


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
    main()
