"""The predicted needs of an artifact."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Prediction"]


@dataclass(frozen=True)
class Prediction:
    """Bytes that one artifact needs."""

    file: int  # exact
    weights: int
    kv_cache: int
    compute: int
    reserve: int  # the runtime's own process, measured on this machine

    @property
    def total(self) -> int:
        """Memory at run time."""
        return self.weights + self.kv_cache + self.compute + self.reserve

    def counted(self, kind: str) -> int:
        """The bytes that the budget counts: the ``file``, or the ``total`` memory at run time."""
        return self.file if kind == "file" else self.total
