"""The writers: GGUF, ONNX and Hugging Face checkpoints, written piece by piece and resumable after a kill."""
