"""Compresses a model to a budget as a GGUF file with a mix of llama-quantize, and prints what was measured.

    python examples/export_model.py Qwen/Qwen3-30B-A3B 20GB out

Without ``quant`` the types are searched tensor by tensor, and without ``recover`` the result is trained: both make it
better, and take longer. A call that was interrupted goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

from exporter import Flags, export


def main(model: str, budget: str, out: str) -> None:
    """Writes the folder, and prints the figures of its file."""
    flags = Flags(model=model, budget=budget, out=Path(out), formats="gguf", quant="Q4_K_M", recover="none")
    result = export(flags, announce=print)
    for row in result.report["validation"]:
        if row["artifact"] == "gguf":
            print(f"{row['runtime']}: perplexity {row['perplexity']:.2f}, divergence {row['kld']['mean']:.4f} nats")
    print("passed" if result.exit_code == 0 else f"failed: {', '.join(result.failures)}", result.out, sep=", ")


if __name__ == "__main__":  # stages run in processes of their own, which import this script
    main(*sys.argv[1:4])
