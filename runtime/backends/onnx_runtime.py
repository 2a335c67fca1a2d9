"""The import of ONNX Runtime, for every module that needs it.

Its builds since 1.29 send events (model, machine, errors) to Microsoft and keep an identifier of
the device below the home folder, unless a variable says otherwise before the import.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

__all__ = ["ort"]
