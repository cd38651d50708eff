"""The writers: GGUF, ONNX and Hugging Face checkpoints, written piece by piece and able to go on after a kill."""
