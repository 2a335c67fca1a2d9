"""What ONNX Runtime must be told so that integer products are computed in integers, exactly.

Measured with 1.31: a product with an addition behind it (a bias, the residual) becomes ``Gemm``
before its rounding is looked at, and then runs in float, from weights that are restored in every
call. Without that one fusion every rounded product runs as ``MatMulIntegerToFloat``.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

NO_GEMM = ("optimization.disable_specified_optimizers", "MatMulAddFusion")

EXACT = ("session.x64quantprecision", "1")
"""On x86 processors without VNNI the fast product of unsigned and signed bytes saturates at 16
bits; with this both are unsigned, which is exact, and slower where it is not needed."""

CPUINFO = Path("/proc/cpuinfo")


def int8_session_entries() -> dict[str, str]:
    """Session configuration for a graph with rounded layers, by entry."""
    return dict([NO_GEMM, *([EXACT] if saturates(platform.machine(), CPUINFO) else [])])


@lru_cache(maxsize=1)
def saturates(machine: str, cpuinfo: Path) -> bool:
    """Whether the processor's byte products may saturate; yes where nothing tells."""
    if machine.lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in cpuinfo.read_text()
    except OSError:
        return True
