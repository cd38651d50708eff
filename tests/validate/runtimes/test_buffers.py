"""llama.cpp's log lines, as it prints them with a GPU; the lines of a CPU are read in test_llama_cpp.py."""

from __future__ import annotations

from validate.runtimes.buffers import ReportedBuffers

_LOG = """
load_tensors: offloading 12 repeating layers to GPU
load_tensors:   CPU_Mapped model buffer size =  2048.50 MiB
load_tensors:        CUDA0 model buffer size =  4096.00 MiB
llama_context:  CUDA_Host  output buffer size =     0.58 MiB
llama_kv_cache:        CPU KV buffer size =    48.00 MiB
llama_kv_cache:        CPU KV buffer size =    16.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =   192.00 MiB
llama_context:      CUDA0 compute buffer size =   100.00 MiB
llama_context:      CUDA0 compute buffer size =   300.00 MiB
llama_context:  CUDA_Host compute buffer size =    12.00 MiB
llama_context: graph nodes  = 1638
"""


def test_buffers_are_summed_by_purpose_and_device() -> None:
    """A model with windows has two caches, of which both count; of a buffer that grows, the last size counts."""
    buffers = ReportedBuffers()
    for line in _LOG.splitlines():
        buffers.read(line + "\n")
    mib = 2**20
    assert buffers.by_purpose == {
        "weights": round(6144.5 * mib),
        "kv_cache": 256 * mib,
        "recurrent_state": 0,
        "compute": 312 * mib,
        "output": round(0.58 * mib),
    }
    assert buffers.on_device == (4096 + 192 + 300) * mib
    buffers.clear()
    assert set(buffers.by_purpose.values()) == {0}
    assert buffers.on_device is None
