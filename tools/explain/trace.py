"""One answer, observed: what the last prompt row took from each visual token in every layer.

Stages hand out their last row's queries, caches hold keys and values. So no other graphs run than
those that answer: an executor around the real one notes the calls of a prefill, and afterwards
NumPy reads the caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graphs.chain.chain import Chain
from ...graphs.chain.executor import Executor, StageResult
from ...runtime.backends.feeds import stored_cache_scales
from .readings import Gates, LayerReading, read_row

if TYPE_CHECKING:
    from ...runtime.answer import Answer, Timings
    from ...runtime.session import Session

TIMED_RUNS = 5
"""Timed runs of each bundle, fewer where they would take longer than ``SECONDS``."""

SECONDS = 30.0


@dataclass(frozen=True)
class LayerTrace:
    """One layer's reading by visual token of the prompt, all pictures counted through.

    present: (N,) bool, whether the token was there; norms, cosines: (N,), 0 and 1 where it was not.
    """

    present: np.ndarray
    norms: np.ndarray
    cosines: np.ndarray
    reading: LayerReading


@dataclass(frozen=True)
class Timing:
    """Medians over ``runs`` runs that started with nothing but the prefix paid for, in ms."""

    runs: int
    first_token_ms: float
    per_token_ms: float | None
    total_ms: float


@dataclass(frozen=True)
class Trace:
    """An answer and what lies behind it.

    kept: indices of the tokens that the last selection kept; None where there was none.
    """

    answer: Answer
    layers: tuple[LayerTrace, ...]
    kept: tuple[int, ...] | None
    timing: Timing


@dataclass
class TracedCall:
    """One text call of a stage, as far as it is needed later."""

    stage: int
    last: int  # order of the last row
    queries: np.ndarray  # (layers, B, H, d)
    slot_order: np.ndarray  # (S,)
    gates: np.ndarray | None  # (gated layers, 2, S)


@dataclass
class ObservedExecutor:
    """An ``Executor`` that notes every call of a stage and leaves the work to ``inner``."""

    inner: Executor
    calls: list[TracedCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ensure_slots = self.inner.ensure_slots
        self.select = self.inner.select
        self.probe = self.inner.probe
        self.concatenate = self.inner.concatenate
        self.take = self.inner.take

    def append(
        self,
        stage: int,
        rows: Any,
        positions: np.ndarray,
        order: np.ndarray,
        slot_order: np.ndarray,
        write_index: int,
        gates: np.ndarray | None,
    ) -> StageResult:
        """One call of a stage, noted."""
        result = self.inner.append(stage, rows, positions, order, slot_order, write_index, gates)
        self.calls.append(
            TracedCall(
                stage,
                int(order[0, -1]),
                np.array(result.queries),
                slot_order[0].copy(),
                None if gates is None else gates[:, :, 0].copy(),
            )
        )
        return result


def trace(session: Session, images: Sequence[Any], question: str, max_tokens: int) -> Trace:
    """Answer ``question`` greedily, and read every layer of its prefill.

    Raises:
        VisistageError: as ``Session.stream``.
    """
    sampling = replace(session.sampling, temperature=0.0)
    with _observing(session.context.chain) as calls:
        first = session.infer(images, question, max_tokens=1, sampling=sampling)
    layers, positions = _read(session, calls, first.plan.prompt_rows - 1)
    kept = first.plan.kept
    if kept is not None:
        kept = tuple(int(at) for at in np.searchsorted(positions, kept))
    answers = _repeated(
        lambda: session.infer(images, question, max_tokens=max_tokens, sampling=sampling)
    )
    return Trace(answers[0], layers, kept, _timing([answer.timings for answer in answers]))


@contextmanager
def _observing(chain: Chain) -> Iterator[list[TracedCall]]:
    """The calls that ``chain`` makes inside the block."""
    real = chain.executor
    observed = ObservedExecutor(real)
    chain.executor = observed
    try:
        yield observed.calls
    finally:
        chain.executor = real


def _read(
    session: Session, calls: Sequence[TracedCall], last: int
) -> tuple[tuple[LayerTrace, ...], np.ndarray]:
    """Every layer of the prefill with the last row ``last``, and positions (N,) of its tokens."""
    chain = session.context.chain
    prefill = {call.stage: call for call in calls if call.last == last}
    first = prefill[0].slot_order
    positions = np.sort(first[chain.slots[0].visual[0, : len(first)] & (first <= last)])
    layers, scales = [], stored_cache_scales(session.bundle)
    for index, stage in enumerate(chain.plan.stages):
        call = prefill[index]
        slots = len(call.slot_order)
        visible = call.slot_order <= last
        visual = np.flatnonzero(chain.slots[index].visual[0, :slots] & visible)
        tokens = np.searchsorted(positions, call.slot_order[visual])
        caches = session.executor.snapshot(index, 0, slots)
        for number, layer in enumerate(range(*stage.layers)):
            gates = None
            if layer in stage.gated_layers:
                assert call.gates is not None
                pair = call.gates[stage.gated_layers.index(layer)]
                gates = Gates(pair[0], pair[1], stage.norm == "renorm")
            keys, values = _floats(caches, layer, scales[layer])
            reading = read_row(
                call.queries[number, 0],
                keys,
                values,
                visible,
                visual,
                gates,
            )
            layers.append(_by_token(reading, tokens, len(positions)))
    return tuple(layers), positions


def _floats(
    caches: Mapping[str, Any], layer: int, scales: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Keys and values (G, S, d) of a layer as its attention reads them."""
    out = []
    for what in ("key", "value"):
        cached = np.asarray(caches[f"{what}.{layer}"])[0]
        if scales:
            scale = scales[f"{what}_scale"]
            cached = cached.astype(scale.dtype) * scale[:, None, None]
        out.append(cached)
    return out


def _by_token(reading: LayerReading, tokens: np.ndarray, count: int) -> LayerTrace:
    present, norms = np.zeros(count, bool), np.zeros(count, np.float32)
    cosines = np.ones(count, np.float32)
    present[tokens], norms[tokens], cosines[tokens] = True, reading.norms, reading.cosines
    return LayerTrace(present, norms, cosines, reading)


def _repeated(ask: Callable[[], Answer]) -> list[Answer]:
    """Ask for the clock; the watched run was the warm-up."""
    stop = time.perf_counter() + SECONDS
    answers = [ask()]
    while len(answers) < TIMED_RUNS and time.perf_counter() < stop:
        answers.append(ask())
    return answers


def _timing(timings: Sequence[Timings]) -> Timing:
    steps = [timing.per_token_ms for timing in timings if timing.per_token_ms is not None]
    return Timing(
        len(timings),
        median(timing.first_token_ms for timing in timings),
        median(steps) if steps else None,
        median(timing.total_ms for timing in timings),
    )
