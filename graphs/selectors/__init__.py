"""Entry selectors: which of an image's visual rows enter the decoder. NumPy only, on the host."""
