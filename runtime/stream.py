"""An answer as it is made: an iterator over its pieces.

Every piece is a turn of the session's, so that several threads may hold streams and ask questions.
Only one answer can be under way: a newer question ends an older stream, which says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..graphs.errors import VisistageError
from ..graphs.plan.cost import Geometry
from .answer import Answer, ShownTokens, Timings, plan_facts
from .image.overlay import Grid
from .reuse import PromptImage, PromptPart
from .text.detokenize import TextStream
from .text.sampling import Sampling, choose

if TYPE_CHECKING:
    from .session import Session


@dataclass(frozen=True)
class AnswerRequest:
    """A prompt, and the options of its answer, checked."""

    parts: list[PromptPart]
    max_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling


class Stream(Iterator[str]):
    """Iterator over the pieces of one answer; ``answer`` is the whole once they are out.

    A newer question on the session interrupts it: its next step raises a VisistageError. ``close``,
    or the end of a ``with`` block, ends it early; what was not asked for is not computed, and
    ``answer`` stays None.
    """

    def __init__(
        self, session: Session, request: AnswerRequest, started: float, preprocess_ms: float
    ):
        self.answer: Answer | None = None
        self._session, self._turn = session, session.turn
        self._pieces: Iterator[str] | None = self._run(request, started, preprocess_ms)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __next__(self) -> str:
        if self._pieces is None:
            raise StopIteration
        with self._session.taking_turns():
            if self.answer is None and self._turn != self._session.turn:
                raise VisistageError(
                    "this stream was interrupted by a newer question on the same session. "
                    "Finish a stream before asking again, or load the bundle twice"
                )
            with self._session.computing():
                piece = next(self._pieces, None)
        if piece is None:
            self.close()
            raise StopIteration
        return piece

    def close(self) -> None:
        """End the stream here; another call changes nothing."""
        self._pieces = None

    def _run(self, request: AnswerRequest, started: float, preprocess_ms: float) -> Iterator[str]:
        session, parts, sampling = self._session, request.parts, request.sampling
        context, executor = session.context, session.executor
        executor.reset_elapsed()
        done = context.prefill(parts)
        random = sampling.rng()
        text = TextStream(session.encoder.tokenizer, request.stop)
        history = session.ids_of(parts)
        tokens: list[int] = []
        pieces: list[str] = []
        finish = "length"
        logits = done.logits[0]
        first_ms, graphs_ms = 0.0, {}
        while True:
            token = choose(logits, sampling, history, random)
            if not tokens:
                first_ms = (time.perf_counter() - started) * 1e3
                graphs_ms = executor.reset_elapsed()
            tokens.append(token)
            history.append(token)
            if token in session.eos:
                finish = "eos"
                break
            piece = text.push(token)
            if piece:
                pieces.append(piece)
                yield piece
            if text.stopped:
                finish = "stop"
                break
            if len(tokens) == request.max_tokens:
                break
            logits = context.decode(token)
        rest = text.finish()
        if rest:
            pieces.append(rest)
        total_ms = (time.perf_counter() - started) * 1e3
        per_token = (total_ms - first_ms) / (len(tokens) - 1) if len(tokens) > 1 else None
        manifest = session.bundle.manifest
        grid = Grid.of(manifest.config)
        keys = [part.key for part in parts if isinstance(part, PromptImage)]
        tokens_of_image = manifest.config.visual_tokens
        offered, entered = tokens_of_image * len(keys), context.entered(parts)
        self.answer = Answer(
            text="".join(pieces).strip(),
            tokens=tuple(tokens),
            finish=finish,
            timings=Timings(preprocess_ms, graphs_ms, first_ms, per_token, total_ms),
            plan=plan_facts(
                manifest.plan,
                Geometry.of(manifest.config.text),
                done,
                visual_tokens=offered,
                prompt_rows=context.text_rows_of(parts) + offered,
                entered=[int(at) for positions, _ in entered for at in positions],
            ),
            shown=tuple(
                ShownTokens(key, positions, patches, tokens_of_image, grid)
                for key, (positions, patches) in zip(keys, entered, strict=True)
            ),
        )
        if rest:
            yield rest
        context.keep()
