"""What has been paid for already: the prefix once, each picture once, a question its own rows.

Stage 0 may be rewound to any point of what it holds, because rows see only rows before them. So a
new question on the same picture starts after the picture; another picture that was seen before is
copied back instead of computed (docs/design.md, "Append rows").
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..graphs.bundle import Bundle
from ..graphs.chain.chain import AppendedRows, Chain, Prefilled
from ..graphs.chain.executor import Rows, StageResult
from ..graphs.plan.plan import StagePlan
from .backends.backend import Backend
from .byte_cache import ByteCache
from .tensors import Embedding, map_tensor


@dataclass(frozen=True)
class PromptImage:
    """A picture in a prompt: the key of its pixels, and how to get its visual rows (1, N, D)."""

    key: str
    rows: Callable[[], Rows]


PromptPart = Sequence[int] | PromptImage
"""One stretch of a prompt: token ids, or a picture."""


@dataclass(frozen=True)
class CachedPrefix:
    """Stage 0 up to and including a picture: its segments, results and slots."""

    segments: tuple[AppendedRows, ...]
    results: tuple[StageResult, ...]
    starts: tuple[int, ...]
    begin: int
    end: int
    caches: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes this takes in the cache."""
        rows = sum(result.rows.nbytes for result in self.results)
        return rows + sum(cache.nbytes for cache in self.caches.values())


class Context:
    """Prompts through the chain, without paying twice.

    ``fused``: a picture that was not seen before goes through stage 0 together with its question.
    """

    def __init__(self, bundle: Bundle, executor: Backend, cache_bytes: int, *, fused: bool = False):
        self.executor, self.fused = executor, fused
        self.visual_tokens = bundle.manifest.config.visual_tokens
        self.embed = Embedding(bundle, executor.rows_dtype)
        self.chain = Chain(bundle.manifest.plan, executor, padding=executor.padding)
        self.cached: ByteCache[CachedPrefix] = ByteCache(cache_bytes)
        self.pending: list[
            tuple[str, CachedPrefix]
        ] = []  # paid, but only stage 0 itself holds the caches
        self.current_key: str | None = None  # key of the picture chain that stage 0 holds now
        self.length = 0  # rows of the prompt and the answer so far, pruned ones counted
        self.prefix = bundle.manifest.prefix
        self.prefix_rows = 0  # rows of the prefix that stand in the first slots of every stage
        self.saved = self._map_prefix(bundle) if self.prefix else []

    def rows_of(self, parts: Sequence[PromptPart]) -> int:
        """Rows a prompt takes before pruning."""
        return sum(self.visual_tokens if isinstance(p, PromptImage) else len(p) for p in parts)

    def ensure_capacity(self, parts: Sequence[PromptPart], max_tokens: int) -> None:
        """Have the executor choose engines in which prompt and answer fit.

        Raises:
            CapacityError: it has none.
        """
        self.keep()
        visual_tokens = sum(isinstance(part, PromptImage) for part in parts) * self.visual_tokens
        text = self.rows_of(parts) - visual_tokens + max_tokens
        visual = visual_rows(self.chain.plan, visual_tokens)
        if self.executor.prepare([text + rows for rows in visual]):
            self.chain.forget()
            self.current_key, self.prefix_rows = None, 0

    def advance(
        self, parts: Sequence[PromptPart], question: PromptPart | None = None
    ) -> tuple[list, list, list]:
        """Bring stage 0 to the end of the last picture of ``parts``, paying only what is new.

        Where that picture is new and there is a ``question``, both go in one call.
        """
        self.keep()
        begin, parts = self._after_prefix(parts)
        self._hold_prefix(begin)
        last = max((i for i, part in enumerate(parts) if isinstance(part, PromptImage)), default=-1)
        keys = _chain_keys(begin, parts[: last + 1])
        done, cached = self._resume(begin, keys)
        self._trim(0, self.visual_tokens)
        segments, results, starts = list(cached[0]), list(cached[1]), list(cached[2])
        for index in range(done, last + 1):
            if index == last and question is not None:
                pair = [parts[index], question]
                self._append_fused(pair, keys[index], begin, segments, results, starts)
                continue
            self._append(parts[index], segments, results, starts)
            if isinstance(parts[index], PromptImage):
                end = self.chain.slots[0].used
                self._note(keys[index], begin, end, segments, results, starts)
        return segments, results, starts

    def prefill(self, parts: Sequence[PromptPart]) -> Prefilled:
        """Run a whole prompt; its last part is text. Returns the logits of its last row."""
        begin, rest = self._after_prefix(parts)
        images = [i for i, part in enumerate(rest) if isinstance(part, PromptImage)]
        fused = self.fused and bool(images) and images[-1] == len(rest) - 2
        segments, results, starts = self.advance(parts, rest[-1] if fused else None)
        for part in rest[len(segments) :]:
            self._append(part, segments, results, starts, padded=part is rest[-1])
        self.length = self.rows_of(parts)
        seen = visual_rows(self.chain.plan, len(images) * self.visual_tokens)
        text = self.length - seen[0]
        for stage, visual in enumerate(seen[1:], start=1):
            self.chain.slots[stage].rewind(begin)
            self._trim(stage, visual + text)
        done = self.chain.finish(segments, results, starts)
        done.logits = np.asarray(done.logits)
        return done

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns the logits (V,) of the next."""
        at = np.full((1, 1), self.length, np.int32)
        self.length += 1
        return np.asarray(self.chain.decode(AppendedRows(False, self.embed([token]), at, at)))[0]

    def keep(self) -> None:
        """Copy what was paid for pictures out of stage 0, before something else goes there.

        An answer leaves those slots alone, so this can wait until its last token is out.
        """
        for key, cached in self.pending:
            caches = self.executor.snapshot(0, cached.begin, cached.end)
            whole = replace(cached, caches=caches)
            self.cached.put(key, whole, whole.nbytes)
        self.pending.clear()

    def _trim(self, stage: int, extra: int) -> None:
        """Give up slots that an earlier prompt needed, if ``extra`` more rows leave most free."""
        slots = self.chain.slots[stage]
        slots.shrink(self.executor.trim_slots(stage, slots.used, slots.used + extra))

    def _map_prefix(self, bundle: Bundle) -> list[dict[str, np.ndarray]]:
        """The shipped keys and values, by stage; mapped, not read."""
        assert self.prefix is not None
        keys = map_tensor(bundle, self.prefix.keys)
        values = map_tensor(bundle, self.prefix.values)
        saved = []
        for stage in self.chain.plan.stages:
            layers = range(*stage.layers)
            pairs = {f"key.{layer}": keys[layer][None] for layer in layers}
            saved.append(pairs | {f"value.{layer}": values[layer][None] for layer in layers})
        return saved

    def _hold_prefix(self, begin: int) -> None:
        """Make the first ``begin`` slots of every stage hold the prefix, and nothing else there."""
        if begin == self.prefix_rows:
            return
        self.current_key = None
        order = np.arange(begin, dtype=np.int32)[None]
        for index, slots in enumerate(self.chain.slots):
            slots.rewind(0)
            if begin:
                self.chain.reserve(index, begin)
                slots.write(AppendedRows(False, None, order, order))
                self.executor.restore(index, 0, self.saved[index])
        self.prefix_rows = begin

    def _after_prefix(self, parts: Sequence[PromptPart]) -> tuple[int, list[PromptPart]]:
        """Where this prompt starts in the slots, and what of it is not prefix."""
        head = parts[0]
        if self.prefix is None or isinstance(head, PromptImage):
            return 0, list(parts)
        ids = self.prefix.ids
        if tuple(head[: len(ids)]) != ids:
            return 0, list(parts)
        rest = head[len(ids) :]
        return len(ids), [*([rest] if len(rest) else []), *parts[1:]]

    def _resume(self, begin: int, keys: list[str]) -> tuple[int, tuple]:
        """Rewind stage 0 to the longest picture chain that is live or kept."""
        slots = self.chain.slots[0]
        for index in reversed(range(len(keys))):
            cached = self.cached.get(keys[index])
            if cached is None:
                continue
            if self.current_key != keys[index]:
                slots.rewind(begin)
                self.chain.reserve(0, cached.end - begin)
                for segment in cached.segments:
                    slots.write(segment)
                self.executor.restore(0, begin, cached.caches)
                self.current_key = keys[index]
            slots.rewind(cached.end)
            return index + 1, (cached.segments, cached.results, cached.starts)
        slots.rewind(begin)
        self.current_key = None
        return 0, ((), (), ())

    def _append(
        self, part: PromptPart, segments: list, results: list, starts: list, padded: bool = False
    ) -> None:
        """Append one part to stage 0 and note it."""
        slots = self.chain.slots[0]
        segment = self._segment(part, int(slots.order[0, : slots.used].max(initial=-1)) + 1)
        starts.append(slots.used)
        segments.append(segment)
        append = self.chain.append_padded if padded else self.chain.append
        results.append(append(0, segment))

    def _append_fused(
        self, parts: Sequence[PromptPart], key: str, begin: int, segments: list, results: list,
        starts: list,
    ) -> None:  # fmt: skip
        """Append a picture and its question in one call, and keep what is the picture's."""
        slots = self.chain.slots[0]
        start = slots.used
        first = int(slots.order[0, :start].max(initial=-1)) + 1
        image = self._segment(parts[0], first)
        question = self._segment(parts[1], first + image.count)
        both = self.chain.append_fused(0, [image, question])
        end = start + image.count
        segments.append(image)
        results.append(both[0])
        starts.append(start)
        self._note(key, begin, end, segments, results, starts)
        segments.append(question)
        results.append(both[1])
        starts.append(end)

    def _segment(self, part: PromptPart, first: int) -> AppendedRows:
        """The rows of one part, their orders and positions counted from ``first``."""
        rows = part.rows() if isinstance(part, PromptImage) else self.embed(part)
        order = np.arange(first, first + rows.shape[1], dtype=np.int32)[None]
        return AppendedRows(isinstance(part, PromptImage), rows, order, order)

    def _note(
        self, key: str, begin: int, end: int, segments: list, results: list, starts: list
    ) -> None:
        """Remember stage 0 up to slot ``end``, right after a picture, for ``keep``."""
        # Stage 0's input rows are not needed again; its slots and its output rows are.
        bare = tuple(replace(segment, rows=None) for segment in segments)
        cached = CachedPrefix(bare, tuple(results), tuple(starts), begin, end, {})
        self.pending.append((key, cached))
        self.current_key = key


def visual_rows(plan: StagePlan, visual_tokens: int) -> list[int]:
    """Most visual rows that each stage may hold of a prompt with ``visual_tokens`` visual
    tokens.
    """
    counts = [visual_tokens]
    for stage, edge in zip(plan.stages[1:], plan.edges, strict=True):
        if edge.op == "select":
            counts.append(min(counts[-1], stage.visual_tokens))
        else:
            counts.append(0 if edge.op == "drop" else counts[-1])
    return counts


def _chain_keys(begin: int, parts: Sequence[PromptPart]) -> list[str]:
    """Key of everything up to each part: ids, pictures and, by their counts, positions."""
    digest = hashlib.sha256(str(begin).encode())
    keys = []
    for part in parts:
        text = f"image:{part.key}" if isinstance(part, PromptImage) else f"ids:{list(part)}"
        digest.update(f"|{text}".encode())
        keys.append(digest.copy().hexdigest())
    return keys
