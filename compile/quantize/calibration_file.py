"""What a calibration found, and the folder that keeps it.

    calibrations/demo/
        calibration.json          facts: what was read, for which model, plan, thresholds, errors
        calibration.safetensors   largest inputs and smoothing factors, per channel; largest keys
                                  and values, per head

Equal contents give equal bytes, and ``Calibration.hash`` names them. Numbers come back bit for
bit. It knows no checkpoint: what a calibration fits is said in hashes (``facts_of``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from ...graphs.errors import DataError, PlanError
from ...graphs.files import write_file
from ...graphs.plan.plan import StagePlan
from ...graphs.progress import Advance, no_advance
from ..disk import file_hash
from .group_ranges import VECTORS, GroupRanges, best_observer

FACTS = "calibration.json"
ARRAYS = "calibration.safetensors"
CALIBRATION_FORMAT = 2
UNCACHED = 1
"""An older format, the same but for ranges of caches, which it has not."""

CACHE_ARRAY = "cache"
"""Name of their array."""

MAX_BYTES = 256 << 20
"""Larger files are not read: a 13B's take some 20 MB."""

RowsSeen = Literal["stage", "dense"]
"""Which rows gave the ranges: those that each stage of the plan sees, or the unpruned model's."""

FITS = ("model", "template", "preprocessing")


@dataclass(frozen=True)
class SampleFacts:
    """Which samples were read, in their order.

    Attributes:
        files: names of the sample files, without folders.
        names: of the samples that were used, as ``questions.jsonl:3``.
        sha256: over picture, prompt and answer of each of them (``prompts.order_hash``).
        unreadable: (sample, reason) of those whose picture could not be opened.
    """

    files: tuple[str, ...]
    names: tuple[str, ...]
    sha256: str
    unreadable: tuple[tuple[str, str], ...] = ()

    @property
    def count(self) -> int:
        """How many were used."""
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {
            "files": list(self.files),
            "count": self.count,
            "names": list(self.names),
            "sha256": self.sha256,
            "unreadable": [{"sample": name, "reason": why} for name, why in self.unreadable],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SampleFacts:
        """Inverse of ``to_dict``."""
        unreadable = tuple((str(one["sample"]), str(one["reason"])) for one in data["unreadable"])
        facts = cls(tuple(data["files"]), tuple(data["names"]), str(data["sha256"]), unreadable)
        if facts.count != data["count"]:
            raise ValueError(f"count is {data['count']}, there are {facts.count} names")
        return facts


@dataclass(frozen=True, eq=False)
class Calibration:
    """Everything one run of ``calibrate`` found; compare two by their ``hash``.

    Attributes:
        model: the checkpoint's name.
        fits: what it was made for, by ``FITS``: see ``facts_of``.
        plan: whose stages it was made for.
        rows: ``stage``, or ``dense`` where the unpruned model's rows were measured instead.
        include_prefix: whether the rows before the picture count, which bundles compute in float.
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
        """Whose smoothed W8A8 error, summed over all groups, is least; the first of equals."""
        return best_observer(self.groups.values())

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the contents."""
        return hashlib.sha256(self._files()[FACTS]).hexdigest()

    def check_fits(self, facts: Mapping[str, str]) -> None:
        """Refuse another model, template or preprocessing than it was made for.

        Args:
            facts: ``facts_of`` what it is to be used with.

        Raises:
            DataError: names what does not fit.
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
        """Write both files, complete or not at all; returns their names.

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
        text = _read(file)
        try:
            data = json.loads(text, parse_constant=_reject)
            version = data["format"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise _damaged(file, error) from None
        if version not in (UNCACHED, CALIBRATION_FORMAT):
            raise DataError(
                f"{file}: found format {version!r}, expected {CALIBRATION_FORMAT}: it is from "
                f"another version "
                "of visistage. Calibrate again: visistage calibrate MODEL --data DIR"
            )
        arrays = _read_arrays(Path(folder) / ARRAYS, data.get("arrays"))
        try:
            return cls._from_dict(data, arrays)
        except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
            raise _damaged(file, error) from None

    def _files(self) -> dict[str, bytes]:
        """Contents of both files; the arrays first, for the facts hold their hash."""
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

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Calibration:
        if sorted(data["order"]) != sorted(data["groups"]):
            raise ValueError("'order' does not list the groups")
        if data["rows"] not in get_args(RowsSeen):
            raise ValueError(f"rows is {data['rows']!r}")
        groups = {
            name: GroupRanges.from_facts(
                data["groups"][name], {key: arrays[f"{name}/{key}"] for key in VECTORS}
            )
            for name in data["order"]
        }
        cache = None
        if data["format"] == CALIBRATION_FORMAT:
            cache = arrays[CACHE_ARRAY]
            if cache.ndim != 3 or len(cache) != 2 or cache.dtype != np.float32:
                raise ValueError(f"ranges of caches are {cache.dtype} of shape {cache.shape}")
            _check_finite(cache)
        if len(arrays) != len(groups) * len(VECTORS) + (cache is not None):
            raise ValueError(f"{ARRAYS} holds tensors of groups that are not listed")
        return cls(
            model=str(data["model"]),
            fits={name: str(data["fits"][name]) for name in FITS},
            plan=StagePlan.from_dict(data["plan"]),
            rows=data["rows"],
            include_prefix=bool(data["include_prefix"]),
            samples=SampleFacts.from_dict(data["samples"]),
            groups=groups,
            versions=dict(data["versions"]),
            dynamics=dict(data["dynamics"]),
            choice=dict(data["choice"]),
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
    """What a calibration must fit, as SHA-256 (hex) by ``FITS``.

    Args:
        config: the checkpoint's parsed ``config.json``.
        weight_files: all of them; every byte is read.
        template: jinja text of the chat template.
        prefix_ids: token ids before the first picture.
        preprocessing: ``Preprocessing.to_dict()``.
        progress: told of bytes of weights as they are read.
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


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _read(file: Path) -> bytes:
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise DataError(
                f"{file} has {size} bytes, expected at most {MAX_BYTES}: that is no calibration. "
                "Name the folder that visistage calibrate wrote"
            )
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror}. Expected the folder that visistage "
            "calibrate wrote: CALIB=calibrations/NAME"
        ) from None


def _read_arrays(file: Path, expected: Any) -> dict[str, np.ndarray]:
    content = _read(file)
    if hashlib.sha256(content).hexdigest() != expected:
        raise DataError(
            f"{file} is damaged, or belongs to another {FACTS}: its hash is not the one noted "
            "there. Copy both files again, or calibrate again: visistage calibrate MODEL --data DIR"
        )
    try:
        return safetensors.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"{file} is damaged or no calibration ({type(error).__name__}: {str(error)[:200]}). Copy "
        "it again, or calibrate again: visistage calibrate MODEL --data DIR"
    )
