"""Facts of this machine and its settings: a time means little without clocks and power mode.

Read, never changed. What cannot be read is left out.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ... import __version__
from ...runtime.hardware import ROOT, cores, processor

LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-bindings", "numpy")
ASK_SECONDS = 10
CLOCK_DOMAINS = (  # name, folders, prefix of their files, units in a MHz
    ("cpu", "sys/devices/system/cpu/cpufreq/policy*", "scaling_", 1e3),
    ("devfreq", "sys/class/devfreq/*", "", 1e6),
)


def machine_facts(root: Path = ROOT) -> dict[str, Any]:
    """Return processor, memory, load, clocks, power mode and versions; ``root`` is for tests."""
    facts = {
        "processor": processor(root),
        "board": _word(root / "proc" / "device-tree" / "model"),
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
    """Return governor and MHz of every clock domain of the kernel: cores, and a Jetson's GPU."""
    out: dict[str, Any] = {}
    for name, pattern, prefix, unit in CLOCK_DOMAINS:
        for folder in sorted(root.glob(pattern)):
            facts: dict[str, Any] = {"governor": _word(folder / f"{prefix}governor")}
            for which in ("cur", "min", "max"):
                number = _word(folder / f"{prefix}{which}_freq") or ""
                mhz = float(number) / unit if number.isdecimal() else None
                facts[f"{which.replace('cur', 'now')}_mhz"] = mhz
            facts = {key: value for key, value in facts.items() if value is not None}
            if facts:
                out[f"{name}.{folder.name}"] = facts
    return out


def power_mode() -> str | None:
    """Return a Jetson's power mode, as ``nvpmodel -q`` names it; None elsewhere."""
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
    """Return ``MAXN`` of ``NV Power Mode: MAXN`` and the mode's number on the next line."""
    found = re.search(r"NV Power Mode:\s*(\S+)", text)
    return found[1] if found else None


def machine_line(machine: dict[str, Any]) -> str:
    """Say processor or board, threads, clocks, power mode, and how busy it was."""
    parts = [machine.get("board") or machine["processor"], f"{machine['threads']} threads"]
    if "power_mode" in machine:
        parts.append(f"power mode {machine['power_mode']}")
    parts += clock_words(machine.get("clocks", {}))
    if "load_average" in machine:
        parts.append(f"load {machine['load_average']}")
    return ", ".join(parts)


def clock_words(clocks: dict[str, dict[str, Any]]) -> list[str]:
    """Say the clock domains of a kind together: ``cpu 1190 to 2265 MHz (schedutil)``."""
    words = []
    for kind in dict.fromkeys(name.partition(".")[0] for name in clocks):
        own = [facts for name, facts in clocks.items() if name.partition(".")[0] == kind]
        mhz = sorted({round(facts["now_mhz"]) for facts in own if "now_mhz" in facts})
        governors = sorted({facts["governor"] for facts in own if "governor" in facts})
        ends = dict.fromkeys((mhz[0], mhz[-1])) if mhz else ()
        text = f"{kind} {' to '.join(map(str, ends))} MHz" if mhz else kind
        words.append(f"{text} ({', '.join(governors)})" if governors else text)
    return words


def _versions() -> dict[str, str]:
    out = {}
    for name in LIBRARIES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def _word(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip("\0 \n") or None
    except OSError:
        return None
