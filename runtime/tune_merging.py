"""One call for picture and question, or two: measured once for a machine, and remembered.

Two calls read stage 0's weights twice, one call cannot be captured for later (its number of rows is
the question's own). Which is faster depends on the device's bandwidth, so it is tried. Only a
stage without gates may take both kinds at once (docs/design.md, "Image and question in one call").
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

from ..graphs.bundle import Bundle
from ..graphs.chain.chain import AppendedRows, Chain
from .backends.backend import Backend

FUSED_PREFILL_FILE = ".merging.json"
FUSED_QUESTION_ROWS = 40
"""Rows of the question that is tried, its turn's end and all."""

FUSED_REPEATS = 3
FUSED_MARGIN = 0.98
"""Both at once must be this much faster: what is captured is worth something later, too."""


@dataclass(frozen=True)
class FusedPrefill:
    """Milliseconds of stage 0 for a picture and a question, in two calls and in one.

    ``device`` and ``source`` say where that was measured, and of which bundle.
    """

    device: str
    source: str
    separate_ms: float
    merged_ms: float

    @property
    def fused(self) -> bool:
        """Whether one call is the faster."""
        return self.merged_ms < FUSED_MARGIN * self.separate_ms


def choose_fused_prefill(bundle: Bundle, executor: Backend) -> FusedPrefill | None:
    """What was measured here before, or is now; None where there is nothing to choose."""
    manifest = bundle.manifest
    if executor.device_name is None or manifest.plan.stages[0].gated_layers:
        return None
    file = bundle.path / FUSED_PREFILL_FILE
    known = None
    with contextlib.suppress(OSError, ValueError, TypeError):  # then it is measured again
        known = FusedPrefill(**json.loads(file.read_text(encoding="utf-8")))
    if known is not None and (known.device, known.source) == (
        executor.device_name,
        manifest.source,
    ):
        return known
    chosen = _measure(bundle, executor)
    with contextlib.suppress(OSError):  # a read-only bundle is measured every time
        temporary = file.with_name(file.name + ".new")
        temporary.write_text(json.dumps(asdict(chosen)), encoding="utf-8")
        temporary.replace(file)
    return chosen


def _measure(bundle: Bundle, executor: Backend) -> FusedPrefill:
    manifest = bundle.manifest
    visual, text = manifest.config.visual_tokens, FUSED_QUESTION_ROWS
    text = min(text, manifest.config.text.max_positions - visual)
    executor.prepare([visual + text, *([0] * len(manifest.plan.edges))])
    chain = Chain(manifest.plan, executor)
    rows = np.zeros((1, visual + text, manifest.config.text.hidden), executor.rows_dtype)
    order = np.arange(visual + text, dtype=np.int32)[None]

    def segment(start: int, stop: int, is_visual: bool) -> AppendedRows:
        at = order[:, start:stop]
        return AppendedRows(is_visual, rows[:, start:stop], at, at)

    image, question = segment(0, visual, True), segment(visual, visual + text, False)

    def separate() -> None:
        chain.append(0, image)
        np.asarray(chain.append(0, question).rows)  # waits

    def fused() -> None:
        np.asarray(chain.append_fused(0, [image, question])[-1].rows)

    times = []
    for call in (separate, fused):
        times.append(median([_ms(chain, call) for _ in range(1 + FUSED_REPEATS)][1:]))
    executor.reset_elapsed()
    assert executor.device_name is not None
    return FusedPrefill(executor.device_name, manifest.source, *(round(ms, 3) for ms in times))


def _ms(chain: Chain, call: Callable[[], None]) -> float:
    chain.slots[0].rewind(0)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
