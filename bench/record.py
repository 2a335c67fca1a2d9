"""One way to keep a measurement: a JSON file with what ran, on what, and when."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ..tools.profile.machine import cores, processor

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("visistage", "torch", "transformers", "onnx-ir", "onnxruntime")


def device_facts() -> dict[str, Any]:
    """Processor, cores and memory of this machine, without its name."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": processor(),
        "cores": cores(),
        "memory_gib": round(pages / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


def save(name: str, command: str, rows: list[dict[str, Any]]) -> Path:
    """Write ``results/NAME.json``; the last line of stdout is the same document."""
    record = {
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device_facts(),
        "versions": {library: metadata.version(library) for library in LIBRARIES},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return file
