"""Calibrations, and the folder that keeps one.

    calibrations/demo/
        calibration.json          facts: what was read, for which model, plan, thresholds, errors
        calibration.safetensors   largest inputs and smoothing factors, per channel; largest keys
                                  and values, per head

Equal contents give equal bytes, and ``Calibration.hash`` names them. Numbers come back bit for
bit. The checkpoint that a calibration fits is named by hashes (``facts_of``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from ...graphs.errors import DataError, PlanError
from ...graphs.fields import check_format, from_json, read_bytes, read_json
from ...graphs.files import write_file
from ...graphs.plan.plan import StagePlan
from ...graphs.progress import Advance, no_advance
from ..disk import file_hash
from .group_ranges import VECTORS, GroupRanges, best_observer

FACTS = "calibration.json"
ARRAYS = "calibration.safetensors"
CALIBRATION_FORMAT = 2
UNCACHED = 1
"""An older format, the same without ranges of caches."""

CACHE_ARRAY = "cache"
"""Name of the array of ranges of caches."""

MAX_BYTES = 256 << 20
"""Larger files are not read: a 13B's take some 20 MB."""

_REMEDY = (
    "Name the folder that visistage calibrate wrote (--calib calibrations/NAME), copy it again, or "
    "calibrate again: visistage calibrate MODEL --data DIR"
)

RowsSeen = Literal["stage", "dense"]
"""Rows that gave the ranges: those that each stage of the plan sees, or the unpruned model's."""

FITS = ("model", "template", "preprocessing")


@dataclass(frozen=True)
class SampleFacts:
    """Samples that were read, in their order.

    Attributes:
        files: names of the sample files, without folders.
        names: of the samples that were used, as ``questions.jsonl:3``.
        sha256: over image, prompt and answer of each (``calib.sample_prompts.order_hash``).
        unreadable: (sample, reason) of those whose image could not be opened.
    """

    files: tuple[str, ...]
    names: tuple[str, ...]
    sha256: str
    unreadable: tuple[tuple[str, str], ...] = ()

    @property
    def count(self) -> int:
        """Number of samples that were used."""
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "files": list(self.files),
            "count": self.count,
            "names": list(self.names),
            "sha256": self.sha256,
            "unreadable": [{"sample": name, "reason": why} for name, why in self.unreadable],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SampleFacts:
        """Invert ``to_dict``."""
        unreadable = tuple((str(d["sample"]), str(d["reason"])) for d in data["unreadable"])
        facts = cls(tuple(data["files"]), tuple(data["names"]), str(data["sha256"]), unreadable)
        if facts.count != data["count"]:
            raise ValueError(f"count is {data['count']}, there are {facts.count} names")
        return facts


@dataclass(frozen=True, eq=False)
class Calibration:
    """Result of one run of ``calibrate``; compare two by their ``hash``.

    Attributes:
        model: the checkpoint's name.
        fits: what it was made for, by ``FITS``: see ``facts_of``.
        plan: whose stages it was made for.
        rows: ``stage``, or ``dense`` where the unpruned model's rows were measured instead.
        include_prefix: whether the rows before the image count, which bundles compute in float.
        samples: what was read.
        groups: by name, in the order in which a prompt meets them.
        versions: of what made it.
        cache: (2, L, G) float32, the largest absolute key and value of each layer and head, over
            everything that is cached, the prefix's rows too; None in the older format.
        dynamics, choice: plain JSON of ``calib.plan_search.dynamics`` and
            ``calib.plan_search.choose``; empty where no plan was to be chosen.
    """

    model: str
    fits: Mapping[str, str]
    plan: StagePlan
    rows: RowsSeen
    include_prefix: bool
    samples: SampleFacts
    groups: Mapping[str, GroupRanges]
    versions: Mapping[str, str]
    dynamics: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)
    cache: np.ndarray | None = None

    @property
    def best_observer(self) -> str:
        """Observer whose smoothed W8A8 error, summed over all groups, is least; first of equals."""
        return best_observer(self.groups.values())

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the contents."""
        return hashlib.sha256(self._files()[FACTS]).hexdigest()

    def check_fits(self, facts: Mapping[str, str]) -> None:
        """Check ``facts_of`` what it is to be used with against what it was made for.

        Raises:
            DataError: another model, template or preprocessing; names what does not fit.
        """
        wrong = [name for name in FITS if facts[name] != self.fits[name]]
        if wrong:
            found = ", ".join(f"{name} {self.fits[name][:12]}" for name in wrong)
            wanted = ", ".join(f"{name} {facts[name][:12]}" for name in wrong)
            raise DataError(
                f"the calibration of '{self.model}' does not fit: it was made for {found}, "
                f"expected {wanted}. Calibrate what you build: visistage calibrate MODEL --data DIR"
            )

    def save(self, folder: str | Path) -> list[str]:
        """Write both files, each complete or not at all; return their names.

        Raises:
            DataError: a number that is not finite.
        """
        folder, files = Path(folder), self._files()
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_file(folder / name, content)
        return list(files)

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Read what ``save`` wrote.

        Raises:
            DataError: missing, damaged, cut short, or from another version; names the file.
        """
        file = Path(folder) / FACTS
        data = read_json(file, DataError, _REMEDY, MAX_BYTES)
        older = isinstance(data, dict) and data.get("format") == UNCACHED
        version = UNCACHED if older else CALIBRATION_FORMAT
        given = check_format(data, version, DataError, _REMEDY, str(file))
        facts = from_json(_Facts, given, DataError, _REMEDY, str(file))
        arrays = _read_arrays(Path(folder) / ARRAYS, facts.arrays)
        try:
            return facts.calibration(arrays, cached=not older)
        except (KeyError, TypeError, ValueError, PlanError) as error:
            raise _damaged(file, error) from None

    def _files(self) -> dict[str, bytes]:
        """Return the contents of both files; the arrays first: the facts hold their hash."""
        vectors = {
            f"{name}/{key}": np.ascontiguousarray(getattr(group, key), np.float32)
            for name, group in sorted(self.groups.items())
            for key in VECTORS
        }
        if self.cache is not None:
            vectors[CACHE_ARRAY] = np.ascontiguousarray(self.cache, np.float32)
        arrays = safetensors.save(vectors)
        data = {
            # What was read in the older format keeps its hash, which bundles name.
            "format": UNCACHED if self.cache is None else CALIBRATION_FORMAT,
            "model": self.model,
            "fits": dict(self.fits),
            "plan": self.plan.to_dict(),
            "rows": self.rows,
            "include_prefix": self.include_prefix,
            "samples": self.samples.to_dict(),
            "groups": {name: group.facts() for name, group in self.groups.items()},
            "order": list(self.groups),
            "versions": dict(self.versions),
            "dynamics": self.dynamics,
            "choice": self.choice,
            "arrays": hashlib.sha256(arrays).hexdigest(),
        }
        try:
            if self.cache is not None:
                _check_finite(self.cache)
            text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise DataError(
                f"the calibration of '{self.model}' holds a number that is not finite ({error}). "
                "The checkpoint's weights may be damaged: download or convert it again"
            ) from None
        return {ARRAYS: arrays, FACTS: (text + "\n").encode()}


@dataclass(frozen=True)
class _Facts:
    """Contents of ``calibration.json`` beside its format."""

    model: str
    fits: dict[str, str]
    plan: dict[str, Any]
    rows: RowsSeen
    include_prefix: bool
    samples: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    order: list[str]
    versions: dict[str, str]
    dynamics: dict[str, Any]
    choice: dict[str, Any]
    arrays: str

    def calibration(self, arrays: Mapping[str, np.ndarray], *, cached: bool) -> Calibration:
        """Return the calibration with its arrays; ``cached``: ranges of caches are among them."""
        if sorted(self.order) != sorted(self.groups):
            raise ValueError("'order' does not list the groups")
        groups = {
            name: GroupRanges.from_facts(
                self.groups[name], {key: arrays[f"{name}/{key}"] for key in VECTORS}
            )
            for name in self.order
        }
        cache = None
        if cached:
            cache = arrays[CACHE_ARRAY]
            if cache.ndim != 3 or len(cache) != 2 or cache.dtype != np.float32:
                raise ValueError(f"ranges of caches are {cache.dtype} of shape {cache.shape}")
            _check_finite(cache)
        if len(arrays) != len(groups) * len(VECTORS) + cached:
            raise ValueError(f"{ARRAYS} holds tensors of groups that are not listed")
        return Calibration(
            model=self.model,
            fits={name: self.fits[name] for name in FITS},
            plan=StagePlan.from_dict(self.plan),
            rows=self.rows,
            include_prefix=self.include_prefix,
            samples=SampleFacts.from_dict(self.samples),
            groups=groups,
            versions=self.versions,
            dynamics=self.dynamics,
            choice=self.choice,
            cache=cache,
        )


def facts_of(
    config: Mapping[str, Any],
    weight_files: Sequence[Path],
    template: str,
    prefix_ids: Sequence[int],
    preprocessing: Mapping[str, Any],
    progress: Advance = no_advance,
) -> dict[str, str]:
    """Return what a calibration must fit, as SHA-256 (hex) by ``FITS``.

    Args:
        config: the checkpoint's parsed ``config.json``.
        weight_files: all of them; every byte is read.
        template: jinja text of the chat template.
        prefix_ids: token ids before the first image.
        preprocessing: ``Preprocessing.to_dict()``.
        progress: called with bytes of weights as they are read.
    """
    hashes = []
    for file in weight_files:
        hashes.append(file_hash(file))
        progress(file.stat().st_size)
    return {
        "model": _hash([config, hashes]),
        "template": _hash([template, list(prefix_ids)]),
        "preprocessing": _hash(preprocessing),
    }


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _check_finite(cache: np.ndarray) -> None:
    if not (np.isfinite(cache) & (cache >= 0)).all():
        raise ValueError("a range of a cache is negative, or not finite")


def _read_arrays(file: Path, expected: str) -> dict[str, np.ndarray]:
    content = read_bytes(file, DataError, _REMEDY, MAX_BYTES)
    if hashlib.sha256(content).hexdigest() != expected:
        raise DataError(
            f"{file} is damaged, or belongs to another {FACTS}: its hash is not the one noted "
            f"there. {_REMEDY}"
        )
    try:
        return safetensors.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> DataError:
    reason = f"{type(error).__name__}: {str(error)[:200]}"
    return DataError(f"{file} is damaged or no calibration ({reason}). {_REMEDY}")
