"""The unpruned model to compare with: named, or found beside the bundle."""

from __future__ import annotations

from pathlib import Path

from ..graphs.bundle import MANIFEST, Bundle, Manifest
from ..graphs.errors import BundleError
from ..graphs.targets import find_target


def dense_bundle(bundle: Bundle, given: Path | None) -> Bundle | None:
    """The bundle at ``given``, or one of the same model, target and precision beside ``bundle``.

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
            continue  # of another version, or half written: not what is looked for
        same = ("target", "precision")
        if all(getattr(other.manifest, n) == getattr(bundle.manifest, n) for n in same) and (
            other.manifest.plan.is_dense and same_model(bundle.manifest, other.manifest)
        ):
            return other
    return None


def same_model(one: Manifest, other: Manifest) -> bool:
    """Whether both were built from one checkpoint, as far as the files tell."""

    def facts(manifest: Manifest):
        return manifest.config, manifest.generation, manifest.preprocessing, _texts(manifest)

    return facts(one) == facts(other) and _weights(one) == _weights(other)


def how_to_build(manifest: Manifest) -> str:
    """The command that builds the unpruned bundle."""
    command = f"make engines MODEL={manifest.model} PLAN=dense TARGET={manifest.target}"
    target = find_target(manifest.target)
    usual = manifest.precision == target.precisions[0]
    return command if usual else f"{command} PRECISION={manifest.precision}"


def _texts(manifest: Manifest) -> dict[str, str]:
    return {
        role: manifest.files[name].sha256
        for role, name in manifest.text_files.items()
        if name in manifest.files
    }


def _weights(manifest: Manifest) -> tuple | None:
    """The file, by its hash, and the place in it of the embedding table."""
    ref = manifest.embedding
    fact = manifest.files.get(ref.file)
    return (fact and fact.sha256, ref.offset, ref.dtype, ref.shape)


def _checked(bundle: Bundle, dense: Bundle) -> Bundle:
    if not dense.manifest.plan.is_dense:
        raise BundleError(
            f"{dense.path} has the plan '{dense.manifest.plan.name}', the comparison wants the "
            f"unpruned model. Build it: {how_to_build(bundle.manifest)}"
        )
    if dense.manifest.precision != bundle.manifest.precision:
        raise BundleError(
            f"{dense.path} is {dense.manifest.precision}, {bundle.path} is "
            f"{bundle.manifest.precision}: answers and times would differ by more than the plan. "
            f"Build one of the same: {how_to_build(bundle.manifest)}"
        )
    if not same_model(bundle.manifest, dense.manifest):
        raise BundleError(
            f"{dense.path} is of another model ({dense.manifest.model}) than {bundle.path} "
            f"({bundle.manifest.model}), or of other weights. "
            f"Build one of the same: {how_to_build(bundle.manifest)}"
        )
    return dense
