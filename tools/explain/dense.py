"""The unpruned model to compare with: named, or found beside the bundle."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

from ...demo.worlds import WORLDS
from ...graphs.bundle import MANIFEST, Bundle, Manifest
from ...graphs.commands import rebuild_command, visistage
from ...graphs.dtypes import DTYPES
from ...graphs.errors import BundleError
from ...graphs.quantization import is_quantised, parse_quant_config


def dense_bundle(bundle: Bundle, given: Path | None) -> Bundle | None:
    """Open the bundle at ``given``, or one of the same model, target and precision nearby.

    None where ``bundle`` is dense itself, or no such bundle is found.

    Raises:
        BundleError: ``given`` is no bundle, is not dense, or is of another model or precision.
    """
    if given is not None:
        return _checked(bundle, Bundle.open(given))
    if bundle.manifest.plan.is_dense:
        return None
    for manifest in sorted(bundle.path.absolute().parent.glob("*/" + MANIFEST)):
        if manifest.parent.name.endswith(".partial"):
            continue
        try:
            other = Bundle.open(manifest.parent)
        except BundleError:
            continue  # of another version, or half written
        if is_unpruned(bundle, other):
            return other
    return None


def is_unpruned(bundle: Bundle, other: Bundle) -> bool:
    """Return whether ``other`` is ``bundle`` without its plan, and differs in nothing else."""
    ours, theirs = bundle.manifest, other.manifest
    alike = ours.target == theirs.target and _precision(bundle) == _precision(other)
    pruned = theirs.plan.is_dense and not ours.plan.is_dense
    return alike and pruned and same_model(bundle, other)


def same_model(one: Bundle, other: Bundle) -> bool:
    """Return whether both were built from one checkpoint, as far as the files show."""

    def facts(manifest: Manifest):
        return manifest.config, manifest.generation, manifest.preprocessing, _texts(manifest)

    if facts(one.manifest) != facts(other.manifest):
        return False
    # Rounded weights differ from plan to plan, and the file that holds them with them.
    return _place(one.manifest) == _place(other.manifest) or _table(one) == _table(other)


def how_to_build(manifest: Manifest) -> str:
    """Return the command that builds the unpruned bundle."""
    precision, folder = unstaged(manifest.precision), "calibrations/dense"
    calibrated = manifest.quantization.calibration is not None
    calib = f"{folder}/{manifest.model}" if calibrated else None
    command = rebuild_command(manifest, plan="dense", precision=precision, calib=calib)
    if not calibrated:
        return command
    # Ranges are of the rows that a plan's layers see: dense ones take a calibration of their own.
    data = None if manifest.model in WORLDS else "SAMPLES"
    calibrate = visistage("calibrate", manifest.model, plan="dense", data=data, out=folder)
    return f"{calibrate} && {command}"


def unstaged(precision: str) -> str:
    """Return a precision without schemes of single stages, which the dense plan has not."""
    if not is_quantised(precision):
        return precision
    return replace(parse_quant_config(precision), stages={}).name


def _precision(bundle: Bundle) -> str:
    return unstaged(bundle.manifest.precision)


def _texts(manifest: Manifest) -> dict[str, str]:
    return {
        role: manifest.files[name].sha256
        for role, name in manifest.text_files.items()
        if name in manifest.files
    }


def _place(manifest: Manifest) -> tuple:
    """Return the file, by its hash, and the place in it of the embedding table."""
    ref = manifest.embedding
    fact = manifest.files.get(ref.file)
    return (fact and fact.sha256, ref.offset, ref.dtype, ref.shape)


def _table(bundle: Bundle) -> str:
    """Hash the embedding table's own bytes."""
    ref = bundle.manifest.embedding
    left = math.prod(ref.shape) * int(DTYPES[ref.dtype].nbytes)
    digest = hashlib.sha256(f"{ref.dtype} {ref.shape}".encode())
    with bundle.file(ref.file).open("rb") as stream:
        stream.seek(ref.offset)
        while left and (block := stream.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _checked(bundle: Bundle, dense: Bundle) -> Bundle:
    if not dense.manifest.plan.is_dense:
        raise BundleError(
            f"{dense.path} has the plan '{dense.manifest.plan.name}', the comparison wants the "
            f"unpruned model. Build it: {how_to_build(bundle.manifest)}"
        )
    if _precision(dense) != _precision(bundle):
        raise BundleError(
            f"{dense.path} is {dense.manifest.precision}, {bundle.path} is "
            f"{bundle.manifest.precision}: answers and times would differ by more than the plan. "
            f"Build one of the same: {how_to_build(bundle.manifest)}"
        )
    if not same_model(bundle, dense):
        raise BundleError(
            f"{dense.path} is of another model ({dense.manifest.model}) than {bundle.path} "
            f"({bundle.manifest.model}), or of other weights. "
            f"Build one of the same: {how_to_build(bundle.manifest)}"
        )
    return dense
