"""Words for the quantities of a profile and for the machine it was taken on."""

from __future__ import annotations

from typing import Any

ROW_LABELS = {
    "preprocess": "decode and preprocess",
    "vision": "tower and projector",
    "host": "between the graphs",
    "first_token": "first token",
    "per_token": "each later token",
    "step.host": "  of it between the graphs",
    "total": "whole answer",
}


def row_names(runs: dict[str, Any]) -> list[str]:
    """Every quantity of any bundle, in the order of an answer."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run["cold"]))
    order = {"first_token": 2, "host": 1, "per_token": 3, "total": 9}
    rank = {n: order.get(n, 4 if n.startswith("step.") else 0) for n in names}
    rank["step.host"] = 5
    return sorted(names, key=lambda name: rank[name])


def label(name: str) -> str:
    """A quantity in words."""
    if name in ROW_LABELS:
        return ROW_LABELS[name]
    return f"  of it {name.removeprefix('step.')}" if name.startswith("step.") else name


def machine_line(machine: dict[str, Any]) -> str:
    """Processor or board, threads, clocks, power mode, and how busy it was."""
    parts = [machine.get("board") or machine["processor"], f"{machine['threads']} threads"]
    if "power_mode" in machine:
        parts.append(f"power mode {machine['power_mode']}")
    parts += clock_words(machine.get("clocks", {}))
    if "load_average" in machine:
        parts.append(f"load {machine['load_average']}")
    return ", ".join(parts)


def clock_words(clocks: dict[str, dict[str, Any]]) -> list[str]:
    """Clock domains of a kind together: ``cpu 1190 to 2265 MHz (schedutil)``."""
    words = []
    for kind in dict.fromkeys(name.partition(".")[0] for name in clocks):
        own = [one for name, one in clocks.items() if name.partition(".")[0] == kind]
        mhz = sorted({round(one["now_mhz"]) for one in own if "now_mhz" in one})
        governors = sorted({one["governor"] for one in own if "governor" in one})
        ends = dict.fromkeys((mhz[0], mhz[-1])) if mhz else ()
        text = f"{kind} {' to '.join(map(str, ends))} MHz" if mhz else kind
        words.append(f"{text} ({', '.join(governors)})" if governors else text)
    return words
