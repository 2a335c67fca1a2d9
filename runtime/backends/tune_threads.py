"""How many threads run a bundle on this CPU: tried once on a machine, and remembered.

Every graph of the chain wakes its threads anew, which small layers do not repay, and an answer is
made of very small ones. So one answer of a made-up prompt is timed with one thread, two, four, ...
up to all cores. Large models are not tried: they would be loaded several times to learn that every
core helps.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...graphs.bundle import Bundle
from ...graphs.chain.chain import AppendedRows, Chain
from ...graphs.errors import VisistageError
from .cpu import cores, processor

if TYPE_CHECKING:
    from .backend import Backend  # which asks here for a number of threads

THREADS_FILE = ".threads.json"
THREADS_VARIABLE = "VISISTAGE_THREADS"
"""Environment variable that takes the place of the trial, for services that know their share."""

LARGEST_BYTES = 512 << 20
"""Of weights that are tried."""

TRIAL_QUESTION_ROWS, TRIAL_ANSWER_TOKENS = 24, 12
TRIAL_REPEATS = 3
THREADS_MARGIN = 0.95
"""Fewer threads must be this much faster than more: one trial is not much to go by."""


@dataclass(frozen=True)
class Trial:
    """Milliseconds of the trial's answer by number of threads; where that was, and of which bundle.

    ``engine``: who ran it, with its version.
    """

    machine: str
    engine: str
    source: str
    answer_ms: dict[str, float]

    @property
    def threads(self) -> int:
        """The best number: all cores unless fewer are clearly faster."""
        best, *fewer = sorted(self.answer_ms, key=int, reverse=True)
        for one in fewer:
            if self.answer_ms[one] < THREADS_MARGIN * self.answer_ms[best]:
                best = one
        return int(best)


def choose_threads(bundle: Bundle, engine: str, load: Callable[[int], Backend]) -> int:
    """As the environment says, as was found here before, or as is found now.

    Args:
        bundle: what shall be run; the trial is noted in its folder, if that can be written.
        engine: name and version of the library that runs it.
        load: opens it with so many threads.

    Raises:
        VisistageError: the environment variable is no number of threads.
    """
    said = os.environ.get(THREADS_VARIABLE)
    if said is not None:
        if not said.isdecimal() or int(said) < 1:
            raise VisistageError(
                f"{THREADS_VARIABLE} is '{said}', expected a number of threads. "
                f"Unset it, or try {THREADS_VARIABLE}={cores()}"
            )
        return int(said)
    if cores() == 1 or bundle.manifest.weight_bytes > LARGEST_BYTES:
        return cores()
    machine = f"{processor()}, {cores()} cores"
    file = bundle.path / THREADS_FILE
    with contextlib.suppress(OSError, ValueError, TypeError):  # then it is tried again
        known = Trial(**json.loads(file.read_text(encoding="utf-8")))
        if (known.machine, known.engine, known.source) == (
            machine,
            engine,
            bundle.manifest.source,
        ):
            return known.threads
    trial = Trial(machine, engine, bundle.manifest.source, _try(bundle, load))
    with contextlib.suppress(OSError):  # a read-only bundle is tried every time
        temporary = file.with_name(file.name + ".new")
        temporary.write_text(json.dumps(asdict(trial)), encoding="utf-8")
        temporary.replace(file)
    return trial.threads


def thread_counts(most: int) -> list[int]:
    """Powers of two below ``most``, and ``most``."""
    return [1 << power for power in range(most.bit_length()) if 1 << power < most] + [most]


def _try(bundle: Bundle, load: Callable[[int], Backend]) -> dict[str, float]:
    """Milliseconds of one answer by number of threads; all are loaded, and take turns."""
    counts = thread_counts(cores())
    with contextlib.ExitStack() as stack:
        answers = []
        for count in counts:
            executor = load(count)
            stack.callback(executor.close)
            answers.append(_answer(bundle, executor))
        times = [[answer() for answer in answers] for _ in range(1 + TRIAL_REPEATS)]
    return {str(count): round(min(ms[1:]), 3) for count, *ms in zip(counts, *times, strict=True)}


def _answer(bundle: Bundle, executor: Backend) -> Callable[[], float]:
    """A function that answers a prompt of random rows and returns the milliseconds it took."""
    config = bundle.manifest.config
    visual, text = config.visual_tokens, TRIAL_QUESTION_ROWS
    side = config.vision.image_size
    pixels = np.zeros((1, config.vision.channels, side, side), np.float32)
    rows = np.random.default_rng(0).standard_normal((1, visual + text, config.text.hidden))
    rows = (rows / 32).astype(executor.rows_dtype)
    order = np.arange(visual + text + TRIAL_ANSWER_TOKENS, dtype=np.int32)[None]
    chain = Chain(bundle.manifest.plan, executor)

    def segment(start: int, stop: int, is_visual: bool) -> AppendedRows:
        return AppendedRows(
            is_visual, rows[:, start:stop], order[:, start:stop], order[:, start:stop]
        )

    def answer() -> float:
        for slots in chain.slots:
            slots.rewind(0)
        started = time.perf_counter()
        executor.encode(pixels)
        chain.prefill([segment(0, visual, True), segment(visual, visual + text, False)])
        for step in range(visual + text, visual + text + TRIAL_ANSWER_TOKENS):
            at = order[:, step : step + 1]
            chain.decode(AppendedRows(False, rows[:, :1], at, at))
        return (time.perf_counter() - started) * 1e3

    return answer
