"""The processor under a process: how many of its cores it has, and what it is called."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

ROOT = Path("/")


def cores() -> int:
    """Cores this process may use; macOS cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor(root: Path = ROOT) -> str:
    """Its model, without the machine's name; ``root`` is for tests."""
    with contextlib.suppress(OSError):
        for line in (root / "proc" / "cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
