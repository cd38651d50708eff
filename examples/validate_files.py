"""Measures a published folder, or anybody's GGUF or ONNX file, against the original.

python examples/validate_files.py out
python examples/validate_files.py their.gguf Qwen/Qwen3-30B-A3B
"""

from __future__ import annotations

import sys

from exporter import validate


def main(path: str, against: str | None = None) -> None:
    """Prints the figures of each file, and the faults that were found."""
    found = validate(path, against=against)
    for row in found["rows"]:
        if row["error"] is not None:  # its runtime died; the failures say how
            continue
        print(f"{row['artifact']} in {row['runtime']}: perplexity {row['perplexity']:.2f}")
    for failure in found["failures"]:
        print(f"failed: {failure}")
    print("passed" if found["passed"] else "not passed")


if __name__ == "__main__":  # each runtime runs in a process of its own, which imports this script
    main(*sys.argv[1:3])
