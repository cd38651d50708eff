"""Prints what a model would give on three machines, and the command that runs it there. Only headers are read.

python examples/fits_machines.py Qwen/Qwen3-30B-A3B
"""

from __future__ import annotations

import sys

from exporter import fits


def main(model: str) -> None:
    """Prints a few lines for each machine."""
    for row in fits(model, machines=["8gb-gpu", "16gb-mac", "32gb-laptop"]):
        if not row["fits"]:
            print(f"{row['machine']}: {row['why']}")
            continue
        expected = row["divergence"]["expected"]
        print(
            f"{row['machine']}: {row['file'] / 1e9:.2f} GB, {row['bits_per_weight']:.1f} bits per weight, "
            f"{row['keeps']}, divergence about {expected:.3f} nats"
        )
        print(f"    {row['run']}")


if __name__ == "__main__":
    main(sys.argv[1])
