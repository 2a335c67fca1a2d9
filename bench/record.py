"""Records of measurements: a JSON file with the command, the machine, the date and the rows."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

from ..runtime.hardware import busy_machine
from ..tools.profile.machine import cores, processor

BUSY = busy_machine()
"""Said where a measurement began on a busy machine; None elsewhere."""

RESULTS = Path(__file__).parent / "results"
FOLDERS = ("out", "work")
LIBRARIES = ("visistage", "torch", "transformers", "onnx-ir", "onnxruntime")


dry_option = click.option("--dry", is_flag=True, help="Print the rows and leave the record alone.")


def device_facts() -> dict[str, Any]:
    """Return processor, cores and memory of this machine, without its name."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": processor(),
        "cores": cores(),
        "memory_gib": round(pages / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


def typed_command() -> str:
    """Return the running command with its options, defaults too; folders are not recorded."""
    context = click.get_current_context()
    words = [f"python -m visistage.bench.{Path(sys.argv[0]).stem}"]
    for option in context.command.params:
        value = context.params[option.name or ""]
        if isinstance(value, bool):
            words += [option.opts[0]] if value and option.name != "dry" else []
        elif option.name not in FOLDERS and value is not None:
            each = value if option.multiple else (value,)
            words += [f"{option.opts[0]} {given}" for given in each]
    return " ".join(words)


def save(name: str, rows: Sequence[dict[str, Any]], *, dry: bool = False) -> None:
    """Write ``results/NAME.json`` and print the same document; ``dry``: only print the rows."""
    if BUSY:
        click.echo(BUSY, err=True)
    if dry:
        for row in rows:
            click.echo(json.dumps(row))
        return
    record = {
        "command": typed_command(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device_facts(),
        "versions": {library: metadata.version(library) for library in LIBRARIES},
        **({"busy": BUSY} if BUSY else {}),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    click.echo(json.dumps(record))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the first decile (an undisturbed machine's), the median and the last decile."""
    cut = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"p10": cut[0], "median": median(values), "p90": cut[-1]}
