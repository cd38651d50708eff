"""Our ONNX files in ONNX Runtime beside llama.cpp and torch: speed, size, memory and the time to write them."""
