"""Published methods that the tables compare with, and what factored experts would cost in a file.

The methods leave an expert's size alone: their weights are float32 with zeros or on a 4-bit grid, in torch, and the
containers gain nothing from them beyond what their own quantization gains.
"""

from benchmarks.arms.awq import Awq
from benchmarks.arms.gptq import Gptq
from benchmarks.arms.rounding import RoundToNearest
from benchmarks.arms.sparsegpt import SparseGpt
from benchmarks.arms.sparsity import Pattern
from benchmarks.arms.wanda import Wanda

__all__ = ["Awq", "Gptq", "Pattern", "RoundToNearest", "SparseGpt", "Wanda"]
