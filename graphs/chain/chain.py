"""The chain, seen from the host: which rows go to which stage, in what order, under which gates.

NumPy only, and the same for torch, ONNX Runtime and TensorRT: an ``Executor`` runs graphs, this
module owns positions, orders, slots and gates. One prefill reads:

    stage 0    text, image, text, ...      one call per kind: a call holds rows of one kind only
    edge 0     the last row selects K visual rows
    stage 1    [K visual | all text rows]  one merged call, visibility follows from the orders
    edge 1     vision leaves
    stage 2    text rows

Visual rows that arrive at a stage without visual tokens pass it by: nothing is called for them,
they take no slots, and go on as they were. Those that no layer of a stage changes serve it: their
keys and values get slots, and nothing else runs for them.

Source: docs/design.md, "Append rows" and "Text-blind layers"; gates: docs/methods.md, "Gated and
renormalised masks".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..contract import INVISIBLE, PADDING_ORDER, row_readings
from ..plan.gains import stage_gains
from ..plan.gates import stage_gates
from ..plan.plan import StagePlan
from ..plan.probing import Decision
from ..selectors.edge import ROW_READINGS
from .executor import Executor, Kept, Rows, StageResult
from .rows import (
    AppendedRows,
    Prefilled,
    PrefilledPart,
    StageSlots,
    all_kept,
    closed_up,
    on_axes,
    places_in,
    row_kinds,
)


class Chain:
    """Runs prompts and decode steps through the stages of ``plan`` on ``executor``.

    Stages that are blind to the question (``StagePlan.blind_stages``) may be advanced alone
    (prefix, images) and rewound, so that an image is paid once and a question costs its own rows.

    ``padding``: how many padding rows the executor wants before so many rows of a stage; by
    default none.
    """

    def __init__(
        self,
        plan: StagePlan,
        executor: Executor,
        batch: int = 1,
        padding: Callable[[int, int], int] | None = None,
    ):
        self.plan, self.executor, self.batch = plan, executor, batch
        self.padding = padding or (lambda stage, count: 0)
        self.slots: list[StageSlots] = []
        self._gates: dict[int, tuple[Any, np.ndarray | None]] = {}
        self.forget()

    def forget(self) -> None:
        """Start again with caches that hold nothing and have no slots yet."""
        self.slots = [
            StageSlots(np.zeros((self.batch, 0), np.int32), np.zeros((self.batch, 0), bool))
            for _ in self.plan.stages
        ]

    def reserve(self, stage: int, extra: int) -> None:
        """Make sure ``extra`` more rows fit into a stage's cache; other lanes may have grown it."""
        slots = self.slots[stage]
        slots.grow(self.executor.ensure_slots(stage, slots.used + extra))

    @property
    def free(self) -> int:
        """Rows that still fit into every stage's cache as it is."""
        return min(slots.order.shape[1] - slots.used for slots in self.slots)

    def append(
        self, stage: int, parts: Sequence[AppendedRows], *, padded: bool = False
    ) -> list[PrefilledPart]:
        """Append segments to a stage in one call; several only where it has no gates. Visual rows
        that no layer changes are none of the call's.

        ``padded``: with the padding that the executor wants, for a call that ends in a question.
        Of each part's result, ``queries`` and ``logits`` are those of the call's last row.
        """
        done = [self._unchanged(stage, part) for part in parts]
        running = [part for part, own in zip(parts, done, strict=True) if own is None]
        if not running:
            return [part for part in done if part is not None]
        # Padding behind rows that serve would be copied with them, where text stands before them.
        padded = padded and (len(running) == 1 or not self.plan.stages[stage].serves)
        count = sum(part.count for part in running)
        whole, start = self._append(stage, running, self.padding(stage, count) if padded else 0)
        at, rest = 0, []
        for part in running:
            result, own = whole, slice(at, at + part.count)
            if len(running) > 1:
                readings = {name: values[:, own] for name, values in whole.readings.items()}
                result = whole._replace(rows=whole.rows[:, own], readings=readings)
            rest.append(PrefilledPart(part, result, start + own.start, start + own.stop))
            at = own.stop
        ran = iter(rest)
        return [next(ran) if own is None else own for own in done]

    def _unchanged(self, stage: int, part: AppendedRows) -> PrefilledPart | None:
        """Return visual rows that pass a stage by, or serve it, once they have; None: they run."""
        facts, start = self.plan.stages[stage], self.slots[stage].used
        if not part.visual or (facts.visual_tokens and not facts.serves):
            return None
        rows = part.rows
        if facts.serves:
            self.reserve(stage, part.count)
            self.slots[stage].write(part)
            inject = self._inject(stage, [part])
            rows = self.executor.serve(stage, rows, part.positions, start, inject)
        return PrefilledPart(part, StageResult(rows, None, None), start, self.slots[stage].used)

    def cross(
        self,
        stage: int,
        parts: Sequence[PrefilledPart],
        done: Prefilled | None = None,
        *,
        padded: bool = True,
    ) -> list[PrefilledPart]:
        """Take parts that ``stage`` has seen over the edge behind it and through the next stage.

        Visual rows that go on come first, then all text; nothing is called where nothing goes on.
        ``done`` notes what the edge decides; ``padded``: as in ``append``.
        """
        visual = self._over_edge(stage, parts, done or Prefilled())
        text = [part.leaving for part in parts if not part.segment.visual]
        moved = text if visual is None else [visual, *text]
        return self.append(stage + 1, moved, padded=padded) if moved else []

    def finish(self, parts: Sequence[PrefilledPart], stage: int = 0) -> Prefilled:
        """Take ``parts`` from the end of ``stage`` to the logits of the last row.

        They are those of the prompt that later stages have not seen; stages up to ``stage``, which
        are blind to the question, may have seen more of it than is among them.
        """
        seen = [int(slots.visual.sum(1).max()) for slots in self.slots[: stage + 1]]
        done = Prefilled(visual_tokens=seen)
        for count, slots, edge in zip(seen[1:], self.slots[1:], self.plan.edges, strict=False):
            if edge.op == "select" and count:
                done.kept.append(slots.order[:, slots.visual[0]])
        if self.plan.probe is not None and seen[0]:
            assert self.batch == 1, "a plan that decides per prompt takes them one by one"
            done.decision = Decision(self.plan.probe)
        for index in range(stage, len(self.plan.edges)):
            parts = self.cross(index, parts, done)
            seen.append(sum(part.end - part.start for part in parts if part.segment.visual))
        done.logits = parts[-1].result.logits
        return done

    def prefill(self, segments: Sequence[AppendedRows]) -> Prefilled:
        """Run a whole prompt; its last segment must be text."""
        calls = self.calls_of(segments)
        return self.finish([part for call in calls for part in self.append(0, call)])

    def calls_of(self, segments: Sequence[AppendedRows]) -> list[list[AppendedRows]]:
        """Return the calls of stage 0 that a prompt's segments make: one each, unless the plan
        compares all rows of a prompt. Runs of one image and the markers between them are one call
        where no gates tell them apart.
        """
        if self.plan.whole_prompt:
            return [[*segments]]
        calls: list[list[AppendedRows]] = []
        for segment in segments:
            if calls and segment.joins and not self.plan.stages[0].gated_layers:
                calls[-1].append(segment)
            else:
                calls.append([segment])
        return calls

    def decode(self, segment: AppendedRows) -> Any:
        """Run one step of text rows through every stage; return the logits (B, V)."""
        for stage in range(len(self.plan.stages)):
            result, _ = self._append(stage, [segment], decoding=True)
            segment = replace(segment, rows=result.rows)
        return result.logits

    def _append(
        self,
        stage: int,
        parts: Sequence[AppendedRows],
        padding: int = 0,
        decoding: bool = False,
    ) -> tuple[StageResult, int]:
        """Append segments in one call; return its result and the first row's slot.

        Padding is invisible, has position 0 and no rows: the executor puts any there.
        """
        gated = self.plan.stages[stage].gated_layers
        assert not gated or len(parts) == 1, "a call under gates holds one kind"
        self.reserve(stage, padding + sum(part.count for part in parts))
        slots = self.slots[stage]
        write_index = slots.used
        rows = [part.rows for part in parts]
        if padding:
            blank = np.zeros((self.batch, padding), np.int32)
            parts = [AppendedRows(False, None, blank, blank + INVISIBLE), *parts]
        for part in parts:
            slots.write(part)
        seen = [part for part in parts if part.visual]
        inject = self._inject(stage, seen)
        first = all(part.visual for part in parts[bool(padding) :][: len(seen)])
        assert first or not inject, "rows that something is added to come first"
        result = self.executor.append(
            stage,
            rows[0] if len(rows) == 1 else self.executor.concatenate(rows),
            self._positions(parts),
            # As queries, invisible rows see all, so that they stay finite.
            np.minimum(np.concatenate([part.order for part in parts], 1), PADDING_ORDER),
            slots.order,
            write_index,
            self._by_layer(stage, parts, decoding),
            inject,
        )
        return result, write_index + padding

    def _over_edge(
        self, stage: int, parts: Sequence[PrefilledPart], done: Prefilled
    ) -> AppendedRows | None:
        """Return the visual rows that go on behind ``stage``; None where vision has left."""
        seen = [part for part in parts if part.segment.visual]
        op = self.plan.edges[stage].op
        if not seen or op == "drop":
            return None
        visual = self._joined(stage + 1, [part.leaving for part in seen])
        if op == "carry":
            return visual
        if op == "select" and visual.count < (self.plan.edges[stage].keep or 0):
            done.kept.append(visual.order)
            return all_kept(self.plan, visual)
        slots = _slot_numbers([(part.start, part.segment.count) for part in seen], self.batch)
        queries, query_order = parts[-1].result.queries, parts[-1].segment.order[:, -1]
        if op == "probe":
            self._read(stage, done, queries, visual, slots, query_order)
            return self._decided(stage, done, visual)
        read = {"probe_query": queries[-1], "text_order": parts[-1].segment.order}
        given = {"visual": seen, "text": parts[-1:]}
        for name in row_readings(self.plan, stage):
            values = [part.result.readings[name] for part in given[ROW_READINGS[name]]]
            read[name] = self.executor.concatenate(values)
        kept = self._select(stage, read, visual, slots, query_order)
        done.kept.append(kept.order)
        inject = self._taken(visual.inject, places_in(visual.order, kept.order))
        positions = kept.positions
        if self.plan.positions == "renumbered":
            positions = closed_up(visual, positions.shape[1])
        return AppendedRows(True, kept.rows, positions, kept.order, inject)

    def _joined(self, stage: int, parts: Sequence[AppendedRows]) -> AppendedRows:
        """Return one segment, for ``stage``, from several of visual rows."""
        return AppendedRows(
            True,
            self.executor.concatenate([part.rows for part in parts]),
            self._positions(parts),
            np.concatenate([part.order for part in parts], 1),
            self._inject(stage, parts, on=True),
        )

    def _positions(self, parts: Sequence[AppendedRows]) -> np.ndarray:
        return np.concatenate([on_axes(part.positions, self.executor.axes) for part in parts], 1)

    def _inject(
        self, stage: int, parts: Sequence[AppendedRows], *, on: bool = False
    ) -> dict[int, Rows]:
        """Return what is added to visual ``parts`` in ``stage``; ``on``: and in later ones."""
        first, stop = self.plan.stages[stage].layers
        own = [part.inject for part in parts]
        return {
            layer: self.executor.concatenate([rows[layer] for rows in own])
            for layer in (own[0] if own else ())
            if first <= layer and (on or layer < stop)
        }

    def _taken(self, inject: Mapping[int, Rows], index: np.ndarray) -> dict[int, Rows]:
        """Return rows ``index`` (K,) or (B, K) of what is added to rows."""
        return {layer: self.executor.take(rows, index) for layer, rows in inject.items()}

    def _by_layer(
        self, stage: int, parts: Sequence[AppendedRows], decoding: bool
    ) -> dict[str, np.ndarray]:
        """Return gates and gains of a call, as far as the stage takes any."""
        facts = self.plan.stages[stage]
        controls = {
            "gates": self._stage_gates(stage, parts[-1].visual, decoding),
            "row_gain": stage_gains(facts, row_kinds(parts)) if facts.masked else None,
        }
        return {name: values for name, values in controls.items() if values is not None}

    def _stage_gates(self, stage: int, visual_call: bool, decoding: bool) -> np.ndarray | None:
        """Return the gates of a call; the last ones again where their sources are unchanged, as in
        the steps of an answer.
        """
        if not self.plan.stages[stage].gated_layers:
            return None
        visual = self.slots[stage].visual
        key = (visual.shape, visual.tobytes(), visual_call, decoding)
        known = self._gates.get(stage)
        if known is None or known[0] != key:
            gates = stage_gates(self.plan, stage, visual, visual_call, decoding)
            known = self._gates[stage] = (key, gates)
        return known[1]

    def _select(self, edge, read, visual, visual_slots, query_order) -> Kept:
        return self.executor.select(
            edge,
            {
                **read,
                "slot_order": self.slots[edge].order,
                "query_order": np.ascontiguousarray(query_order),
                "visual_slots": visual_slots,
                "rows": visual.rows,
                "positions": visual.positions,
                "order": visual.order,
            },
        )

    def _read(self, stage, done, queries, visual, visual_slots, query_order) -> None:
        """Show the probes of a stage's layers to the decision."""
        decision, layers = done.decision, self.plan.stages[stage].attention_layers
        real = visual.order[0] != INVISIBLE
        for layer in self.plan.probed_layers(stage):
            if decision.settled:
                return
            cosines, norms = self.executor.probe(
                stage,
                layer,
                queries[layers.index(layer)],
                self.slots[stage].order,
                np.ascontiguousarray(query_order),
                visual_slots,
            )
            cosines, norms = cosines[0][real], norms[0][real]
            if decision.kept is not None and not done.kept:  # selected, but not at an edge yet
                cosines, norms = cosines[decision.kept], norms[decision.kept]
            decision.read(layer, cosines, norms)

    def _decided(self, stage: int, done: Prefilled, visual: AppendedRows) -> AppendedRows | None:
        """Return the visual rows that go on after a probed edge; None where vision has left."""
        decision = done.decision
        assert decision is not None
        if decision.kept is not None and not done.kept:
            done.selected_after = stage
            visual = self._padded(
                visual, decision.kept, decision.probe.rows_for(len(decision.kept))
            )
            done.kept.append(visual.order)
        return None if decision.exit is not None or not visual.count else visual

    def _padded(self, visual: AppendedRows, kept: np.ndarray, count: int) -> AppendedRows:
        """Return rows ``kept`` of ``visual``, and as many invisible ones as make ``count``."""
        index = np.pad(kept, (0, count - len(kept)))  # padding repeats a row that no row sees
        order = np.where(np.arange(count) < len(kept), visual.order[:, index], INVISIBLE)
        return AppendedRows(
            True,
            self.executor.take(visual.rows, index),
            visual.positions[:, index],
            order.astype(np.int32),
            self._taken(visual.inject, index),
        )


def _slot_numbers(runs: Sequence[tuple[int, int]], batch: int) -> np.ndarray:
    """Return the (B, N) int64 slot of every row, from (start, count) runs shared by the batch."""
    numbers = [slot for start, count in runs for slot in range(start, start + count)]
    return np.broadcast_to(np.array(numbers, np.int64), (batch, len(numbers)))
