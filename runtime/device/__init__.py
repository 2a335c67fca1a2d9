"""Bundles on a device: rows, caches and selections stay there from pixels to logits.

``protocol`` says what is asked of a device and of an engine; ``cuda`` and ``host`` are two devices,
``engine_trt`` and ``engine_ort`` two kinds of engines; the rest knows neither of them.
"""
