"""The import of ONNX Runtime, for every module that needs it.

Its builds since 1.29 send events (model, machine, errors) to Microsoft and keep an identifier of
the device below the home folder, unless a variable says otherwise before the import.
"""

import contextlib
import io
import os
from functools import lru_cache

from ...graphs.errors import MissingDependencyError
from .ort_packages import ABSENT

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    import onnxruntime as ort
except ModuleNotFoundError as error:
    raise MissingDependencyError(ABSENT) from error
if not hasattr(ort, "InferenceSession"):  # a folder that is left when one of two was uninstalled
    raise MissingDependencyError(ABSENT)

__all__ = ["find_cuda_libraries", "ort"]


@lru_cache(maxsize=1)
def find_cuda_libraries() -> str:
    """Load the CUDA libraries that pip installed, which lie on no path, the first time it is asked.

    Returns what ONNX Runtime says about those that it did not find. Whether the provider starts all
    the same, its first session shows.
    """
    said = io.StringIO()
    preload = getattr(ort, "preload_dlls", None)  # older ones have none
    if preload is not None:
        with contextlib.redirect_stdout(said):
            preload()
    return said.getvalue().strip()
