"""torch's translations to ONNX, read once a process instead of once a trace.

``torch.onnx.export`` makes its table of them anew in every call, for which it parses the sources of
some 250 functions twice: half of the time of tracing a small piece (torch 2.13). The table depends
on nothing but the opset, and we add no translations of our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    from torch.onnx._internal.exporter._registration import ONNXRegistry
except ImportError:  # not a public name: where torch has moved it, tracing takes longer
    ONNXRegistry = None

_TABLES: dict[tuple, Any] = {}


@contextmanager
def cached_torchlib_registry() -> Iterator[None]:
    """Traces in here share one table for each opset; nobody else sees it."""
    if not hasattr(ONNXRegistry, "from_torchlib"):
        yield
        return
    own, make = vars(ONNXRegistry)["from_torchlib"], ONNXRegistry.from_torchlib

    def table(*args: Any, **options: Any) -> Any:
        key = (args, *sorted(options.items()))
        if key not in _TABLES:
            _TABLES[key] = make(*args, **options)
        return _TABLES[key]

    ONNXRegistry.from_torchlib = staticmethod(table)
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = own
