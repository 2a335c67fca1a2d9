"""An answer as it is made: an iterator over its pieces.

Every piece is a turn of the session's, so that several threads may hold streams and ask questions.
Only one answer can be under way: a newer question ends an older stream, which says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..graphs.chain.rows import Prefilled
from ..graphs.errors import VisistageError
from .answer import Answer
from .prompt_parts import PromptPart
from .writing import AnswerRequest, AnswerWriter

if TYPE_CHECKING:
    from .session import Session


class Stream(Iterator[str]):
    """Iterator over the pieces of one answer; ``answer`` is the whole once they are out.

    A newer question on the session interrupts it: its next step raises a VisistageError. ``close``,
    or the end of a ``with`` block, ends it early; what was not asked for is not computed, and
    ``answer`` stays None.
    """

    def __init__(
        self,
        session: Session,
        request: AnswerRequest,
        begin: Callable[[Sequence[PromptPart]], Prefilled],
    ):
        self.answer: Answer | None = None
        self._session, self._turn = session, session.turn
        self._pieces: Iterator[str] | None = self._run(request, begin)

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

    def _run(
        self, request: AnswerRequest, begin: Callable[[Sequence[PromptPart]], Prefilled]
    ) -> Iterator[str]:
        context, executor = self._session.context, self._session.executor
        executor.reset_elapsed()
        done = begin(request.parts)
        writer = AnswerWriter(self._session, request)
        logits = done.logits[0]
        while writer.finish is None:
            piece = writer.take(logits)
            if len(writer.tokens) == 1:
                writer.note_graphs(executor.reset_elapsed())
            if writer.finish is not None:
                self.answer = writer.answer(context, done)
            if piece:
                yield piece
            if writer.finish is None:
                logits = context.decode(writer.tokens[-1])
        context.keep()
