"""Plan and checkpoint to ONNX graphs that share one weights file, with the solver as a graph of its own."""
