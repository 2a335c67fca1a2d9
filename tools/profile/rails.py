"""Where power can be read: a Jetson's sensors, or NVIDIA's driver. One reading is one
``PowerSample``.

    tegrastats          comes with JetPack; one line per interval
    ina3221             the sensors behind it, in sysfs
    jetson-stats        a service and a Python package (jtop)
    NVML                NVIDIA cards, through nvidia-ml-py

Rails are named differently on every board, so none is known by name but those that carry
everything: ``VDD_IN`` (Orin NX and Nano), ``VIN`` (Thor), ``POM_5V_IN`` (older boards). An AGX Orin
has none; there the total is the sum of the rails that no other rail feeds.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INPUTS = ("VDD_IN", "VIN", "POM_5V_IN")
"""Rails through which a board takes all its power."""

FED = ("VDDQ_VDD2_1V8AO",)
"""Rails behind another one that is counted (on an AGX Orin, behind VIN_SYS_5V0)."""

IGNORED_RAILS = ("NC",)
"""Not connected."""

RAIL = re.compile(
    r"\b([A-Z][A-Z0-9_]*)\s+(\d+)(?:mW)?(?:/\d+(?:mW)?)\b|\b(V[A-Z0-9_]+)\s+(\d+)mW\b"
)
"""``VDD_IN 5336/4970`` (JetPack 4 and 5), ``VDD_IN 7421mW/8050mW`` (6 and 7), ``VDD_IN 5765mW``:
now, and the average since the start."""

RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
MEMORY_WORDS = ("RAM", "SWAP", "IRAM")


@dataclass(frozen=True)
class PowerSample:
    """Milliwatts by rail, and bytes of memory in use (a Jetson's GPU shares the board's)."""

    rails: dict[str, float] = field(default_factory=dict)
    memory_bytes: int | None = None

    @property
    def total_mw(self) -> float:
        """What everything draws together."""
        for name in INPUTS:
            if name in self.rails:
                return self.rails[name]
        return sum(mw for name, mw in self.rails.items() if name not in FED)


def parse_tegrastats(line: str) -> PowerSample:
    """One line of tegrastats; a line without rails gives a sample without."""
    rails = {}
    for match in RAIL.finditer(line):
        name = match[1] or match[3]
        if name not in MEMORY_WORDS and name not in IGNORED_RAILS:
            rails[name] = float(match[2] or match[4])
    memory = RAM.search(line)
    return PowerSample(rails, int(memory[1]) << 20 if memory else None)


class Ina3221:
    """The sensors of a Jetson in sysfs: millivolts and milliamperes by channel."""

    name = "ina3221"

    def __init__(self, root: Path = Path("/")):
        self.channels = {}
        for label in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label")):
            number = label.name.removeprefix("in").removesuffix("_label")
            files = (label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input"))
            rail = label.read_text().strip()
            if (
                rail not in IGNORED_RAILS
                and "sum" not in rail.lower()
                and all(f.exists() for f in files)
            ):
                self.channels[rail] = files

    def read(self) -> PowerSample:
        """All channels now."""
        rails = {}
        for rail, (volts, amperes) in self.channels.items():
            rails[rail] = int(volts.read_text()) * int(amperes.read_text()) / 1000
        return PowerSample(rails)


class Nvml:
    """The first NVIDIA card, through its driver."""

    name = "NVML"

    def __init__(self, nvml: Any | None = None):
        self.nvml = nvml or importlib.import_module("pynvml")
        self.nvml.nvmlInit()
        self.handle = self.nvml.nvmlDeviceGetHandleByIndex(0)

    def read(self) -> PowerSample:
        """The card's power and memory now; a card that does not tell its power has no rail."""
        memory = self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used
        try:
            rails = {"GPU": float(self.nvml.nvmlDeviceGetPowerUsage(self.handle))}
        except self.nvml.NVMLError:
            rails = {}
        return PowerSample(rails, int(memory))


class JetsonStats:
    """jetson-stats: its service reads the sensors, its package hands them out."""

    name = "jetson-stats"

    def __init__(self, jtop: Any | None = None):
        self.jtop = (jtop or importlib.import_module("jtop").jtop)()
        self.jtop.start()

    def read(self) -> PowerSample:
        """What the service knew last; its own total counts where boards have no input rail."""
        self.jtop.ok()
        return parse_jtop(self.jtop.power)

    def close(self) -> None:
        """Let go of the service."""
        self.jtop.close()


def parse_jtop(power: Mapping[str, Any]) -> PowerSample:
    """``{"rail": {name: {"power": mW}}, "tot": {"power": mW}}``."""
    rails = {name: float(facts["power"]) for name, facts in power.get("rail", {}).items()}
    rails = {name: mw for name, mw in rails.items() if name not in IGNORED_RAILS}
    total = power.get("tot", {}).get("power")
    if total is not None and not any(name in rails for name in INPUTS):
        rails["VIN"] = float(total)
    return PowerSample(rails)
