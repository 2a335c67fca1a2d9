"""From a bundle, images and a question to a page: the whole path as one function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...graphs.bundle import Bundle
from ...graphs.errors import PromptError
from ...runtime.image.image import load_image
from ...runtime.image.overlay import cropped_share, ghost_uri, heat_uri, image_uri, seen
from ...runtime.opened_image import check_picture
from ...runtime.session import DEFAULT_MAX_TOKENS, Session
from .dense import dense_bundle, how_to_build
from .explain_facts import Run, explain_facts
from .explain_page import ShownImage, render_explanation
from .trace import Trace, trace


@dataclass(frozen=True)
class Explanation:
    """The page, and the same as plain data."""

    html: str
    facts: dict[str, Any]


def explain(
    path: Path,
    images: Sequence[Any],
    question: str,
    *,
    dense: Path | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    backend: str | None = None,
    threads: int | None = None,
) -> Explanation:
    """Ask the bundle at ``path`` and, if there is one, the unpruned model; show what happened.

    Args:
        path: a bundle, or a folder holding exactly one.
        images: one image or more, as ``Session.stream`` takes them.
        question: the prompt; answered greedily.
        dense: a bundle of the unpruned model; by default one beside ``path``.
        max_tokens: the answers' longest length.
        backend: as ``Session`` takes it.
        threads: likewise.

    Raises:
        VisistageError: no image, or anything that opening, comparing or answering refuses.
    """
    if not images:
        raise PromptError("explain shows what becomes of an image: name at least one")
    for image in images:
        check_picture(image)
    loaded = [load_image(image) for image in images]
    bundle = Bundle.open(path)
    bundles = {"plan": bundle, "dense": dense_bundle(bundle, dense)}
    runs: dict[str, Run] = {}
    for name, one in bundles.items():
        if one is None:
            continue
        # Without a cache every repetition pays for its images, as a first question does.
        with Session(one, backend=backend, threads=threads, cache_bytes=0) as session:
            result = trace(session, images, question, max_tokens)
            if one is bundle:
                preprocessing = session.preprocessing
        runs[name] = Run(one.path.resolve().name, one.manifest, result)
    missing = "dense" not in runs and not bundle.manifest.plan.is_dense
    hint = how_to_build(bundle.manifest) if missing else None
    facts = explain_facts(question, runs["plan"], runs.get("dense"), hint)

    heat = {name: _relative(run.trace) for name, run in runs.items()}
    strongest = max(float(values.max()) for layers in heat.values() for values in layers) or 1.0
    shown, stop = [], 0
    for image, own in zip(loaded, runs["plan"].trace.answer.shown, strict=True):
        part, grid = slice(stop, stop + own.count), own.grid
        stop += own.count
        visible = seen(image, preprocessing, grid)
        shown.append(
            ShownImage(
                uri=image_uri(visible),
                ghost=ghost_uri(visible),
                size=visible.size,
                grid=grid,
                present=[layer.present[part] for layer in runs["plan"].trace.layers],
                heat={
                    name: [heat_uri(grid.cells(values[part]) / strongest) for values in layers]
                    for name, layers in heat.items()
                },
                cropped=cropped_share(image.size, preprocessing, grid),
            )
        )
    return Explanation(render_explanation(facts, shown), facts)


def _relative(trace: Trace) -> list[np.ndarray]:
    """Return each layer's contributions (N,) relative to its output, so that layers compare."""
    return [layer.norms / max(layer.output, 1e-12) for layer in trace.layers]
