"""Reuse of what was computed before: the prefix once, each image once, a question its own rows.

A stage may be rewound to any point of what it holds, because rows see only rows before them; and
where every cut up to a stage is blind to the question, so are the image's rows there. So a new
question on the same image starts after the image in each of these stages; another image that was
seen before is copied back instead of computed (docs/design.md, "Append rows").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from ..graphs.bundle import Bundle
from ..graphs.chain.chain import Chain
from ..graphs.chain.enter import entered_rows, run_of
from ..graphs.chain.executor import StageResult
from ..graphs.chain.rows import AppendedRows, Prefilled, PrefilledPart, on_axes
from ..graphs.contract import INVISIBLE
from ..graphs.errors import CapacityError
from ..graphs.selectors.edge import ROW_READINGS
from .backends.backend import Backend
from .backends.feeds import Embedding
from .image_cache import ByteCache, CachedPrefix, HeldSlots
from .prompt_parts import (
    PromptImage,
    PromptPart,
    chain_keys,
    ends_image,
    image_rows,
    images_among,
    tail_of,
    visual_rows,
)
from .stored_prefix import StoredPrefix

PATCHES_BYTES = 1 << 20
"""Limit of what is remembered of the patches that entered: their places, for people to see."""


@dataclass(frozen=True)
class PendingPrefix:
    """A prompt up to an image whose caches only the stages themselves hold: (first slot, one past
    the last) in each of them, and the rows that the next one needs.
    """

    begin: int
    spans: tuple[tuple[int, int], ...]
    parts: tuple[PrefilledPart, ...]


class Context:
    """Prompts through the chain, computing only what is new.

    ``cached``: where images are kept, perhaps for other contexts, too. ``fused``: an image that was
    not seen before goes through stage 0 together with its question.
    """

    def __init__(
        self,
        bundle: Bundle,
        executor: Backend,
        cached: ByteCache[CachedPrefix],
        *,
        fused: bool = False,
    ):
        self.executor, self.fused = executor, fused
        self.max_positions = bundle.manifest.config.text.max_positions
        self.embed = Embedding(bundle, executor.rows_dtype)
        self.chain = Chain(bundle.manifest.plan, executor, padding=executor.padding)
        self.cached = cached
        self.pending: dict[str, PendingPrefix] = {}
        self.current_key: str | None = None  # of the parts up to an image that the stages hold now
        self.patches: ByteCache[np.ndarray] = ByteCache(PATCHES_BYTES)  # of images by their key
        self.length = 0  # rows of the prompt and the answer so far, those of images included
        self.lag = 0  # by how much positions are behind that number
        self.tail: list[int] = []  # ids of its text behind the last image, and of the answer
        self.prefix = StoredPrefix(bundle, self.chain)

    def orders_of(self, parts: Sequence[PromptPart]) -> int:
        """Return how many orders a prompt takes: all its rows before pruning, unless the plan
        renumbers those that enter.
        """
        runs = (part.rows for part in parts if isinstance(part, PromptImage))
        visual = sum(self.chain.plan.span_of(rows) for rows in runs)
        return self.text_rows_of(parts) + visual

    def lag_of(self, parts: Sequence[PromptPart]) -> int:
        """Return by how much positions behind these parts are behind orders."""
        runs = [part for part in parts if isinstance(part, PromptImage)]
        return sum(self.chain.plan.lag_of(own.rows, own.layout.advance[own.run]) for own in runs)

    def text_rows_of(self, parts: Sequence[PromptPart]) -> int:
        """Return how many rows of a prompt are text."""
        return sum(len(part) for part in parts if not isinstance(part, PromptImage))

    def entered(self, parts: Sequence[PromptPart]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return of each image of the prompt that the stages hold the positions of its rows, and
        the patches that they stand for (``Encoded``).
        """
        slots = self.chain.slots[self.chain.plan.entry_stage]
        out: list[tuple[np.ndarray, np.ndarray]] = []
        visual = np.sort(slots.order[0, slots.visual[0]])
        for index in images_among(parts):
            part, first = parts[index], self.orders_of(parts[:index])
            assert isinstance(part, PromptImage)
            span = self.chain.plan.span_of(part.rows)
            at = visual[(visual >= first) & (visual < first + span)]
            patches = self._patches_of(part, at - first + part.layout.spans[part.run][0])
            if part.run:
                before = out.pop()
                at, patches = np.append(before[0], at), np.append(before[1], patches)
            out.append((at, patches))
        return out

    def _patches_of(self, image: PromptImage, places: np.ndarray) -> np.ndarray:
        """Return the patches of an image's rows at ``places``, counted from its first position."""
        plan = self.chain.plan
        if plan.span == plan.visual_tokens:
            return places
        known = self.patches.get(image.key)
        return image.encoded().patches[0] if known is None else known

    def ensure_capacity(self, parts: Sequence[PromptPart], max_tokens: int) -> None:
        """Have the executor choose engines in which prompt and answer fit.

        Raises:
            CapacityError: it has none.
        """
        self.keep()
        if self.executor.prepare(self.slots_for(parts, max_tokens)):
            self.reset()

    def slots_for(self, parts: Sequence[PromptPart], max_tokens: int) -> list[int]:
        """Return the slots that a prompt and its answer take in each stage."""
        text = self.text_rows_of(parts) + max_tokens
        return [text + rows for rows in visual_rows(self.chain.plan, image_rows(parts))]

    def advance(self, parts: Sequence[PromptPart]) -> None:
        """Bring every stage that is blind to questions to the end of the last image of ``parts``,
        computing only what is new.
        """
        begin, rest = self.prefix.part_from(parts)
        images = images_among(rest)
        if self.chain.plan.whole_prompt:  # without the question nothing can be computed
            for index in images:
                rest[index].encoded()  # type: ignore[union-attr]
            return
        self._run(begin, rest[: max(images, default=-1) + 1])

    def check_room(self, parts: Sequence[PromptPart], max_tokens: int) -> None:
        """Refuse a prompt that, with its answer, is longer than the model's context.

        Raises:
            CapacityError: says how many tokens there is room for.
        """
        rows, context = self.orders_of(parts), self.max_positions
        if rows + max_tokens > context:
            advice = (
                f"Ask for at most {context - rows} tokens"
                if rows < context
                else "Shorten the prompt"
            )
            visual = rows - self.text_rows_of(parts)
            raise CapacityError(
                f"the prompt takes {rows} rows ({visual} of them visual) and max_tokens "
                f"{max_tokens}, the model's context is {context}. {advice}"
            )

    def opening_key(self, parts: Sequence[PromptPart]) -> str:
        """Return the key of ``parts``, which end in their only image."""
        begin, rest = self.prefix.part_from(parts)
        return chain_keys(begin, self.chain.plan.blind_stages, rest)[-1]

    def computed(self, parts: Sequence[PromptPart]) -> CachedPrefix | None:
        """Advance to the end of ``parts``, which end in their only image; return what is there.

        None under a plan that compares all rows of a prompt.
        """
        self.advance(parts)
        if self.chain.plan.whole_prompt:
            return None
        key = self.opening_key(parts)
        pending, cached = self.pending.get(key), self.cached.get(key)
        if pending is not None:
            return self._copied(pending)
        assert cached is not None, "what is not pending was copied back"
        return cached

    def prefill(self, parts: Sequence[PromptPart]) -> Prefilled:
        """Run a whole prompt, whose last part is text; the result has its last row's logits."""
        begin, rest = self.prefix.part_from(parts)
        done, stages = self._run(begin, rest)
        self.length = self.orders_of(parts)
        self.lag = self.lag_of(parts)
        self.tail = tail_of(parts)
        for stage in range(stages, len(self.chain.slots)):
            self.chain.slots[stage].rewind(begin)
            self._trim(stage, begin, rest)
        prefilled = self.chain.finish(done, stages - 1)
        prefilled.logits = np.asarray(prefilled.logits)
        return prefilled

    def decode(self, token: int) -> np.ndarray:
        """Append one token; return the logits (V,) of the next."""
        row = AppendedRows(False, self.embed([token]), *self.next_places([token]))
        return np.asarray(self.chain.decode(row))[0]

    def next_places(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Count rows of ``ids`` behind all others; return positions and orders, (1, Q) each."""
        at = np.arange(self.length, self.length + len(ids), dtype=np.int32)[None]
        self.length += len(ids)
        self.tail += ids
        return at - self.lag, at

    def go_on(self, ids: Sequence[int]) -> np.ndarray:
        """Make ``ids`` the text behind the last image, in every stage as it is: no edge selects
        again. Computes only what is new; returns the logits (V,) of the last row.
        """
        known = zip(self.tail, ids[:-1], strict=False)  # the last row has to run
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], known)))
        self.length -= len(self.tail) - same
        for slots in self.chain.slots:
            order = slots.order[0, : slots.used]
            later = (order >= self.length) & (order != INVISIBLE)
            slots.rewind(int(np.argmax(later)) if later.any() else slots.used)
        self.tail, new = self.tail[:same], list(ids[same:])
        segment = AppendedRows(False, self.embed(new), *self.next_places(new))
        for stage in range(len(self.chain.slots)):
            (done,) = self.chain.append(stage, [segment], padded=True)
            segment = done.leaving
        return np.asarray(done.result.logits)[0]

    def use(self, executor: Backend) -> None:
        """Go on with another executor, whose caches hold what this one's did."""
        self.executor = self.chain.executor = executor

    def keep(self) -> None:
        """Copy what was computed for images out of the stages, before something else goes there.

        An answer leaves those slots alone, so this can wait until its last token is out.
        """
        for key, pending in self.pending.items():
            whole = self._copied(pending)
            self.cached.put(key, whole, whole.nbytes)
        self.pending.clear()

    def reset(self) -> None:
        """Forget what the stages hold; images that were copied out of them stay known."""
        self.chain.forget()
        self.pending.clear()
        self.current_key, self.prefix.rows = None, 0
        self.length, self.tail = 0, []

    def clear(self) -> None:
        """Forget everything that was computed."""
        self.cached.clear()
        self.reset()

    def _run(self, begin: int, parts: Sequence[PromptPart]) -> tuple[list[PrefilledPart], int]:
        """Take ``parts`` through the stages that are blind to what is asked about their images.

        Returns what the last of these stages made of them, as far as a next one needs it, and the
        number of these stages.
        """
        self.keep()
        if self.prefix.hold(begin, self.executor):
            self.current_key = None
        images = [] if self.chain.plan.whole_prompt else images_among(parts)
        count = sum(ends_image(parts[index]) for index in images)
        stages = self.chain.plan.blind_stages_of(count)
        opening = images[-1] + 1 if images else 0
        keys = chain_keys(begin, stages, parts[:opening])
        for part in parts:
            if isinstance(part, PromptImage) and part.known and part.known[0] in keys:
                key, prefix = part.known
                if key not in self.cached:
                    self.cached.put(key, prefix, prefix.nbytes)
        known, done = self._resume(begin, stages, keys)
        resumed = [slots.used for slots in self.chain.slots[:stages]]
        for stage in range(stages):
            self._trim(stage, begin, parts)
        new = [self._segment(begin, parts, index) for index in range(known, len(parts))]
        # Padding among rows that are copied out would take slots from every later question.
        padded = len(parts) > opening and (not known or known == opening)
        passed = [self._enter(new)]
        for stage in range(1, stages):
            passed.append(self.chain.cross(stage - 1, passed[-1], padded=padded))
        for index in images:
            if index >= known and ends_image(parts[index]):
                held = [segment for segment in new[: index - known + 1] if segment.count]
                self._suspend(keys[index], begin, done, passed, held, resumed)
        return [*done, *passed[-1]], stages

    def _enter(self, segments: Sequence[AppendedRows]) -> list[PrefilledPart]:
        """Append segments to stage 0, in the plan's calls; ``fused`` joins the last two. Of a run
        nothing may have entered.
        """
        segments = [segment for segment in segments if segment.count]
        calls = self.chain.calls_of(segments)
        kinds = [segment.visual for segment in segments[-2:]]
        if self.fused and len(calls) > 1 and kinds == [True, False]:
            calls[-2:] = [[*calls[-2], *calls[-1]]]
        done = []
        for call in calls:
            question = call is calls[-1] and len(call) == 1 and not call[0].visual
            done += self.chain.append(0, call, padded=question)
        return done

    def _segment(self, begin: int, parts: Sequence[PromptPart], index: int) -> AppendedRows:
        """Return the rows of a part with their places in the prompt."""
        part, first = parts[index], begin + self.orders_of(parts[:index])
        lag = self.lag_of(parts[:index])
        if isinstance(part, PromptImage):
            encoded = part.encoded()
            self.patches.put(part.key, encoded.patches[0], encoded.patches.nbytes)
            own = run_of(encoded, part.layout, part.run)
            entered = entered_rows(self.chain.plan, own, first, part.layout, lag)
            return replace(entered, joins=part.run > 0)
        order = np.arange(first, first + len(part), dtype=np.int32)[None]
        prefix = index < min(images_among(parts), default=0)
        behind = parts[index + 1] if index + 1 < len(parts) else None
        joins = isinstance(behind, PromptImage) and behind.run > 0
        return AppendedRows(False, self.embed(part), order - lag, order, prefix=prefix, joins=joins)

    def _suspend(
        self,
        key: str,
        begin: int,
        done: Sequence[PrefilledPart],
        passed: Sequence[Sequence[PrefilledPart]],
        segments: Sequence[AppendedRows],
        resumed: Sequence[int],
    ) -> None:
        """Note where the stages hold a prompt up to an image, the last of ``segments``.

        ``passed``: what each stage was given since it was ``resumed`` there, in the order of slots.
        """
        texts = sum(not segment.visual for segment in segments)
        spans, mine = [], passed[0][: len(segments)]
        for stage, parts in enumerate(passed):
            if stage:  # visual rows first, then all text
                mine = parts[: texts + sum(part.segment.visual for part in parts)]
            start = begin if resumed[stage] > begin or not mine else mine[0].start
            spans.append((start, mine[-1].end if mine else resumed[stage]))
        last = len(passed) == len(self.chain.slots)
        needed = () if last else (*done, *(_bare(part) for part in mine))
        self.pending[key] = PendingPrefix(begin, tuple(spans), needed)
        # Behind padding it may be used once more only after it was copied.
        self.current_key = key if all(start == begin for start, _ in spans) else None

    def _copied(self, pending: PendingPrefix) -> CachedPrefix:
        """Copy what the stages hold."""
        held = []
        for stage, (start, stop) in enumerate(pending.spans):
            slots = self.chain.slots[stage]
            caches = self.executor.snapshot(stage, start, stop) if stop > start else {}
            places, kinds = slots.order[0, start:stop], slots.visual[0, start:stop]
            held.append(HeldSlots(places.copy(), kinds.copy(), caches))
        rows, readings, inject = None, {}, {}
        order, visual, positions = np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.int32)
        if pending.parts:
            segments = [part.segment for part in pending.parts]
            order = np.concatenate([segment.order[0] for segment in segments])
            visual = np.repeat([s.visual for s in segments], [s.count for s in segments])
            axes = self.executor.axes
            at = [on_axes(segment.positions, axes)[0] for segment in segments]
            positions = np.concatenate(at)
            results = [part.result for part in pending.parts]
            rows = self._joined([result.rows for result in results])
            readings = {
                name: self._joined([result.readings[name] for result in results])
                for name in results[0].readings
            }
            seen = [segment.inject for segment in segments if segment.visual]
            first = self.chain.plan.stages[len(pending.spans)].layers[0]
            later = [layer for layer in (seen[0] if seen else ()) if layer >= first]
            inject = {layer: self._joined([own[layer] for own in seen]) for layer in later}
        of_rows = order, visual, positions
        return CachedPrefix(pending.begin, tuple(held), rows, *of_rows, readings, inject)

    def _joined(self, parts: Sequence[Any]) -> Any:
        """Return one copy: a slice of a call's result would keep all of it alive."""
        whole = self.executor.concatenate(parts)
        return self.executor.take(whole, np.arange(whole.shape[1]))

    def _trim(self, stage: int, begin: int, parts: Sequence[PromptPart]) -> None:
        """Give up slots that an earlier prompt needed, if ``parts`` leave most of them free."""
        visual = visual_rows(self.chain.plan, image_rows(parts))
        text = begin + self.text_rows_of(parts)
        slots = self.chain.slots[stage]
        extra = visual[stage] + text if stage else self.chain.plan.stages[0].visual_tokens
        slots.shrink(self.executor.trim_slots(stage, slots.used, slots.used + extra))

    def _resume(
        self, begin: int, stages: int, keys: Sequence[str]
    ) -> tuple[int, list[PrefilledPart]]:
        """Rewind the stages to the end of the longest run of parts that they hold or that is kept.

        Returns the number of these parts, and what the last of the stages made of them.
        """
        for count in range(len(keys), 0, -1):
            key = keys[count - 1]
            cached = self.cached.get(key)
            if cached is None:
                continue
            for stage, held in enumerate(cached.stages):
                slots = self.chain.slots[stage]
                if self.current_key != key:
                    slots.rewind(begin)
                    self.chain.reserve(stage, len(held.order))
                    slots.fill(held.order, held.visual)
                    self.executor.restore(stage, begin, held.caches)
                slots.rewind(begin + len(held.order))
            self.current_key = key
            return count, cached.parts()
        for slots in self.chain.slots[:stages]:
            slots.rewind(begin)
        self.current_key = None
        return 0, []


def _bare(part: PrefilledPart) -> PrefilledPart:
    """Return a part without what no later stage needs of it; a question reads its own rows."""
    of_visual = [name for name in part.result.readings if ROW_READINGS[name] == "visual"]
    readings = {name: part.result.readings[name] for name in of_visual}
    result = StageResult(part.result.rows, None, None, readings)
    return replace(part, segment=replace(part.segment, rows=None), result=result)
