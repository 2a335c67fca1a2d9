"""What this machine is and how it is set: a time means little without its clocks and its mode.

Read, never changed. What cannot be read is left out.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ... import __version__
from ...runtime.hardware import ROOT, cores, processor

LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-bindings", "numpy")
ASK_SECONDS = 10


def machine_facts(root: Path = ROOT) -> dict[str, Any]:
    """Processor, memory, load, clocks, power mode and versions; ``root`` is for tests."""
    facts = {
        "processor": processor(root),
        "board": _board(root),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "clocks": clocks(root),
        "power_mode": power_mode(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"visistage": __version__, **_versions()},
    }
    return {name: value for name, value in facts.items() if value not in (None, {}, "")}


def clocks(root: Path = ROOT) -> dict[str, Any]:
    """Governor and MHz of every clock domain that the kernel shows: cores, and a Jetson's GPU."""
    out: dict[str, Any] = {}
    for name, pattern, unit in (
        ("cpu", "sys/devices/system/cpu/cpufreq/policy*", 1e3),  # kHz
        ("devfreq", "sys/class/devfreq/*", 1e6),  # Hz
    ):
        for folder in sorted(root.glob(pattern)):
            facts = {
                "governor": _word(folder / f"{'scaling_' * (name == 'cpu')}governor"),
                **{
                    f"{which}_mhz": _scaled(folder / f"{'scaling_' * (name == 'cpu')}{file}", unit)
                    for which, file in (
                        ("now", "cur_freq"),
                        ("min", "min_freq"),
                        ("max", "max_freq"),
                    )
                },
            }
            facts = {key: value for key, value in facts.items() if value is not None}
            if facts:
                out[f"{name}.{folder.name}"] = facts
    return out


def power_mode() -> str | None:
    """A Jetson's, as ``nvpmodel -q`` names it; None elsewhere."""
    command = shutil.which("nvpmodel") or shutil.which("nvpmodel", path="/usr/sbin")
    if command is None:
        return None
    try:
        done = subprocess.run(
            [command, "-q"], capture_output=True, text=True, timeout=ASK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_power_mode(done.stdout)


def parse_power_mode(text: str) -> str | None:
    """``MAXN`` from ``NV Power Mode: MAXN`` and the mode's number on the next line."""
    found = re.search(r"NV Power Mode:\s*(\S+)", text)
    return found[1] if found else None


def _board(root: Path) -> str | None:
    text = _text(root / "proc" / "device-tree" / "model")
    return text.strip("\0 \n") if text else None


def _versions() -> dict[str, str]:
    out = {}
    for name in LIBRARIES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def _scaled(file: Path, unit: float) -> float | None:
    word = _word(file)
    return float(word) / unit if word and word.isdecimal() else None


def _word(file: Path) -> str | None:
    text = _text(file)
    return text.strip() if text else None


def _lines(file: Path) -> Iterable[str]:
    return (_text(file) or "").splitlines()


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
