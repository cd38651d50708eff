"""Making experts smaller or simpler inside, their number unchanged: fewer neurons, zeros, fewer bits.

:class:`SlimWidth` is the only one that makes a file smaller. The others are published methods to compare with, in
torch: their weights are float32 with zeros or on a 4-bit grid, and the containers gain nothing from them beyond what
their own quantization gains.
"""

from compressors.slim.awq import Awq
from compressors.slim.gptq import Gptq
from compressors.slim.rounding import RoundToNearest
from compressors.slim.sparsegpt import SparseGpt
from compressors.slim.sparsity import Pattern
from compressors.slim.wanda import Wanda
from compressors.slim.width import GGUF_WIDTH_MULTIPLE, SlimWidth, check_width

__all__ = [
    "GGUF_WIDTH_MULTIPLE",
    "Awq",
    "Gptq",
    "Pattern",
    "RoundToNearest",
    "SlimWidth",
    "SparseGpt",
    "Wanda",
    "check_width",
]
