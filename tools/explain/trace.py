"""One answer, observed: what the last prompt row took from each visual token in every layer.

Stages return their last row's queries, caches hold keys and values. So no other graphs run than
those that answer: the calls of a prefill are observed, and afterwards NumPy reads the caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graphs.chain.executor import StageResult, observed
from ...runtime.backends.feeds import stored_cache_scales
from ..profile.timing import repeated
from .readings import Gates, LayerReading, read_row, unread

if TYPE_CHECKING:
    from ...runtime.answer import Answer, Timings
    from ...runtime.session import Session

TIMED_RUNS = 5
"""Timed runs of each bundle, fewer where they would take longer than ``SECONDS``."""

SECONDS = 30.0


@dataclass(frozen=True)
class LayerTrace(LayerReading):
    """One layer's reading by visual token of the prompt, all images counted through.

    present: (N,) bool, whether the token was there; norms, cosines: (N,), 0 and 1 where it was not.
    """

    present: np.ndarray


@dataclass(frozen=True)
class Timing:
    """Medians over ``runs`` runs that started with nothing but the prefix paid for, in ms."""

    runs: int
    first_token_ms: float
    per_token_ms: float | None
    total_ms: float


@dataclass(frozen=True)
class Trace:
    """An answer and what is behind it.

    kept: indices of the tokens that the last selection kept; None where there was none.
    """

    answer: Answer
    layers: tuple[LayerTrace, ...]
    kept: tuple[int, ...] | None
    timing: Timing


@dataclass(frozen=True)
class TracedCall:
    """One call of a stage, as far as it is needed later."""

    last: int  # order of the last row
    queries: np.ndarray  # (layers, H, d)
    slot_order: np.ndarray  # (S,)
    gates: np.ndarray | None  # (gated layers, 2, S)


def trace(session: Session, images: Sequence[Any], question: str, max_tokens: int) -> Trace:
    """Answer ``question`` greedily, and read every layer of its prefill.

    Raises:
        VisistageError: as ``Session.stream``.
    """
    sampling = replace(session.sampling, temperature=0.0)
    calls: list[tuple[int, TracedCall]] = []

    def note(method: str, given: tuple, result: StageResult, *_: float) -> None:
        if method != "append":
            return
        stage, _, _, order, slot_order, _, by_layer = given[:7]
        gates = by_layer["gates"][:, :, 0].copy() if "gates" in by_layer else None
        queries = np.array(result.queries)[:, 0]
        calls.append((stage, TracedCall(int(order[0, -1]), queries, slot_order[0].copy(), gates)))

    with observed(session.executor, note):
        first = session.infer(images, question, max_tokens=1, sampling=sampling)
    last = session.context.length - 1  # position of the prompt's last row
    prefill = {stage: call for stage, call in calls if call.last == last}
    numbers = _token_numbers(first)
    layers = _read(session, prefill, last, numbers, first.plan.visual_tokens)
    kept = first.plan.kept
    if kept is not None:
        kept = tuple(numbers[at] for at in kept if at in numbers)
    answers = repeated(  # for the clock; the observed run was the warm-up
        lambda: session.infer(images, question, max_tokens=max_tokens, sampling=sampling),
        TIMED_RUNS,
        SECONDS,
    )
    return Trace(answers[0], layers, kept, _timing([answer.timings for answer in answers]))


def _token_numbers(answer: Answer) -> dict[int, int]:
    """Return the number of the visual token at each position, over all images.

    A class row that entered is no token of the image, and is left out.
    """
    numbers, before = {}, 0
    for shown in answer.shown:
        for position, patch in zip(shown.positions, shown.patches, strict=True):
            if patch >= 0:
                numbers[int(position)] = before + int(patch)
        before += shown.count
    return numbers


def _read(
    session: Session,
    prefill: Mapping[int, TracedCall],
    last: int,
    numbers: Mapping[int, int],
    count: int,
) -> tuple[LayerTrace, ...]:
    """Read every layer of a prefill that ends with the row at position ``last``.

    ``numbers``: of ``count`` visual tokens by their position.
    """
    chain = session.context.chain
    layers, scales = [], stored_cache_scales(session.bundle)
    for index, stage in enumerate(chain.plan.stages):
        call = prefill[index]
        slots = len(call.slot_order)
        visible = call.slot_order <= last
        known = np.isin(call.slot_order, list(numbers))
        visual = np.flatnonzero(chain.slots[index].visual[0, :slots] & visible & known)
        tokens = np.array([numbers[int(at)] for at in call.slot_order[visual]], np.int64)
        caches = session.executor.snapshot(index, 0, slots)
        queries = dict(zip(stage.attention_layers, call.queries, strict=False))  # one may be ahead
        for layer in range(*stage.layers):
            if layer not in queries:  # dropped: nothing is attended to
                layers.append(_by_token(unread(len(visual)), tokens, count))
                continue
            gates = None
            if layer in stage.gated_layers:
                assert call.gates is not None
                pair = call.gates[stage.gated_layers.index(layer)]
                gates = Gates(pair[0], pair[1], stage.norm == "renorm")
            keys, values = _floats(caches, layer, scales[layer])
            reading = read_row(queries[layer], keys, values, visible, visual, gates)
            layers.append(_by_token(reading, tokens, count))
    return tuple(layers)


def _floats(
    caches: Mapping[str, Any], layer: int, scales: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Return keys and values (G, S, d) of a layer as its attention reads them."""
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
    return LayerTrace(**vars(replace(reading, norms=norms, cosines=cosines)), present=present)


def _timing(timings: Sequence[Timings]) -> Timing:
    steps = [timing.per_token_ms for timing in timings if timing.per_token_ms is not None]
    return Timing(
        len(timings),
        median(timing.first_token_ms for timing in timings),
        median(steps) if steps else None,
        median(timing.total_ms for timing in timings),
    )
