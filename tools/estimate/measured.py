"""What was fitted on devices that were measured: ``measured.json``, made by ``bench/fit.py``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fit_peaks import Efficiency

MEASURED_FILE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Measured:
    """Efficiencies of one device in one precision, how wrong they are, and where they are from."""

    efficiency: Efficiency
    validations: list[dict[str, Any]]
    origin: dict[str, Any]

    @property
    def error(self) -> float:
        """The median error of models that the fit had not seen."""
        return next(one["median_error"] for one in self.validations if one["by"] == "model")


def measured(device: str, precision: str, file: Path = MEASURED_FILE) -> Measured | None:
    """What is known of ``device``; None where nobody measured it."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    facts = known.get(device, {}).get(precision)
    if facts is None:
        return None
    return Measured(Efficiency(**facts["efficiency"]), facts["validations"], facts["origin"])
