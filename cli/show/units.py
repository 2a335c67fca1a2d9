"""Options of the command line that are sizes or shares."""

from __future__ import annotations

import re

import click

_SIZES = {"": 1, "B": 1} | {
    spelling: factor**power
    for power, letter in enumerate("KMGT", start=1)
    for spelling, factor in ((letter, 1024), (f"{letter}IB", 1024), (f"{letter}B", 1000))
}


class ByteSize(click.ParamType):
    """An option such as ``4GiB``, ``512M`` or plain bytes; K, M, G and T count in 1024s."""

    name = "size"

    def convert(self, value, param, ctx) -> int:
        """Return the bytes, or click's error for a wrong option."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip(), re.ASCII)
        unit = match[2].upper() if match else None
        if match is None or unit not in _SIZES or not float(match[1]):
            self.fail(f"{value!r} is no size. Write one like 4GiB, 512MiB or 2000000000.")
        return round(float(match[1]) * _SIZES[unit])


class CanvasParam(click.ParamType):
    """An option such as ``480x640``: a height and a width in pixels."""

    name = "HxW"

    def convert(self, value, param, ctx) -> tuple[int, int]:
        """Return height and width, or click's error for a wrong option."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", value.strip(), re.ASCII)
        if match is None:
            self.fail(f"{value!r} is no height and width. Write them like 480x640.")
        return int(match[1]), int(match[2])


class ShareParam(click.ParamType):
    """An option such as ``1%`` or ``0.01``; a number above 1 without a sign is refused."""

    name = "share"

    def convert(self, value, param, ctx) -> float:
        """Return the share, 0 to 1, or click's error for a wrong option."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", value.strip(), re.ASCII)
        share = float(match[1]) / (100 if match[2] else 1) if match else 2.0
        if share > 1:
            self.fail(f"{value!r} is no share. Write one like 1% or 0.01.")
        return share


class Quantity(click.ParamType):
    """A number with a unit, such as ``20/s`` or ``800ms``; the result is in the first unit."""

    def __init__(self, name: str, units: dict[str, float], example: str):
        self.name, self.units, self.example = name, units, example

    def convert(self, value, param, ctx) -> float:
        """Return the number, above 0, or click's error for a wrong option."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\S*)", value.strip(), re.ASCII)
        if match is None or match[2] not in self.units or not float(match[1]):
            self.fail(f"{value!r} is no {self.name}. Write it like {self.example}.")
        return float(match[1]) * self.units[match[2]]


RATE = Quantity("rate", {"/s": 1.0, "/min": 1 / 60, "/h": 1 / 3600}, "20/s or 600/min")
MILLISECONDS = Quantity("time", {"ms": 1.0, "s": 1e3}, "800ms or 1.5s")
