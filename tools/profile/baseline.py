"""Which bundle stands beside the one that is profiled: named, or the unpruned model's."""

from __future__ import annotations

from pathlib import Path

from ...graphs.bundle import Bundle
from ...graphs.errors import BundleError
from ..explain.dense import dense_bundle, how_to_build


def baseline_bundle(bundle: Bundle, given: Path | None) -> Bundle | None:
    """The bundle at ``given``, or one with the plan ``dense`` beside ``bundle``; None without.

    Raises:
        BundleError: ``given`` is no bundle, is ``bundle`` itself, or is of another model.
    """
    if given is None:
        return dense_bundle(bundle, None)
    other = Bundle.open(given)
    if other.path.resolve() == bundle.path.resolve():
        raise BundleError(
            f"--against {given} is the bundle that is profiled. Name another one: "
            f"{how_to_build(bundle.manifest)}"
        )
    if other.manifest.config != bundle.manifest.config:
        raise BundleError(
            f"{other.path} is of another model ({other.manifest.model}) than {bundle.path} "
            f"({bundle.manifest.model}): their times would say nothing about plans. "
            f"Build one of the same: {how_to_build(bundle.manifest)}"
        )
    return other


def missing(bundle: Bundle) -> str | None:
    """What to type for a comparison; None for a bundle that is the unpruned model itself."""
    return None if bundle.manifest.plan.is_dense else how_to_build(bundle.manifest)
