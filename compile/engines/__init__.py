"""Engines: every graph of a bundle compiled by TensorRT or TensorRT-RTX, on the device or off it.

Needs neither torch nor onnx: this is what ``visistage build`` runs on a board.
"""
