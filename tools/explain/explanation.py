"""From a bundle, pictures and a question to a page: the whole path as one function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...graphs.bundle import Bundle
from ...graphs.errors import PromptError
from ...runtime.image.image import load_image
from ...runtime.session import DEFAULT_MAX_TOKENS, Session
from .dense import dense_bundle, how_to_build
from .explain_facts import Run, explain_facts
from .explain_page import ShownImage, render_explanation
from .overlay import Grid, cropped_share, ghost_uri, heat_uri, image_uri, seen
from .trace import LayerTrace, trace


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
        images: one picture or more, as ``Session.stream`` takes them.
        question: the prompt; answered greedily.
        dense: a bundle of the unpruned model; by default one that lies beside ``path``.
        max_tokens: the answers' longest length.
        backend: as ``Session`` takes it.
        threads: likewise.

    Raises:
        VisistageError: no picture, or anything that opening, comparing or answering refuses.
    """
    if not images:
        raise PromptError("explain shows what becomes of a picture: name at least one")
    loaded = [load_image(image) for image in images]
    bundle = Bundle.open(path)
    other = dense_bundle(bundle, dense)

    def run(one: Bundle) -> Run:
        # Without a cache every repetition pays for its pictures, as a first question does.
        with Session(one, backend=backend, threads=threads, cache_bytes=0) as session:
            result = trace(session, images, question, max_tokens)
            preparations.append(session.preprocessing)
        return Run(one.path.resolve().name, one.manifest, result)

    preparations: list[Any] = []
    own = run(bundle)
    full = None if other is None else run(other)
    missing = full is None and not bundle.manifest.plan.is_dense
    facts = explain_facts(question, own, full, how_to_build(bundle.manifest) if missing else None)
    heat = {"plan": _relative(own.trace.layers)}
    if full is not None:
        heat["dense"] = _relative(full.trace.layers)
    strongest = max(float(values.max()) for run_ in heat.values() for values in run_) or 1.0
    tokens = bundle.manifest.config.visual_tokens
    grid = Grid.of(bundle.manifest.config)
    shown = []
    for index, image in enumerate(loaded):
        part = slice(index * tokens, (index + 1) * tokens)
        visible = seen(image, preparations[0])
        shown.append(
            ShownImage(
                uri=image_uri(visible),
                ghost=ghost_uri(visible),
                size=visible.size,
                grid=grid,
                present=[layer.present[part] for layer in own.trace.layers],
                heat={
                    name: [heat_uri(grid.cells(values[part]) / strongest) for values in layers]
                    for name, layers in heat.items()
                },
                cropped=cropped_share(image.size, preparations[0]),
            )
        )
    return Explanation(render_explanation(facts, shown), facts)


def _relative(layers: Sequence[LayerTrace]) -> list[np.ndarray]:
    """Each layer's contributions (N,) relative to its output, so that layers compare."""
    return [layer.norms / max(layer.reading.output, 1e-12) for layer in layers]
