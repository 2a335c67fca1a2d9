"""Bundles that the tests of a module share: each is built once."""

from __future__ import annotations

from collections.abc import Callable

from visistage.compile.build import make_bundle
from visistage.graphs.bundle import Bundle


def built_once(checkpoint, tmp_path_factory) -> Callable[..., Bundle]:
    """Return what builds a checkpoint for a plan and options, and gives the same bundle again."""
    built: dict[tuple, Bundle] = {}

    def get(plan: str, target: str = "cpu", **options) -> Bundle:
        key = plan, target, *options.items()
        if key not in built:
            out = tmp_path_factory.mktemp("engines")
            given = {"plan": plan, "target": target, **options}
            built[key] = make_bundle(str(checkpoint), out=out, **given)
        return built[key]

    return get
