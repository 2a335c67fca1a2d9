"""Calls that flush denormals to zero, in a thread that is left as it was.

A processor multiplies denormal numbers many times slower than others, and attention under a mask is
full of them (docs/cpu.md). Flushing is a mode of a thread; what else a program computes there,
NumPy's arithmetic included, must not change because it answers questions about images too. ONNX
Runtime's own switch sets the mode of the thread that makes a process's first session, for good.

The mode is a bit of the floating-point environment (C11 7.6, ``fenv.h``), here in Linux's layout.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

Given = ParamSpec("Given")
Result = TypeVar("Result")

BITS = {
    # machine: (32-bit word of fenv_t, bits in it)
    "x86_64": (7, 1 << 15 | 1 << 6),  # MXCSR, after the x87's 28 bytes: FTZ, DAZ
    "aarch64": (0, 1 << 24),  # FPCR: FZ
}
Environment = ctypes.c_uint32 * 16  # twice what either fenv_t takes


def flushed(call: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """Return ``call(...)``, flushing in this thread as long as it runs, where that can be done."""
    if not AVAILABLE:
        return call(*args, **kwargs)
    before = Environment()
    _c.fegetenv(before)
    _flush(before)
    try:
        return call(*args, **kwargs)
    finally:
        _c.fesetenv(before)


def _flush(before: ctypes.Array[ctypes.c_uint32]) -> None:
    inside = Environment.from_buffer_copy(before)
    inside[_word] |= _bits
    _c.fesetenv(inside)


def _available() -> bool:
    """Return whether the bits work here: tried once, as the module is imported."""
    if platform.machine() not in BITS or not hasattr(_c, "fesetenv"):
        return False
    before = Environment()
    _c.fegetenv(before)
    denormal = np.full(1, 1e-40, np.float32)
    try:
        _flush(before)
        zero = denormal * np.float32(0.5)
    finally:
        _c.fesetenv(before)
    return not zero.any() and bool((denormal * np.float32(0.5)).any())


_c: Any = ctypes.PyDLL(None) if sys.platform == "linux" else None  # the interpreter's own libm
_word, _bits = BITS.get(platform.machine(), (0, 0))
AVAILABLE = _available()
