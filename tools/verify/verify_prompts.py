"""Prompts of a verification: given ones, the demo model's held-out scenes, or general ones."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

from ...calib.samples import Sample, demo_samples, read_samples
from ...compile.checkpoint.known_models import DEMO
from ...demo.gallery import bundled

DEFAULT_SAMPLES = 6
"""Prompts asked by default."""

GENERAL = ("What is shown in this picture?", "Which colours do you see, and where?")
"""Asked about the package's images where a model has no questions of its own."""


def chosen(model: str, data: Path | None, count: int | None) -> list[Sample]:
    """Return ``count`` samples of ``data``, or else of what the package has for ``model``.

    Raises:
        DataError: the data cannot be used.
    """
    count = count or DEFAULT_SAMPLES
    if data is not None:
        # By file and line alone: a report must not name this machine's folders.
        return [replace(s, name=Path(s.name).name) for s in read_samples(data, count)]
    if model == DEMO:
        return demo_samples(count)
    return [
        Sample(f"{image.path.name}, {text}", image.path, text, "")
        for text, image in islice(product(GENERAL, bundled()), count)
    ]


def checkpoint_at_hand(model: str) -> str | None:
    """Return the name of the package's own checkpoint of ``model``, where torch can read it."""
    return DEMO if model == DEMO and importlib.util.find_spec("torch") else None
