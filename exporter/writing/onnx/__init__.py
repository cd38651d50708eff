"""Writes a student as an ONNX model that runs in onnxruntime, onnxruntime-genai and ORTModelForCausalLM."""
