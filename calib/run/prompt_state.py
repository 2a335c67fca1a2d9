"""One prompt on its way through the layers of a plan: its rows, calls and what it selected.

Where ``graphs.chain.chain.Chain`` holds the caches of all stages at once, a ``PromptState`` holds
the rows of the stage it is in, and a cache for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...graphs.chain.enter import entered_rows, positioned
from ...graphs.chain.executor import Encoded
from ...graphs.chain.rows import (
    AppendedRows,
    StageSlots,
    all_kept,
    closed_up,
    on_axes,
    places_in,
    row_kinds,
)
from ...graphs.contract import PADDING_ORDER
from ...graphs.errors import CapacityError, PromptError
from ...graphs.modules.decoder import ROW_PIECES, Head, layer_controls
from ...graphs.modules.ops import Eager, Scales
from ...graphs.modules.select import Prober, Selector
from ...graphs.plan.gains import stage_gains
from ...graphs.plan.gates import stage_gates
from ...graphs.plan.plan import StagePlan
from ...graphs.plan.stages import Stage
from ...graphs.selectors.edge import ROW_READINGS, Rows
from ...graphs.text_config import TextConfig
from ..sample_prompts import SampleImage, SamplePrompt

ENCODER, VISUAL, TEXT, ANSWER = range(4)
"""Kinds of rows: those of the vision encoder, and three in the decoder."""


@dataclass
class _Call:
    """Rows that go through a stage's layers together.

    shared: cosines, sines, visibility, then gates and gains of layers (``decoder.Head``). The rows
    take slots [start, stop). serves: no layer of the stage changes them (``Stage.serves``).
    """

    segments: list[AppendedRows]
    rows: Tensor
    shared: tuple[Tensor, ...]
    start: int
    stop: int
    is_answer: bool
    serves: bool


class LastRowView(NamedTuple):
    """The last prompt row's view of one layer; shapes as ``contract.probe_spec``, B = 1.

    key, value: FP32; of an INT8 cache, what it represents. readings: what else the edge behind the
    layer reads, by name (``contract.select_spec``).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    slot_order: Tensor
    query_order: Tensor
    visual_slots: Tensor
    readings: Mapping[str, Tensor]

    def read(self, prober: Prober) -> tuple[np.ndarray, np.ndarray]:
        """Return the cosine without each visual token, and the norm of its contribution: (N,)."""
        cosine, norm = prober(*self[:-1])
        return cosine[0].numpy(), norm[0].numpy()


class PromptState:
    """A prompt, and its answer where it is known.

    Args:
        begin: rows of the prefix, which take the first slots of every stage.
        segments: the rest of the prompt.
        answer: rows of the answer.
    """

    def __init__(self, begin: int, segments: Sequence[AppendedRows], answer: AppendedRows | None):
        self.begin = begin
        self._parts = [[segment] for segment in segments]  # of the next stage's calls
        self._answer = answer
        self._calls: list[_Call] = []
        self._selected: AppendedRows | None = None
        self._passing: list[AppendedRows] = []  # visual rows that the stage is not for
        self.turned = np.zeros(0, np.float32)  # (Q,) cosine of rows before and behind the layer

    @property
    def sees(self) -> bool:
        """True if visual rows run through this stage."""
        return bool(self._slots.visual.any())

    @property
    def answer_rows(self) -> int:
        """A."""
        return 0 if self._answer is None else self._answer.count

    def enter(self, plan: StagePlan, stage: int, head: Head) -> None:
        """Lay out the calls and slots of a stage; visual rows may pass it by."""
        self._passing = []
        if not plan.stages[stage].visual_tokens:
            self._passing = [part for parts in self._parts for part in parts if part.visual]
            texts = [[part for part in parts if not part.visual] for parts in self._parts]
            self._parts = [parts for parts in texts if parts]
        facts = plan.stages[stage]
        if facts.serves:
            self._parts = [own for parts in self._parts for own in _served_apart(parts)]
        calls = [(parts, False) for parts in self._parts]
        if self._answer is not None:
            calls.append(([self._answer], True))
        slots = StageSlots(np.zeros((1, 0), np.int32), np.zeros((1, 0), bool))
        slots.grow(self.begin + sum(part.count for parts, _ in calls for part in parts))
        order = np.arange(self.begin, dtype=np.int32)[None]
        slots.write(AppendedRows(False, None, order, order))
        self._calls = []
        for parts, is_answer in calls:
            start = slots.used
            for part in parts:
                slots.write(part)
            used = slots.used
            gates = stage_gates(plan, stage, slots.visual[:, :used], parts[0].visual, is_answer)
            rows = torch.cat([part.rows for part in parts], 1)
            gains = stage_gains(facts, row_kinds(parts)) if facts.masked else None
            shared = head(
                rows,
                torch.from_numpy(_positions(parts)),
                torch.from_numpy(
                    # As queries, rows that only fill up see all, so that they stay finite.
                    np.minimum(np.concatenate([part.order for part in parts], 1), PADDING_ORDER)
                ),
                torch.from_numpy(slots.order[:, :used].copy()),
                torch.tensor([start]),
                None if gates is None else torch.from_numpy(gates),
                None if gains is None else torch.from_numpy(gains),
            )
            bare = [replace(part, rows=None) for part in parts]
            serves = facts.serves and parts[0].visual
            self._calls.append(_Call(bare, rows, shared, start, used, is_answer, serves))
        self._slots = slots
        self._parts = []  # the calls hold the rows now

    def kinds(self) -> list[np.ndarray]:
        """Return the kind of each row of each call."""
        return [
            np.concatenate(
                [
                    np.full(s.count, ANSWER if call.is_answer else VISUAL if s.visual else TEXT)
                    for s in call.segments
                ]
            )
            for call in self._calls
        ]

    def inject(self, layer: int) -> None:
        """Add to the rows of every call what is added at the input of a layer."""
        for call in self._calls:
            call.rows = _with_features(call, layer)

    def through(
        self,
        run: Callable[..., Any],
        text: TextConfig,
        stage: Stage,
        layer: int,
        prefix: Tensor | None,
        scales: Scales | None,
        reads: Sequence[str] = (),
    ) -> LastRowView:
        """Take every call through one layer; of one that does not attend, the view is empty.

        Args:
            run: the layer.
            text: shapes of its cache.
            stage: that has it.
            layer: its number.
            prefix: (2, G, P, d) keys and values of the prefix in this layer, as caches keep them.
            scales: of its cache, which is INT8; None: FP32.
            reads: of ``ROW_READINGS``, what the edge behind it reads.
        """
        shape = (1, text.kv_heads, self._calls[-1].stop, text.head_dim)
        dtype = torch.float32 if scales is None else torch.int8
        key, value = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        if self.begin:
            assert prefix is not None
            key[0, :, : self.begin], value[0, :, : self.begin] = prefix
        last: Tensor | None = None
        read: dict[str, list[Tensor]] = {name: [] for name in reads}
        turned: list[Tensor] = []
        for call in self._calls:
            cos, sin, visible, *controls = call.shared
            gates, gains = layer_controls(layer, stage.gated_layers, stage.gained_layers, controls)
            cache = (key[:, :, : call.stop], value[:, :, : call.stop])  # filled in place
            first = torch.tensor([call.start])
            before = call.rows
            if call.serves:
                new = run(call.rows, cos, sin, *[None] * 7)
                for held, rows in zip((key, value), new, strict=False):
                    held[:, :, call.start : call.stop] = rows
                turned.append(torch.ones(before.shape[1]))
                continue
            call.rows, *attended = run(
                call.rows, cos, sin, first, visible, None, *gates, *cache, *gains
            )
            query = attended[0] if attended else torch.empty(1, text.heads, 1, 0)
            if not call.is_answer:
                turned.append(cosine_similarity(before, call.rows, dim=-1)[0])
                last, order = query[:, :, -1], call.segments[-1].order
                for name, parts in read.items():
                    values = ROW_PIECES[name]()(before, call.rows, query)
                    parts += self._of(call, values, ROW_READINGS[name])
        assert last is not None
        self.turned = torch.cat(turned).numpy()
        if scales is not None:
            key, value = Eager().read(key, scales[0]), Eager().read(value, scales[1])
        visual = torch.from_numpy(np.flatnonzero(self._slots.visual[0]))[None]
        readings = {"text_order": torch.from_numpy(order)}
        for name, parts in read.items():
            wanted = parts if ROW_READINGS[name] == "visual" else parts[-1:]
            readings[name] = torch.cat(wanted, 1) if wanted else torch.empty(0)
        return LastRowView(
            last,
            key,
            value,
            torch.from_numpy(self._slots.order),
            torch.from_numpy(order[:, -1].copy()),
            visual,
            readings,
        )

    def ahead(
        self,
        run: Callable[..., Any],
        text: TextConfig,
        stage: Stage,
        layer: int,
        prefix: Tensor | None,
        scales: Scales | None,
    ) -> LastRowView:
        """Return the last row's view of the layer behind the stage, of which ``run`` is an
        ``Ahead``; the rows stay as they are, and the view has no values.
        """

        def beginning(rows, cos, sin, first, visible, window, _, __, key, *___):
            query, _ = run(rows, cos, sin, first, visible, window, key)
            return rows, query

        return self.through(beginning, text, stage, layer, prefix, scales)

    @staticmethod
    def _of(call: _Call, values: Tensor, kind: Rows) -> list[Tensor]:
        """Return of (1, Q, ...) values of a call's rows those of its segments of one kind."""
        counts = [segment.count for segment in call.segments]
        return [
            part
            for segment, part in zip(call.segments, values.split(counts, 1), strict=True)
            if segment.visual == (kind == "visual")
        ]

    def select(self, plan: StagePlan, selector: Selector, view: LastRowView) -> np.ndarray:
        """Choose the visual rows that go on, and return their order (K,).

        ``view`` is of the layer that the selector reads.
        """
        visual = self._joined_visual()
        assert visual is not None
        if visual.count < selector.keep:
            self._selected = all_kept(plan, visual)
            return self._selected.order[0]
        rows, positions, order, _ = selector.of(
            {
                **view.readings,
                **view._asdict(),
                "probe_query": view.query,
                "rows": visual.rows,
                "positions": visual.positions,
                "order": visual.order,
            }
        )
        index = torch.from_numpy(places_in(visual.order, order.numpy())[0])
        inject = {layer: features[:, index] for layer, features in visual.inject.items()}
        at = positions.numpy()
        if plan.positions == "renumbered":
            at = closed_up(visual, len(index))
        self._selected = AppendedRows(True, rows, at, order.numpy(), inject)
        return order[0].numpy()

    def leave(self, drop: bool) -> None:
        """Gather what goes on to the next stage: [visual | text, ...], and the answer.

        ``drop``: the visual rows do not go on.
        """
        visual, texts = self._selected or self._joined_visual(), self._passed(False)
        self._selected = None
        # The last text is the question, which an edge may read: texts stay apart.
        self._parts = [texts if visual is None or drop else [visual, *texts]]
        if self._answer is not None:
            self._answer = replace(self._answer, rows=self._calls[-1].rows)

    def last_rows(self) -> Tensor:
        """Return the rows (1 + A, 1, D) that the head sees: the prompt's last, and the answer's."""
        rows = self._parts[-1][-1].rows[0, -1:]
        if self._answer is not None:
            rows = torch.cat((rows, self._answer.rows[0]))
        return rows[:, None]

    def _passed(self, visual: bool) -> list[AppendedRows]:
        """Return the prompt's segments of one kind as they are now."""
        return (self._passing if visual else []) + [
            replace(segment, rows=rows)
            for call in self._calls
            if not call.is_answer
            for segment, rows in zip(
                call.segments,
                call.rows.split([segment.count for segment in call.segments], 1),
                strict=True,
            )
            if segment.visual == visual
        ]

    def _joined_visual(self) -> AppendedRows | None:
        """Return the prompt's visual rows as they are now; None where it has none."""
        found = self._passed(True)
        if not found:
            return None
        return AppendedRows(
            True,
            torch.cat([segment.rows for segment in found], 1),
            _positions(found),
            np.concatenate([segment.order for segment in found], 1),
            {
                layer: torch.cat([segment.inject[layer] for segment in found], 1)
                for layer in found[0].inject
            },
        )


def _positions(parts: Sequence[AppendedRows]) -> np.ndarray:
    """Return positions of parts (1, Q), or (1, Q, A) where any of them has several."""
    own = [part.positions for part in parts]
    axes = max((each.shape[2] for each in own if each.ndim == 3), default=1)
    return np.concatenate([on_axes(each, axes) for each in own], 1)


def _served_apart(parts: list[AppendedRows]) -> list[list[AppendedRows]]:
    """Return the calls of parts of which the visual ones serve a stage: those, then the text."""
    texts = [part for part in parts if not part.visual]
    return [*([part] for part in parts if part.visual), *([texts] if texts else [])]


def _with_features(call: _Call, layer: int) -> Tensor:
    """Return a call's rows with what is added to them at the input of a layer."""
    if not any(layer in segment.inject for segment in call.segments):
        return call.rows
    counts = [segment.count for segment in call.segments]
    parts = zip(call.segments, call.rows.split(counts, 1), strict=True)
    return torch.cat([rows + segment.inject.get(layer, 0) for segment, rows in parts], 1)


def prompt_state(
    prompt: SamplePrompt,
    visual: Sequence[Encoded],
    plan: StagePlan,
    table: Tensor,
    prefix_ids: Sequence[int],
    max_rows: int,
) -> PromptState:
    """Return a prompt before its first layer.

    Args:
        prompt: texts and images.
        visual: what enters of each of its images.
        plan: says at which positions.
        table: the embedding, (V, D).
        prefix_ids: what a prompt that begins so need not run.
        max_rows: the model's context.

    Raises:
        PromptError: the prompt does not end in text.
        CapacityError: the prompt and its answer are longer than the context.
    """
    parts = list(prompt.parts)
    if not parts or isinstance(parts[-1], SampleImage):
        raise PromptError(f"{prompt.name}: the prompt ends in an image. Ask something about it")
    begin, prefix = 0, tuple(prefix_ids)
    head = parts[0]
    # Where a plan freezes rows before an image, those of a prompt without one are computed anew.
    if not isinstance(head, SampleImage) and (visual or not plan.freezes("prefix")):
        begin = len(prefix) if tuple(head[: len(prefix)]) == prefix else 0
        parts[0] = head[begin:]

    def embedded(ids: Sequence[int]) -> Tensor:
        return table[list(ids)].float()[None]

    images, segments, lags, at = iter(visual), [], [], begin
    for part in parts:
        if isinstance(part, SampleImage):
            layout = part.layout
            segments.append(entered_rows(plan, next(images), at, layout))
            at += plan.span_of(part.rows)
            lags.append(plan.lag_of(part.rows, layout.advance[part.run]))
        elif len(part):  # all of a text may have been prefix
            # An image follows the first text of a prompt that has any.
            opens = bool(visual) and not segments
            segments.append(replace(segment_of(embedded(part), at), prefix=opens))
            at += len(part)
    answer = None
    if prompt.answer_ids:
        answer = segment_of(embedded(prompt.answer_ids), at)
        at += answer.count
    if at > max_rows:
        raise CapacityError(
            f"{prompt.name}: prompt and answer take {at} rows, the model's context is {max_rows}. "
            "Shorten them, or leave the sample out"
        )
    segments, lag = positioned(plan, segments, lags)
    if answer is not None:
        answer = replace(answer, positions=answer.order - lag)
    return PromptState(begin, [segment for segment in segments if segment.count], answer)


def segment_of(rows: Tensor, at: int) -> AppendedRows:
    """Return text rows at consecutive places of a prompt, from ``at`` on."""
    order = np.arange(at, at + rows.shape[1], dtype=np.int32)[None]
    return AppendedRows(False, rows, order, order)
