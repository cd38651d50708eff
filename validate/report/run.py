"""How to run what was written: commands that can be pasted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from validate.report.facts import Report, find

__all__ = ["llama_cpp_command", "llama_cpp_python_command", "onnx_folder", "onnxruntime_example", "run_instructions"]

_PROMPT = "The history of"
_NEW_TOKENS = 64


def llama_cpp_command(report: Report, path: Path) -> str:
    """The ``llama-cli`` line with the context and cache types that the budget was counted for."""
    cache = str(report["budget"]["kv_type"])
    cache_flags = "" if cache == "f16" else f" -ctk {cache} -ctv {cache}"
    return f'llama-cli -m {shlex.quote(str(path))} -c {report["budget"]["context"]}{cache_flags} -p "{_PROMPT}"'


def llama_cpp_python_command(report: Report, path: Path) -> str:
    """The same through llama-cpp-python, in one line of shell."""
    code = (
        "from llama_cpp import Llama; "
        f"print(Llama({json.dumps(str(path))}, n_ctx={report['budget']['context']}, verbose=False)"
        f'("{_PROMPT}", max_tokens={_NEW_TOKENS})["choices"][0]["text"])'
    )
    return f"python -c {shlex.quote(code)}"


def onnxruntime_example(folder: Path) -> str:
    """Generates through onnxruntime-genai, ONNX Runtime's own generation loop."""
    return "\n".join(
        (
            "import onnxruntime_genai as genai  # pip install onnxruntime-genai",
            f"model = genai.Model({json.dumps(str(folder))})",
            "tokenizer, generator = genai.Tokenizer(model), genai.Generator(model, genai.GeneratorParams(model))",
            f"generator.append_tokens(tokenizer.encode({json.dumps(_PROMPT)}))",
            f"while not generator.is_done() and generator.token_count() < {_NEW_TOKENS}:",
            "    generator.generate_next_token()",
            "print(tokenizer.decode(generator.get_sequence(0)))",
        )
    )


def run_instructions(report: Report, out: Path) -> str:
    """What to type to run the files of a finished run.

    Args:
        report: the content of report.json.
        out: the output folder, as the person at the keyboard names it.

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
            paragraphs.append("Run the ONNX folder:\n" + onnxruntime_example(onnx_folder(path)))
    return "\n\n".join(paragraphs)


def onnx_folder(path: Path) -> Path:
    """The folder of an ONNX artifact, whose path may name the graph inside it."""
    return path.parent if path.suffix == ".onnx" else path
