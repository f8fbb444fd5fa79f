"""The ONNX emitter: a legalized module in, `model.onnx` and its data out."""
