"""Commands to paste into a shell: quoted, with the model that they are about."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from .targets import TARGETS

if TYPE_CHECKING:
    from .bundle import Manifest

DUMMY = "-dummy"
"""End of the names of models with random weights."""


def visistage(*words: object, **options: object) -> str:
    """Return a command; options that are None or false are left out, true ones have no value."""
    parts = ["visistage", *map(str, words)]
    for name, value in options.items():
        if value is not None and value is not False:
            parts += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(parts)


def build_command(model: str, **options: object) -> str:
    """Return the command that builds a bundle of a model by the name that bundles give it."""
    dummy = model.endswith(DUMMY)
    return visistage("build", model.removesuffix(DUMMY), **options, dummy_weights=dummy)


def rebuild_command(manifest: Manifest, **options: object) -> str:
    """Return the command that builds a bundle again, or with other ``options``.

    A plan that is no preset by its bare name is left to the reader.
    """
    from .presets.presets import PRESETS

    target = TARGETS.get(manifest.target)
    usual = {"plan": "visipruner", "target": "cpu", "precision": target and target.precisions[0]}
    plan = manifest.plan.name if manifest.plan.name in PRESETS else "PLAN"
    asked = {"plan": plan, "target": manifest.target, "precision": manifest.precision} | options
    changed = {name: value for name, value in asked.items() if value != usual.get(name)}
    return build_command(manifest.model, **changed)


def install(extra: str) -> str:
    """Return what to type for an optional part, in a clone or beside what pip installed."""
    if (Path(__file__).parents[1] / "pyproject.toml").is_file():
        return f"pip install -e '.[{extra}]' in the clone of visistage"
    return f"pip install 'visistage[{extra}]'"
