"""Choices that depend on the machine: measured once there, and noted in the bundle's folder.

*Threads.* Every graph of the chain wakes its threads anew, which small layers do not repay, and an
answer is made of very small ones. So one answer to a made-up prompt is timed with one thread, two,
four, ... up to all cores. Large models are not tried: they would be loaded several times to learn
that every core helps.

*Fused prefill.* Two calls for an image and a question read stage 0's weights twice; one call cannot
be captured for later (its number of rows is the question's own). Which is faster depends on the
device's bandwidth. Only a stage without gates may take both kinds at once (docs/design.md, "Image
and question in one call").
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..graphs.bundle import Bundle
from ..graphs.chain.chain import Chain
from ..graphs.chain.rows import AppendedRows
from ..graphs.errors import VisistageError
from ..graphs.fields import from_json, read_json
from ..graphs.files import write_file
from ..graphs.inside import file_inside
from ..graphs.vision_contract import pixel_shape
from .backends.backend import Backend
from .hardware import cores, processor

THREADS_FILE, FUSED_PREFILL_FILE = ".threads.json", ".merging.json"
THREADS_VARIABLE = "VISISTAGE_THREADS"
"""Environment variable that replaces the measurement, for services that know their share."""

LARGEST_BYTES = 512 << 20
"""Weights that are loaded with several numbers of threads, at most."""

REPEATS = 3
TRIAL_QUESTION_ROWS, TRIAL_ANSWER_TOKENS = 24, 12
FUSED_QUESTION_ROWS = 40
"""Rows of a question with its turn's end and all."""

THREADS_MARGIN = 0.95
"""Fewer threads must be this much faster than more: one measurement is not much to go by."""
FUSED_MARGIN = 0.98
"""One call must be this much faster: what is captured is worth something later, too."""


@dataclass(frozen=True)
class ThreadsNote:
    """Milliseconds of an answer by number of threads: where, in which library, of which bundle."""

    machine: str
    engine: str  # with its version
    source: str
    answer_ms: dict[str, float]

    @property
    def believable(self) -> bool:
        """True where it can only choose what a measurement here might have chosen."""
        counts = list(map(str, thread_counts(cores())))
        return list(self.answer_ms) == counts and min(self.answer_ms.values()) > 0

    @property
    def threads(self) -> int:
        """The best number: all cores unless fewer are clearly faster."""
        best, *fewer = sorted(self.answer_ms, key=int, reverse=True)
        for count in fewer:
            if self.answer_ms[count] < THREADS_MARGIN * self.answer_ms[best]:
                best = count
        return int(best)


@dataclass(frozen=True)
class FusedPrefillNote:
    """Milliseconds of stage 0 for an image and a question, in two calls and in one."""

    device: str
    source: str
    separate_ms: float
    merged_ms: float

    @property
    def believable(self) -> bool:
        """True where it can only choose what a measurement here might have chosen."""
        return min(self.separate_ms, self.merged_ms) > 0

    @property
    def fused(self) -> bool:
        """Return whether one call is the faster."""
        return self.merged_ms < FUSED_MARGIN * self.separate_ms


Note = TypeVar("Note", ThreadsNote, FusedPrefillNote)


def choose_threads(bundle: Bundle, engine: str, load: Callable[[int], Backend]) -> int:
    """Return the number of threads to run ``bundle`` with: given, noted here before, or measured.

    Args:
        bundle: the measurement is noted in its folder, if that can be written.
        engine: name and version of the library that runs it.
        load: opens it with so many threads.

    Raises:
        VisistageError: the environment variable is no number of threads.
    """
    given = os.environ.get(THREADS_VARIABLE)
    if given is not None:
        if not given.isdecimal() or int(given) < 1:
            raise VisistageError(
                f"{THREADS_VARIABLE} is '{given}', expected a number of threads. "
                f"Unset it, or try {THREADS_VARIABLE}={cores()}"
            )
        return int(given)
    if cores() == 1 or bundle.manifest.weight_bytes > LARGEST_BYTES:
        return cores()

    def measure() -> dict[str, Any]:
        counts = thread_counts(cores())
        with contextlib.ExitStack() as stack:
            answers = []
            for count in counts:
                executor = load(count)
                stack.callback(executor.close)
                answers.append(TrialPrompt(bundle, executor, TRIAL_QUESTION_ROWS).answer)
            return {"answer_ms": dict(zip(map(str, counts), fastest(answers), strict=True))}

    where = {"machine": f"{processor()}, {cores()} cores", "engine": engine}
    file = bundle.path / THREADS_FILE
    return _noted(file, ThreadsNote, where | {"source": bundle.manifest.source}, measure).threads


def choose_fused_prefill(bundle: Bundle, executor: Backend) -> FusedPrefillNote | None:
    """Return what was measured here before, or is now; None where there is nothing to choose."""
    manifest = bundle.manifest
    plan, first = manifest.plan, manifest.plan.stages[0]
    single = first.gated_layers or not first.visual_tokens or first.serves or plan.fixed_calls
    if executor.device_name is None or single:
        return None

    def measure() -> dict[str, Any]:
        most = manifest.config.text.max_positions - manifest.config.visual_tokens
        prompt = TrialPrompt(bundle, executor, min(FUSED_QUESTION_ROWS, most))
        separate, merged = fastest([prompt.separate, prompt.fused])
        executor.reset_elapsed()
        return {"separate_ms": separate, "merged_ms": merged}

    where = {"device": executor.device_name, "source": manifest.source}
    return _noted(bundle.path / FUSED_PREFILL_FILE, FusedPrefillNote, where, measure)


def thread_counts(most: int) -> list[int]:
    """Return the powers of two below ``most``, and ``most``."""
    return [1 << power for power in range(most.bit_length()) if 1 << power < most] + [most]


def fastest(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Return the fewest milliseconds of each call; they take turns, and first calls are dropped."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + REPEATS):
        for call, ms in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            ms.append((time.perf_counter() - started) * 1e3)
    return [round(min(ms[1:]), 3) for ms in times]


class TrialPrompt:
    """A prompt of random rows, an image and a question, run to be timed."""

    def __init__(self, bundle: Bundle, executor: Backend, question_rows: int):
        manifest = bundle.manifest
        config, self.executor = manifest.config, executor
        side = config.vision.image_size
        layout = config.layout(side, side)
        visual = min(manifest.plan.entering, layout.rows)
        self.stop = visual + question_rows
        self.feeds = layout.feeds
        shape = [int(size) for size in pixel_shape(config, layout.tiles)]
        self.pixels = np.zeros(shape, np.float32)
        rows = np.random.default_rng(0).standard_normal((1, self.stop, config.text.hidden)) / 32
        self.rows = rows.astype(executor.rows_dtype)
        executor.prepare([self.stop, *([0] * len(manifest.plan.edges))])
        self.chain = Chain(manifest.plan, executor)
        self.image = self._segment(True, 0, visual)
        self.question = self._segment(False, visual, self.stop)

    def answer(self) -> None:
        """Run the prompt and some tokens of an answer, with every kind of call."""
        self._rewind()
        self.executor.encode(self.pixels, feeds=self.feeds)
        self.chain.prefill([self.image, self.question])
        for at in range(self.stop, self.stop + TRIAL_ANSWER_TOKENS):
            order = np.full((1, 1), at, np.int32)
            self.chain.decode(AppendedRows(False, self.rows[:, :1], order, order))

    def separate(self) -> None:
        """Run stage 0 on image and question, one after the other."""
        self._rewind()
        self.chain.append(0, [self.image])
        (done,) = self.chain.append(0, [self.question])
        np.asarray(done.result.rows)  # waits

    def fused(self) -> None:
        """Run stage 0 on image and question in one call."""
        self._rewind()
        done = self.chain.append(0, [self.image, self.question])
        np.asarray(done[-1].result.rows)

    def _rewind(self) -> None:
        for slots in self.chain.slots:
            slots.rewind(0)

    def _segment(self, visual: bool, start: int, stop: int) -> AppendedRows:
        order = np.arange(start, stop, dtype=np.int32)[None]
        return AppendedRows(visual, self.rows[:, start:stop], order, order)


def _noted(
    file: Path, kind: type[Note], where: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
) -> Note:
    """Return the note in ``file`` if it was taken where we are; otherwise measure, and note it."""
    with contextlib.suppress(VisistageError):  # no note, or a spoilt one: it is measured again
        known = file_inside(file.parent, file.name, VisistageError, "", own=True)
        note = from_json(kind, read_json(known, VisistageError, ""), VisistageError, "")
        if note.believable and all(getattr(note, name) == value for name, value in where.items()):
            return note
    note = kind(**where, **measure())
    with contextlib.suppress(OSError):  # a read-only bundle is measured every time
        write_file(file, json.dumps(asdict(note)))
    return note
