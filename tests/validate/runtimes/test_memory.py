"""The memory of validation beside the runtime, with the vocabulary of a large model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.scale.checkpoints import MODELS, write_checkpoint
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf

_VOCABULARY = 151_936
_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
_SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import torch
from validate.runtimes.cost import peak_rss_bytes
from validate.metrics.evaluation import evaluate
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.metrics.logits_file import LogitsFile, LogitsFileWriter

torch.set_num_threads(1)
folder = Path(sys.argv[1])
backend = LlamaCppBackend(folder / "model.gguf", n_ctx=64, threads=1)
tokens_BT = np.random.default_rng(0).integers(0, 4096, (6, 64))
for _ in backend.run(tokens_BT[:1]):
    alone = peak_rss_bytes()
evaluate(backend, tokens_BT, {}, record=LogitsFileWriter(folder / "base.kld", tokens_BT, int(sys.argv[2])))
recorded = peak_rss_bytes()
evaluate(backend, tokens_BT, {"itself": LogitsFile(folder / "base.kld")})
print(alone, recorded, peak_rss_bytes())
"""


def test_a_large_vocabulary_takes_no_memory_beside_the_runtime_s(tmp_path: Path) -> None:
    """The logits of a chunk are 19 MB here; six chunks recorded and compared must not need them again and again."""
    write_checkpoint({**MODELS["qwen3-30b"], **_SMALL, "vocab_size": _VOCABULARY}, tmp_path / "source")
    write_gguf(Student.teacher(open_source(tmp_path / "source")), "Q8_0", tmp_path / "model.gguf", name="x", threads=1)
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path), str(_VOCABULARY)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    alone, recorded, compared = map(int, result.stdout.split()[-3:])
    assert recorded - alone < 100e6
    assert compared - alone < 100e6
