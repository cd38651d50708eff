"""Making experts smaller or simpler inside, their number unchanged: fewer neurons, zeros, fewer bits.

:class:`SlimWidth` is the only one that makes a file smaller. The others are published methods to compare with, in
torch: their weights are float32 with zeros or on a 4-bit grid, and the containers gain nothing from them beyond what
their own quantization gains.
"""

from compressors.shrink.slim.awq import Awq
from compressors.shrink.slim.gptq import Gptq
from compressors.shrink.slim.rounding import RoundToNearest
from compressors.shrink.slim.sparsegpt import SparseGpt
from compressors.shrink.slim.sparsity import Pattern
from compressors.shrink.slim.wanda import Wanda
from compressors.shrink.slim.width import GGUF_WIDTH_MULTIPLE, SlimWidth, check_width

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
