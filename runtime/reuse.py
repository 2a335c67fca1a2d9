"""Reuse of what was computed before: the prefix once, each image once, a question its own rows.

Stage 0 may be rewound to any point of what it holds, because rows see only rows before them. So a
new question on the same image starts after the image; another image that was seen before is copied
back instead of computed (docs/design.md, "Append rows").
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from ..graphs.bundle import Bundle
from ..graphs.chain.chain import AppendedRows, Chain, Prefilled
from ..graphs.chain.executor import Rows, StageResult
from ..graphs.plan.plan import StagePlan
from .backends.backend import Backend
from .backends.feeds import Embedding, map_tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class PromptImage:
    """An image in a prompt: the key of its pixels, and a function for its visual rows (1, N, D)."""

    key: str
    rows: Callable[[], Rows]


PromptPart = Sequence[int] | PromptImage
"""A stretch of a prompt: token ids, or an image."""


@dataclass(frozen=True)
class PrefilledPart:
    """A part of a prompt after stage 0: its rows, their result, and the first slot they took."""

    segment: AppendedRows
    result: StageResult
    start: int

    @property
    def end(self) -> int:
        """The first slot after it."""
        return self.start + self.segment.count


@dataclass(frozen=True)
class CachedPrefix:
    """Stage 0 up to and including an image: its parts, and its caches from slot ``begin`` on."""

    parts: tuple[PrefilledPart, ...]
    begin: int
    caches: dict[str, Any]

    @property
    def end(self) -> int:
        """The first slot after it."""
        return self.parts[-1].end

    @property
    def nbytes(self) -> int:
        """Bytes this takes in the cache."""
        rows = sum(part.result.rows.nbytes for part in self.parts)
        return rows + sum(cache.nbytes for cache in self.caches.values())


class ByteCache(Generic[Value]):
    """Keeps the values last used whose sizes together stay within ``limit`` bytes.

    A value larger than the limit is not kept at all.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self._items: OrderedDict[str, tuple[Value, int]] = OrderedDict()

    def get(self, key: str) -> Value | None:
        """Return the value, now the most recently used; None when it is not (or no longer) here."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key][0]

    def put(self, key: str, value: Value, nbytes: int) -> None:
        """Keep ``value``, dropping the least recently used until it fits."""
        self.drop(key)
        if nbytes > self.limit:
            return
        while self.nbytes + nbytes > self.limit:
            self.drop(next(iter(self._items)))
        self._items[key] = (value, nbytes)
        self.nbytes += nbytes

    def drop(self, key: str) -> None:
        """Forget ``key`` if it is here."""
        _, nbytes = self._items.pop(key, (None, 0))
        self.nbytes -= nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._items.clear()
        self.nbytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)


class Context:
    """Prompts through the chain, computing only what is new.

    ``fused``: an image that was not seen before goes through stage 0 together with its question.
    """

    def __init__(self, bundle: Bundle, executor: Backend, cache_bytes: int, *, fused: bool = False):
        self.executor, self.fused = executor, fused
        self.visual_tokens = bundle.manifest.config.visual_tokens
        self.embed = Embedding(bundle, executor.rows_dtype)
        self.chain = Chain(bundle.manifest.plan, executor, padding=executor.padding)
        self.cached: ByteCache[CachedPrefix] = ByteCache(cache_bytes)
        self.pending: dict[str, CachedPrefix] = {}  # whose caches only stage 0 itself holds
        self.current_key: str | None = None  # of the parts up to an image that stage 0 holds now
        self.length = 0  # rows of the prompt and the answer so far, pruned ones counted
        self.prefix = bundle.manifest.prefix
        self.prefix_rows = 0  # rows of the prefix in the first slots of every stage
        self.saved = self._map_prefix(bundle) if self.prefix else []

    def rows_of(self, parts: Sequence[PromptPart]) -> int:
        """Return how many rows a prompt takes before pruning."""
        return sum(self.visual_tokens if isinstance(p, PromptImage) else len(p) for p in parts)

    def visual_rows_of(self, parts: Sequence[PromptPart]) -> int:
        """Return how many of them are visual."""
        return self.visual_tokens * sum(isinstance(part, PromptImage) for part in parts)

    def ensure_capacity(self, parts: Sequence[PromptPart], max_tokens: int) -> None:
        """Have the executor choose engines in which prompt and answer fit.

        Raises:
            CapacityError: it has none.
        """
        self.keep()
        visual = self.visual_rows_of(parts)
        text = self.rows_of(parts) - visual + max_tokens
        needs = [text + rows for rows in visual_rows(self.chain.plan, visual)]
        if self.executor.prepare(needs):
            self.reset()

    def advance(self, parts: Sequence[PromptPart]) -> None:
        """Bring stage 0 to the end of the last image of ``parts``, computing only what is new."""
        self._advance(*self._after_prefix(parts))

    def prefill(self, parts: Sequence[PromptPart]) -> Prefilled:
        """Run a whole prompt, whose last part is text; the result has its last row's logits."""
        begin, rest = self._after_prefix(parts)
        fused = self.fused and len(rest) > 1 and isinstance(rest[-2], PromptImage)
        done = self._advance(begin, rest, rest[-1] if fused else None)
        for part in rest[len(done) :]:
            done += self._append(part, padded=part is rest[-1])
        self.length = self.rows_of(parts)
        seen = visual_rows(self.chain.plan, self.visual_rows_of(rest))
        text = self.length - seen[0]
        for stage, visual in enumerate(seen[1:], start=1):
            self.chain.slots[stage].rewind(begin)
            self._trim(stage, visual + text)
        prefilled = self.chain.finish(
            [part.segment for part in done],
            [part.result for part in done],
            [part.start for part in done],
        )
        prefilled.logits = np.asarray(prefilled.logits)
        return prefilled

    def decode(self, token: int) -> np.ndarray:
        """Append one token; return the logits (V,) of the next."""
        at = np.full((1, 1), self.length, np.int32)
        self.length += 1
        return np.asarray(self.chain.decode(AppendedRows(False, self.embed([token]), at, at)))[0]

    def keep(self) -> None:
        """Copy what was computed for images out of stage 0, before something else goes there.

        An answer leaves those slots alone, so this can wait until its last token is out.
        """
        for key, cached in self.pending.items():
            caches = self.executor.snapshot(0, cached.begin, cached.end)
            whole = replace(cached, caches=caches)
            self.cached.put(key, whole, whole.nbytes)
        self.pending.clear()

    def reset(self) -> None:
        """Forget what the stages hold; images that were copied out of them stay known."""
        self.chain.forget()
        self.pending.clear()
        self.current_key, self.prefix_rows = None, 0

    def clear(self) -> None:
        """Forget everything that was computed."""
        self.cached.clear()
        self.reset()

    def _advance(
        self, begin: int, parts: Sequence[PromptPart], question: PromptPart | None = None
    ) -> list[PrefilledPart]:
        """Do as ``advance``; ``question``: goes in one call with the last image if that is new."""
        self.keep()
        self._hold_prefix(begin)
        last = max((i for i, part in enumerate(parts) if isinstance(part, PromptImage)), default=-1)
        keys = _chain_keys(begin, parts[: last + 1])
        done = self._resume(begin, keys)
        self._trim(0, self.visual_tokens)
        for index in range(len(done), last + 1):
            fused = [question] if index == last and question is not None else []
            done += self._append(parts[index], *fused)
            if isinstance(parts[index], PromptImage):
                # Stage 0's input rows are not needed again; its slots and its output rows are.
                bare = [
                    replace(part, segment=replace(part.segment, rows=None))
                    for part in done[: index + 1]
                ]
                self.pending[keys[index]] = CachedPrefix(tuple(bare), begin, {})
                self.current_key = keys[index]
        return done

    def _trim(self, stage: int, extra: int) -> None:
        """Give up slots that an earlier prompt needed, if ``extra`` more rows leave most free."""
        slots = self.chain.slots[stage]
        slots.shrink(self.executor.trim_slots(stage, slots.used, slots.used + extra))

    def _map_prefix(self, bundle: Bundle) -> list[dict[str, np.ndarray]]:
        """Map the stored keys and values, by stage; nothing is read yet."""
        assert self.prefix is not None
        stored = {"key": self.prefix.keys, "value": self.prefix.values}
        arrays = {name: map_tensor(bundle, ref) for name, ref in stored.items()}
        return [
            {
                f"{name}.{layer}": array[layer][None]
                for layer in range(*stage.layers)
                for name, array in arrays.items()
            }
            for stage in self.chain.plan.stages
        ]

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
        """Return the slot where this prompt starts, and what of it is not prefix."""
        head = parts[0]
        if self.prefix is None or isinstance(head, PromptImage):
            return 0, list(parts)
        ids = self.prefix.ids
        if tuple(head[: len(ids)]) != ids:
            return 0, list(parts)
        rest = head[len(ids) :]
        return len(ids), [*([rest] if len(rest) else []), *parts[1:]]

    def _resume(self, begin: int, keys: list[str]) -> list[PrefilledPart]:
        """Rewind stage 0 to the end of the longest run of parts that it holds or that is kept."""
        slots = self.chain.slots[0]
        for key in reversed(keys):
            cached = self.cached.get(key)
            if cached is None:
                continue
            if self.current_key != key:
                slots.rewind(begin)
                self.chain.reserve(0, cached.end - begin)
                for part in cached.parts:
                    slots.write(part.segment)
                self.executor.restore(0, begin, cached.caches)
                self.current_key = key
            slots.rewind(cached.end)
            return list(cached.parts)
        slots.rewind(begin)
        self.current_key = None
        return []

    def _append(self, *parts: PromptPart, padded: bool = False) -> list[PrefilledPart]:
        """Append parts to stage 0, several in one call."""
        slots = self.chain.slots[0]
        start = slots.used
        first = int(slots.order[0, :start].max(initial=-1)) + 1
        segments: list[AppendedRows] = []
        for part in parts:
            rows = part.rows() if isinstance(part, PromptImage) else self.embed(part)
            order = np.arange(first, first + rows.shape[1], dtype=np.int32)[None]
            segments.append(AppendedRows(isinstance(part, PromptImage), rows, order, order))
            first += rows.shape[1]
        if len(segments) > 1:
            results = self.chain.append_fused(0, segments)
        else:
            append = self.chain.append_padded if padded else self.chain.append
            results = [append(0, segments[0])]
        done = []
        for segment, result in zip(segments, results, strict=True):
            done.append(PrefilledPart(segment, result, start))
            start += segment.count
        return done


def visual_rows(plan: StagePlan, visual_tokens: int) -> list[int]:
    """Return the most visual rows that each stage may hold of a prompt with so many tokens."""
    counts = [visual_tokens]
    for stage, edge in zip(plan.stages[1:], plan.edges, strict=True):
        if edge.op == "select":
            counts.append(min(counts[-1], stage.visual_tokens))
        else:
            counts.append(0 if edge.op == "drop" else counts[-1])
    return counts


def _chain_keys(begin: int, parts: Sequence[PromptPart]) -> list[str]:
    """Return the key of everything up to each part: ids, images and, by their counts, positions."""
    digest = hashlib.sha256(str(begin).encode())
    keys = []
    for part in parts:
        text = f"image:{part.key}" if isinstance(part, PromptImage) else f"ids:{list(part)}"
        digest.update(f"|{text}".encode())
        keys.append(digest.copy().hexdigest())
    return keys
