"""The machine under a process: its processor, the cores it may use, the memory it has used."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
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


def peak_memory() -> int:
    """Bytes of the process's largest resident set so far; mapped weights count as far as read."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # no part of Python on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux a child inherits it
    return peak if sys.platform == "darwin" else peak * 1024
