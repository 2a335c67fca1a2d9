"""Bundles on a device: rows, caches and selections stay there from pixels to logits.

``protocol`` describes a device and an engine; ``cuda`` is such a device,
``engine_trt`` and ``engine_ort`` are two kinds of engines; the rest knows none of them.
"""
