"""Export: stage modules become ONNX files over weights that stay where they are."""
