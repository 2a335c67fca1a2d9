"""ONNX Runtime, imported where it reports to nobody; every module takes it from here.

From 1.29 on its builds send events (model, machine, errors) to Microsoft and keep an identifier of
the device below the home folder, unless this variable says otherwise before the import.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

__all__ = ["ort"]
