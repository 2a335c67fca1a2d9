"""Measurements of plans in a file, so that a calibration that ends early is not lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from ...compile.steps import sources_hash
from ...graphs.errors import DataError
from ...graphs.fields import from_json, read_json
from ...graphs.files import write_file

Measured = TypeVar("Measured")

FOUND = "It is written anew"


class MeasuredFile:
    """The file of one checkpoint and its samples, which ``facts`` name.

    A damaged file counts as none. One that cannot be written is no reason to stop: what
    was measured is still in memory.
    """

    def __init__(self, file: Path, facts: Any):
        self.file = file
        self.facts = json.dumps([sources_hash(), facts], sort_keys=True)
        self._known: dict[str, list[dict[str, Any]]] = {}
        with contextlib.suppress(DataError):
            data = read_json(file, DataError, FOUND) if file.is_file() else {}
            self._known = data if isinstance(data, dict) else {}

    def find(self, key: Any, kind: type[Measured]) -> list[Measured] | None:
        """Return what was measured under ``key``, a dataclass ``kind`` each, if anything was."""
        noted = self._known.get(self._digest(key))
        if not isinstance(noted, list) or not noted:
            return None
        with contextlib.suppress(DataError):
            return [from_json(kind, item, DataError, FOUND) for item in noted]
        return None

    def add(self, key: Any, found: Sequence[Any]) -> None:
        """Keep what was measured under ``key``."""
        self._known[self._digest(key)] = [asdict(measured) for measured in found]
        with contextlib.suppress(OSError):
            write_file(self.file, json.dumps(self._known))

    def remove(self) -> None:
        """Remove the file, once a calibration holds the outcome."""
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)

    def _digest(self, key: Any) -> str:
        return hashlib.sha256(json.dumps([self.facts, key]).encode()).hexdigest()
