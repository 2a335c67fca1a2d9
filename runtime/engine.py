"""A loaded bundle that answers many callers at once.

    with Engine(Bundle.open("engines/demo"), lanes=8) as engine:
        ticket = engine.submit("photo.jpg", "How many?")      # from any thread
        for piece in ticket: ...
        print(ticket.answer.text)

One thread runs the graphs. A question that is let in takes a lane: the caches of a prompt, which
go through the stages alone. Answers are written together, one token of each in one call of every
stage, so that weights are read once for all of them. Between two calls of a prompt that goes
through the stages, answers under way get their next tokens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..graphs.bundle import Bundle
from ..graphs.chain.executor import GRAPH_CALLS, Encoded
from ..graphs.chain.lanes import decode_lanes
from ..graphs.chain.rows import Prefilled
from ..graphs.errors import BusyError, TargetError, VisistageError
from .backends.backend import Backend
from .image_cache import ByteCache
from .loaded import Images, LoadedBundle, Question
from .opened_image import Opened
from .reuse import Context
from .settings import AnswerSettings
from .text.sampling import whole_number
from .ticket import Cancelled, Ticket
from .writing import AnswerWriter

logger = logging.getLogger(__name__)

DEFAULT_LANES = 8

DEFAULT_QUEUE = 64

ROOM = 64
"""Tokens, at most, that answers under way have room for before a prompt is computed: caches do not
grow, and so move, while it is."""

GAP_MS = 100
"""Answers under way wait no longer than this for their next token, and one call of a stage."""


class Interrupted:
    """An executor that calls ``between`` before every call of a graph."""

    def __init__(self, executor: Any, between: Callable[[], None]):
        self._executor, self._between = executor, between

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._executor, name)
        return partial(self._call, value) if name in GRAPH_CALLS else value

    def _call(self, method: Callable[..., Any], *given: Any) -> Any:
        self._between()
        return method(*given)


@dataclass(frozen=True)
class Written:
    """An answer under way: its ticket, its writer, and the prompt's prefill."""

    ticket: Ticket
    writer: AnswerWriter
    prefilled: Prefilled


class Engine(LoadedBundle):
    """See the module; any thread may ask, and close.

    Args:
        bundle: an opened one.
        lanes: answers that are written at once.
        queue: questions that may wait for a lane.
        gap_ms: how long answers under way wait for a token while a new prompt is computed, plus one
            call of a stage.
        options: those of ``LoadedBundle``.

    Attributes:
        steps, tokens: calls that wrote tokens, and tokens that they wrote.

    Raises:
        VisistageError: the bundle cannot run here, or an option cannot be used.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        lanes: int = DEFAULT_LANES,
        queue: int = DEFAULT_QUEUE,
        gap_ms: float = GAP_MS,
        **options: Any,
    ):
        self.lanes = whole_number("lanes", lanes, 1, TargetError)
        self.queue = whole_number("queue", queue, 1, TargetError)
        self.gap = gap_ms / 1e3
        # None where one lane is asked for: then any back end will do.
        super().__init__(bundle, lanes=lanes if lanes > 1 else None, **options)
        whole: Any = self.executor
        split = lanes > 1
        own = [whole.of_lanes(lane, 1) if split else whole for lane in range(lanes)]
        self._alone = [Interrupted(executor, self._between) for executor in own]
        self._together = [whole.of_lanes(0, 1 + lane) if split else whole for lane in range(lanes)]
        self.prefixes: ByteCache[Any] = ByteCache(self.prefix_bytes)
        self._contexts = [Context(bundle, executor, self.prefixes) for executor in self._alone]
        self.context = self._contexts[0]
        self.steps = self.tokens = 0
        self._running: list[Written] = []  # by lane
        self._waiting: deque[Ticket] = deque()
        self._entering: Ticket | None = None
        self._filled: Backend = self.executor  # of its lane
        self._stepped = 0.0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="visistage engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        image: Images,
        prompt: Question,
        settings: AnswerSettings | None = None,
        *,
        notify: Callable[[Ticket], None] | None = None,
        **given: Any,
    ) -> Ticket:
        """Take a question about an image, several, or none; the caller's thread decodes them.

        Args:
            image: one image, several, or None.
            prompt: as in ``Session.stream``.
            settings: of the answer.
            notify: called in the engine's thread when there is a new piece, or the end.
            **given: fields of ``AnswerSettings``, which count more than ``settings``.

        Raises:
            PromptError, ImageError, CapacityError: the input cannot be used.
            BusyError: as many questions as may wait are waiting, or the engine is closing.
        """
        started = time.perf_counter()
        chosen = replace(settings or AnswerSettings(), **given)
        self._check_open()
        opened, preprocess_ms = self.decode_images(image)
        parts = self.prompt_parts(prompt, opened)
        self.context.check_room(parts, chosen.max_tokens)
        request = chosen.request(self, parts, started, preprocess_ms)
        ticket = Ticket(request, notify)
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self.queue:
                raise BusyError(
                    f"{len(self._waiting)} questions are waiting, as many as may (queue="
                    f"{self.queue}). Ask again in a moment"
                )
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def encode_image(self, opened: Opened) -> Encoded:
        """Return the visual rows of an image, by the executor of the lane that is being filled."""
        return self.encoded_by(self._filled, opened)

    def load(self) -> dict[str, int]:
        """Return how many questions wait, how many are being answered, and the lanes."""
        with self._changed:
            entering = self._entering is not None
            return {
                "waiting": len(self._waiting),
                "running": len(self._running) + entering,
                "lanes": self.lanes,
            }

    @property
    def closed(self) -> bool:
        """Return whether no more questions are taken, be it that an error ended the thread."""
        return self._closing

    def close(self, *, drain: bool = False) -> None:
        """Free graphs and caches, once what is under way is answered (``drain``) or cancelled."""
        with self._changed:
            self._closing = True
            if not drain:
                for ticket in self._tickets():
                    ticket.cancel()
                if self._entering is not None:
                    self._entering.cancel()
            self._changed.notify_all()
        self._thread.join()

    def _tickets(self) -> list[Ticket]:
        """Return the tickets that wait or are being answered."""
        return [*self._waiting, *(written.ticket for written in self._running)]

    def _check_open(self) -> None:
        if self._closing:
            raise BusyError("the engine is closing and takes no more questions")

    def _work(self) -> None:
        """Let questions in and write answers, until closed."""
        self.executor.activate()
        try:
            while True:
                with self._changed:
                    while not (self._waiting or self._running):
                        if self._closing:
                            return
                        self._changed.wait()
                    self._entering = self._next()
                if self._entering is not None:
                    self._enter(self._entering)
                if self._running:
                    self._step()
        finally:
            self._closing = True
            for ticket in self._tickets():
                ticket.end(error=BusyError("the engine was closed"))
            self.visual_rows.clear()
            for context in self._contexts:
                context.clear()
            self.executor.close()

    def _next(self) -> Ticket | None:
        """Take the question that waited longest out of the queue, if a lane is free."""
        while self._waiting and len(self._running) < self.lanes:
            ticket = self._waiting.popleft()
            if not ticket.cancelled:
                return ticket
            ticket.end(error=Cancelled("the question was cancelled"))
        return None

    def _enter(self, ticket: Ticket) -> None:
        """Take a prompt through the stages, and its first token out of them."""
        lane = len(self._running)
        context, ticket.began = self._contexts[lane], True
        self._filled = context.executor
        try:
            request = ticket.request
            wanted = context.slots_for(request.parts, min(ROOM, request.max_tokens))
            if not lane:
                self._trim(wanted)
            self._reserve()
            if self.lanes > 1:
                for stage, slots in enumerate(wanted):
                    context.executor.ensure_slots(stage, slots)
            context.executor.reset_elapsed()
            context.ensure_capacity(request.parts, request.max_tokens)
            done = context.prefill(request.parts)
            context.keep()  # other lanes may be asked about the same image
            written = Written(ticket, AnswerWriter(self, request), done)
            self._write(written, context, done.logits[0])
        except BaseException as error:
            self._fail(ticket, context, error)
        finally:
            with self._changed:
                self._entering = None
        if not ticket.over.is_set():
            with self._changed:
                self._move(lane, len(self._running))  # lanes may have become free meanwhile
                self._running.append(written)

    def _reserve(self) -> None:
        """Make room for the next tokens of all answers under way at once: growth copies them all,
        and every slot costs every step.
        """
        for context, own in zip(self._contexts, self._running, strict=False):
            left = own.ticket.request.max_tokens - len(own.writer.tokens)
            for stage in range(len(context.chain.slots)):
                context.chain.reserve(stage, min(ROOM, left))

    def _trim(self, wanted: Sequence[int]) -> None:
        """Give up slots that longer prompts needed, for attention pays for all there are.

        Nothing is under way. Images that were computed are copied out of them before.
        """
        if self.lanes == 1:
            return  # the context does it
        executor: Any = self.executor
        for stage, slots in enumerate(wanted):
            if executor.store.slots(stage) > 2 * executor.store.rounded(slots):
                for context in self._contexts:
                    context.keep()
                    context.reset()
                executor.store.resize(stage, slots, 0)

    def _between(self) -> None:
        """Write the next tokens if they are due, while a prompt is on its way."""
        if self._entering is not None and self._entering.cancelled:
            raise Cancelled("the question was cancelled")
        due = self._running and time.perf_counter() - self._stepped > self.gap
        if due and all(context.chain.free for context in self._contexts[: len(self._running)]):
            self._step()

    def _step(self) -> None:
        """Write one token of every answer under way."""
        for lane in reversed(range(len(self._running))):
            ticket = self._running[lane].ticket
            if ticket.cancelled:
                self._fail(ticket, None, Cancelled("the answer was cancelled"))
                self._leave(lane)
        count = len(self._running)
        if not count:
            return
        contexts, written = self._contexts[:count], list(self._running)
        if self.lanes > 1 and not all(context.chain.free for context in contexts):
            self._reserve()
        try:
            logits = self._decode(contexts, [own.writer.tokens[-1] for own in written])
        except BaseException as error:
            for own, context in zip(written, contexts, strict=True):
                self._fail(own.ticket, context, error)
            with self._changed:
                self._running.clear()
            return
        finally:
            self._stepped = time.perf_counter()
        self.steps, self.tokens = self.steps + 1, self.tokens + count
        for lane in reversed(range(count)):
            try:
                self._write(written[lane], contexts[lane], logits[lane])
            except BaseException as error:
                self._fail(written[lane].ticket, contexts[lane], error)
            if written[lane].ticket.over.is_set():
                self._leave(lane)

    def _decode(self, contexts: Sequence[Context], tokens: Sequence[int]) -> np.ndarray:
        """Append one token to the prompt of each lane; return the logits (B, V)."""
        places = [
            context.next_places([token]) for context, token in zip(contexts, tokens, strict=True)
        ]
        logits = decode_lanes(
            [context.chain for context in contexts],
            self._together[len(contexts) - 1],
            contexts[0].embed(tokens).swapaxes(0, 1),
            np.concatenate([position for position, _ in places]),
            np.concatenate([order for _, order in places]),
        )
        return np.asarray(logits)

    def _write(self, written: Written, context: Context, logits: np.ndarray) -> None:
        """Choose an answer's next token, and hand out what it adds."""
        writer = written.writer
        piece = writer.take(logits)
        if len(writer.tokens) == 1:
            writer.note_graphs(context.executor.reset_elapsed())
        written.ticket.put(piece)
        if writer.finish is not None:
            written.ticket.end(writer.answer(context, written.prefilled))

    def _fail(self, ticket: Ticket, context: Context | None, error: BaseException) -> None:
        """End a ticket with an error; what its stages hold, half done, is forgotten."""
        if context is not None:
            context.reset()
        if not isinstance(error, VisistageError):
            logger.error("an answer failed", exc_info=error)
        ticket.end(error=error)

    def _leave(self, lane: int) -> None:
        """Free a lane; the last one takes its place, so that those in use stay side by side."""
        with self._changed:
            last = len(self._running) - 1
            self._move(last, lane)
            self._running[lane] = self._running[last]
            self._running.pop()

    def _move(self, source: int, target: int) -> None:
        """Move a prompt to another lane, whose own is forgotten."""
        if source == target:
            return
        moved, freed = self._contexts[source], self._contexts[target]
        freed.reset()
        executor: Any = self.executor
        executor.store.move(source, target, [slots.used for slots in moved.chain.slots])
        self._contexts[source], self._contexts[target] = freed, moved
        moved.use(self._alone[target])  # type: ignore[arg-type]
        freed.use(self._alone[source])  # type: ignore[arg-type]
