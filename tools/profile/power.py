"""Power while something runs, sampled beside it; or the reason why there is none.

    with Meter.find() as meter:
        ...
    meter.joules(start, stop)

A sensor is slower than a short answer: energy is stated only of what lasts several samples. One
reading is one ``PowerSample``, of the first of

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
import importlib.util
import re
import shutil
import subprocess
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

INTERVAL = 0.1
"""Seconds between samples."""

LEAST_SAMPLES = 3
"""Samples that what is measured must last, else its energy would be its neighbours'."""

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
        """Milliwatts that everything draws together."""
        for name in INPUTS:
            if name in self.rails:
                return self.rails[name]
        return sum(mw for name, mw in self.rails.items() if name not in FED)


@dataclass
class Meter:
    """Samples with their times; ``reason`` says why there are none."""

    source: Any = None
    reason: str | None = None
    interval: float = INTERVAL
    samples: list[tuple[float, PowerSample]] = field(default_factory=list)

    @classmethod
    def find(cls, root: Path = Path("/")) -> Meter:
        """Take the first source that this machine has."""
        sources: dict[str, Callable[[], Any]] = {
            "tegrastats": Tegrastats,
            "ina3221 sensors in sysfs": lambda: Ina3221(root),
            "jetson-stats": JetsonStats,
            "NVML": Nvml,
        }
        tried = []
        for name, make in sources.items():
            try:
                return cls(make())
            except Exception as error:  # a library's own errors: whatever it says is the reason
                tried.append(f"{name}: {error}")
        return cls(reason=f"no power sensor can be read ({'; '.join(tried)})")

    def __enter__(self) -> Meter:
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if self.source is not None:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        close = getattr(self.source, "close", None)
        if close is not None:
            close()

    def _sample(self) -> None:
        while not self._stopped.is_set():
            try:
                sample = self.source.read()
            except Exception as error:
                self.reason = f"{self.source.name} stopped answering: {error}"
                return
            self.samples.append((time.perf_counter(), sample))
            self._stopped.wait(self.interval)

    def joules(self, start: float, stop: float) -> float | None:
        """Return the energy between two times; None where samples are too few or end before."""
        if stop - start < LEAST_SAMPLES * self.interval:
            return None
        return energy([(at, one.total_mw) for at, one in self.samples if one.rails], start, stop)

    def rails_mw(self) -> dict[str, float]:
        """Return the mean of every rail over the whole time."""
        every = [sample.rails for _, sample in self.samples]
        names = dict.fromkeys(name for rails in every for name in rails)
        return {name: fmean(rails[name] for rails in every if name in rails) for name in names}

    def peak_memory_bytes(self) -> int | None:
        """Return the most memory that the source saw in use, by all; None where it sees none."""
        seen = [one.memory_bytes for _, one in self.samples if one.memory_bytes is not None]
        return max(seen, default=None)


def energy(samples: Sequence[tuple[float, float]], start: float, stop: float) -> float | None:
    """Return the joules between two times of (seconds, milliwatts), straight between samples.

    None unless samples reach over both ends.
    """
    times = [at for at, _ in samples]
    if not times or times[0] > start or times[-1] < stop:
        return None

    def at(when: float) -> float:
        index = max(1, bisect_left(times, when))
        (t0, p0), (t1, p1) = samples[index - 1], samples[index]
        return p0 + (p1 - p0) * (when - t0) / (t1 - t0)

    points = [
        (start, at(start)),
        *((t, p) for t, p in samples if start < t < stop),
        (stop, at(stop)),
    ]
    areas = [(b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points)]
    return sum(areas) / 1e3


class Tegrastats:
    """JetPack's own tool, as a process that writes one line per interval."""

    name = "tegrastats"

    def __init__(self, command: Sequence[str] | None = None):
        found = shutil.which("tegrastats")
        if command is None and found is None:
            raise FileNotFoundError("not installed (it comes with JetPack)")
        self.process = subprocess.Popen(
            list(command or (str(found), "--interval", str(round(INTERVAL * 1e3)))),
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> PowerSample:
        """Wait for the next line and read it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError("it ended")
        return parse_tegrastats(line)

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(timeout=5)
        assert self.process.stdout is not None
        self.process.stdout.close()


def parse_tegrastats(line: str) -> PowerSample:
    """Read one line of tegrastats; a line without rails gives a sample without."""
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
            real = rail not in IGNORED_RAILS and "sum" not in rail.lower()
            if real and all(file.exists() for file in files):
                self.channels[rail] = files
        if not self.channels:
            raise FileNotFoundError("none")

    def read(self) -> PowerSample:
        """Read all channels now."""
        rails = {}
        for rail, (volts, amperes) in self.channels.items():
            rails[rail] = int(volts.read_text()) * int(amperes.read_text()) / 1000
        return PowerSample(rails)


class JetsonStats:
    """jetson-stats: its service reads the sensors, its package passes them on."""

    name = "jetson-stats"

    def __init__(self, jtop: Any | None = None):
        self.jtop = (jtop or _installed("jtop", "jetson-stats").jtop)()
        self.jtop.start()

    def read(self) -> PowerSample:
        """Return what the service knew last; its own total counts where no rail is an input."""
        self.jtop.ok()
        return parse_jtop(self.jtop.power)

    def close(self) -> None:
        """Let go of the service."""
        self.jtop.close()


def parse_jtop(power: Mapping[str, Any]) -> PowerSample:
    """Read ``{"rail": {name: {"power": mW}}, "tot": {"power": mW}}``."""
    rails = {name: float(facts["power"]) for name, facts in power.get("rail", {}).items()}
    rails = {name: mw for name, mw in rails.items() if name not in IGNORED_RAILS}
    total = power.get("tot", {}).get("power")
    if total is not None and not any(name in rails for name in INPUTS):
        rails["VIN"] = float(total)
    return PowerSample(rails)


class Nvml:
    """The first NVIDIA card, through its driver."""

    name = "NVML"

    def __init__(self, nvml: Any | None = None):
        self.nvml = nvml or _installed("pynvml", "nvidia-ml-py")
        self.nvml.nvmlInit()
        self.handle = self.nvml.nvmlDeviceGetHandleByIndex(0)

    def read(self) -> PowerSample:
        """Read the card's power and memory; a card that does not say its power has no rail."""
        memory = self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used
        try:
            rails = {"GPU": float(self.nvml.nvmlDeviceGetPowerUsage(self.handle))}
        except self.nvml.NVMLError:
            rails = {}
        return PowerSample(rails, int(memory))


def _installed(module: str, package: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{package} is not installed")
    return importlib.import_module(module)
