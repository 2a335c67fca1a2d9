"""Power while something runs, sampled beside it; or the reason why there is none.

    with Meter.find() as meter:
        ...
    meter.joules(start, stop)

A sensor is slower than a short answer: energy is stated only of what lasts several samples.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .rails import Ina3221, JetsonStats, Nvml, PowerSample, parse_tegrastats

INTERVAL = 0.1
"""Seconds between samples."""

LEAST_SAMPLES = 3
"""Samples that what is measured must last, else its energy would be its neighbours'."""


@dataclass
class Meter:
    """Samples with their times; ``reason`` says why there are none."""

    source: Any = None
    reason: str | None = None
    interval: float = INTERVAL
    samples: list[tuple[float, PowerSample]] = field(default_factory=list)

    @classmethod
    def find(cls, root: Path = Path("/")) -> Meter:
        """The first source that this machine has."""
        tried = []
        for name, make in (
            ("tegrastats", lambda: Tegrastats()),
            ("ina3221 sensors in sysfs", lambda: _with_channels(Ina3221(root))),
            ("jetson-stats", lambda: _installed("jtop", JetsonStats)),
            ("NVML", lambda: _installed("pynvml", Nvml)),
        ):
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
        """Energy between two times; None where samples are too few or do not cover it."""
        if stop - start < LEAST_SAMPLES * self.interval:
            return None
        return energy([(at, one.total_mw) for at, one in self.samples if one.rails], start, stop)

    def rails_mw(self) -> dict[str, float]:
        """Mean of every rail over the whole time."""
        names = list(dict.fromkeys(name for _, one in self.samples for name in one.rails))
        return {
            name: _mean([s.rails[name] for _, s in self.samples if name in s.rails])
            for name in names
        }

    def peak_memory_bytes(self) -> int | None:
        """Most memory that the source saw in use, by everybody; None where it sees none."""
        seen = [one.memory_bytes for _, one in self.samples if one.memory_bytes is not None]
        return max(seen, default=None)


def energy(samples: Sequence[tuple[float, float]], start: float, stop: float) -> float | None:
    """Joules between two times from (seconds, milliwatts), straight lines between samples.

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
        """The next line's; waits for it."""
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


def _with_channels(sensors: Ina3221) -> Ina3221:
    if not sensors.channels:
        raise FileNotFoundError("none")
    return sensors


def _installed(module: str, make: Any) -> Any:
    if importlib.util.find_spec(module) is None:
        package = {"jtop": "jetson-stats", "pynvml": "nvidia-ml-py"}[module]
        raise ImportError(f"{package} is not installed")
    return make()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
