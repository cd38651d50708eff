"""Prints what a model is made of, and which files can hold it. Only headers are read, also of a model on the hub.

python examples/inspect_model.py Qwen/Qwen3-30B-A3B
"""

from __future__ import annotations

import sys

from exporter import inspect


def main(model: str) -> None:
    """Prints a description of the model."""
    described = inspect(model)
    experts = described["experts"]
    print(f"{described['architecture']}: {described['layers']} layers, {described['parameters']:,} parameters")
    print(f"{experts['per_layer']} experts in a layer, {experts['per_token']} for each token: {described['routing']}")
    for container, reason in described["containers"].items():
        print(f"{container}: {reason or 'can hold it'}")


if __name__ == "__main__":
    main(sys.argv[1])
