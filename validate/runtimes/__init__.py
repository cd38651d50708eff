"""The three runtimes that compute a model, behind one interface: torch, llama.cpp and ONNX Runtime.

Memory, speed and the limits on time are measured where they run.
"""
