"""Published methods that the tables compare with, and the cost of factored experts in a file.

The methods do not change an expert's size: their weights are float32 with zeros or on a 4-bit grid, in torch, and the
containers gain nothing from them beyond their own quantization.
"""

from benchmarks.arms.awq import Awq
from benchmarks.arms.gptq import Gptq
from benchmarks.arms.rounding import RoundToNearest
from benchmarks.arms.sparsegpt import SparseGpt
from benchmarks.arms.sparsity import Pattern
from benchmarks.arms.wanda import Wanda

__all__ = ["Awq", "Gptq", "Pattern", "RoundToNearest", "SparseGpt", "Wanda"]
