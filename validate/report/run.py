"""Commands to paste that run the written files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from compressors.model.files.gguf.kv_types import KV_TYPES, is_quantized
from validate.report.facts import Report, find

__all__ = [
    "genai_example",
    "llama_cpp_command",
    "llama_cpp_python_command",
    "ollama_commands",
    "onnx_folder",
    "onnxruntime_example",
    "optimum_example",
    "run_instructions",
    "where_the_rest_is",
]

_PROMPT = "The history of"
_NEW_TOKENS = 64


def llama_cpp_command(report: Report, path: Path) -> str:
    """The ``llama-cli`` line with the context and cache types that the budget was counted for, and drafts by MTP."""
    cache = str(report["budget"]["kv_type"])
    cache_flags = "" if cache == "f16" else f" -ctk {cache} -ctv {cache}"
    drafts = " --spec-type draft-mtp" if find(report, "recipe", "source", "keep_mtp") else ""
    return f'llama-cli -m {shlex.quote(str(path))} -c {report["budget"]["context"]}{cache_flags}{drafts} -p "{_PROMPT}"'


def llama_cpp_python_command(report: Report, path: Path) -> str:
    """The command for llama-cpp-python, in one line of shell; quantized values need flash attention there."""
    cache = str(report["budget"]["kv_type"])
    number = int(KV_TYPES[cache])
    types = "" if cache == "f16" else f", type_k={number}, type_v={number}"
    flash = ", flash_attn=True" if is_quantized(cache) else ""
    code = (
        "from llama_cpp import Llama; "
        f"print(Llama({json.dumps(str(path))}, n_ctx={report['budget']['context']}{types}{flash}, verbose=False)"
        f'("{_PROMPT}", max_tokens={_NEW_TOKENS})["choices"][0]["text"])'
    )
    return f"python -c {shlex.quote(code)}"


def ollama_commands(report: Report, path: Path, n_parts: int = 1) -> str:
    """Three lines of shell that give the file to Ollama, with the context that the budget was counted for.

    Ollama reads no parts: llama.cpp's own tool makes them one file before.
    """
    whole = path if n_parts == 1 else path.with_name(f"{path.stem.removesuffix(f'-00001-of-{n_parts:05}')}.gguf")
    merge = [shlex.join(["llama-gguf-split", "--merge", str(path), str(whole)])] if n_parts > 1 else []
    name = whole.stem.lower()
    lines = (f"FROM ./{whole}", f"PARAMETER num_ctx {report['budget']['context']}")
    return "\n".join(
        (
            *merge,
            f"printf '%s\\n' {shlex.join(lines)} > Modelfile",
            f"ollama create {shlex.quote(name)} -f Modelfile",
            f'ollama run {shlex.quote(name)} "{_PROMPT}"',
        )
    )


def onnxruntime_example(report: Report, folder: Path) -> str:
    """Three lines of Python that predict the next token with plain ONNX Runtime, from an empty cache.

    Where layers differ in their caches, the graph says how large these are. The runtime is told not to warn of the
    input that may be left out.
    """
    heads, width = find(report, "source", "n_kv_heads"), find(report, "source", "head_dim")
    empty = "(1, i.shape[1], 0, i.shape[3])" if heads is None else f"(1, {heads}, 0, {width})"
    if find(report, "source", "n_recurrent_layers"):
        empty = f'(1, *i.shape[1:]) if "state" in i.name else {empty}'
    model, tokenizer = json.dumps(str(folder / "model.onnx")), json.dumps(str(folder / "tokenizer.json"))
    return "\n".join(
        (
            "import numpy as np, onnxruntime, tokenizers; onnxruntime.set_default_logger_severity(3); "
            f"session, tokenizer = onnxruntime.InferenceSession({model}), tokenizers.Tokenizer.from_file({tokenizer})",
            f"ids = np.array([tokenizer.encode({json.dumps(_PROMPT)}).ids]); "
            f"feeds = {{i.name: np.zeros({empty}, np.float32) "
            'if "past" in i.name else np.ones_like(ids) for i in session.get_inputs()}',
            'print(tokenizer.decode([session.run(["logits"], feeds | {"input_ids": ids})[0][0, -1].argmax()]))',
        )
    )


def genai_example(folder: Path) -> str:
    """Lines of Python that continue a prompt with onnxruntime-genai."""
    return "\n".join(
        (
            f"import onnxruntime_genai as og; model = og.Model({json.dumps(str(folder))}); "
            "tokenizer = og.Tokenizer(model)",
            "parameters = og.GeneratorParams(model); "
            f"ids = tokenizer.encode({json.dumps(_PROMPT)}); "
            f"parameters.set_search_options(max_length=len(ids) + {_NEW_TOKENS})",
            "generator = og.Generator(model, parameters); generator.append_tokens(ids)",
            "while not generator.is_done(): generator.generate_next_token()",
            "print(tokenizer.decode(generator.get_sequence(0)))",
        )
    )


def optimum_example(folder: Path) -> str:
    """Lines of Python that continue a prompt with optimum's ``ORTModelForCausalLM``."""
    place = json.dumps(str(folder))
    return "\n".join(
        (
            "from optimum.onnxruntime import ORTModelForCausalLM; from transformers import AutoTokenizer",
            f"model, tokenizer = ORTModelForCausalLM.from_pretrained({place}, use_io_binding=False), "
            f"AutoTokenizer.from_pretrained({place})",
            f"ids = tokenizer({json.dumps(_PROMPT)}, return_tensors='pt')",
            f"print(tokenizer.decode(model.generate(**ids, max_new_tokens={_NEW_TOKENS})[0]))",
        )
    )


def run_instructions(report: Report, out: Path) -> str:
    """Returns the commands that run the files of a finished run.

    Args:
        report: the content of report.json.
        out: the output folder, as the user named it.

    Returns:
        One paragraph per written file; empty if nothing was written.
    """
    paragraphs = []
    for artifact in find(report, "artifacts") or []:
        path = out / artifact["path"]
        if artifact["format"] == "gguf":
            commands = (llama_cpp_command(report, path), llama_cpp_python_command(report, path))
            paragraphs.append("\n".join(("Run the GGUF file:", *commands)))
        else:
            example = onnxruntime_example(report, onnx_folder(path))
            paragraphs.append(f"Run the ONNX folder (Python; onnxruntime-genai loads it too):\n{example}")
    return "\n\n".join(paragraphs)


def where_the_rest_is(reports: Mapping[str, Report], out: Path) -> str:
    """Says which files show all figures, and which say how to run the result.

    Args:
        reports: the report of each output, by the name of its folder below ``out``; a single output's name is empty.
        out: the output folder, as the user named it.
    """
    pages = ", ".join(str(out / name / "report.html") for name in reports)
    cards = ", ".join(str(out / name / "README.md") for name in reports)
    return f"All figures, with intervals and floors: {pages}\nHow to run the files: {cards}"


def onnx_folder(path: Path) -> Path:
    """The folder of an ONNX artifact, whose path may name the graph inside it."""
    return path.parent if path.suffix == ".onnx" else path
