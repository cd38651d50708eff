"""Runs llama.cpp's converter on a checkpoint with the bundled tokenizer: ``convert.py LLAMA_CPP_SOURCES ARGUMENTS``.

The converter knows the splitting expression of a tokenizer by a checksum of what it does to a sample text, and the
bundled vocabulary is not in its list. Its expression is Qwen2's. It stands in for the tokenizers of families that the
converter reads in another way, too.
"""

from __future__ import annotations

import importlib
import runpy
import sys

if __name__ == "__main__":
    sources = sys.argv.pop(1)
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    text_model = importlib.import_module("conversion.base").TextModel
    text_model.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    text_model._set_vocab_sentencepiece = text_model._set_vocab_gpt2
    importlib.import_module("conversion.hunyuan").HunYuanMoEModel.set_vocab = text_model._set_vocab_gpt2
    importlib.import_module("conversion.gemma").Gemma4Model.set_vocab = text_model._set_vocab_gpt2
    sys.argv[0] = f"{sources}/convert_hf_to_gguf.py"
    runpy.run_path(sys.argv[0], run_name="__main__")
