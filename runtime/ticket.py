"""A question that an engine has taken: the face that its caller sees."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from ..graphs.errors import VisistageError
from .answer import Answer
from .writing import AnswerRequest


class Cancelled(VisistageError):
    """An answer that its caller gave up."""


class Ticket(Iterator[str]):
    """A question that an engine has taken: an iterator over the pieces of its answer.

    Attributes:
        answer: the whole, once it is over; None before, and where it failed or was cancelled.
        error: what ended it instead.
        began: whether it has left the queue.
    """

    def __init__(self, request: AnswerRequest, notify: Callable[[Ticket], None] | None):
        self.request = request
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self.began = self.cancelled = False
        self.over = threading.Event()
        self._notify = notify
        self._pieces: SimpleQueue[str | None] = SimpleQueue()

    def __next__(self) -> str:
        piece = self._pieces.get()
        if piece is not None:
            return piece
        self._pieces.put(None)  # the next call ends as well
        if self.error is not None:
            raise self.error
        raise StopIteration

    def cancel(self) -> None:
        """Give the answer up; its lane is free within one call of a stage."""
        self.cancelled = True

    def wait(self, timeout: float | None = None) -> Answer:
        """Wait for the whole answer.

        Raises:
            VisistageError: it failed, or was cancelled.
            TimeoutError: ``timeout`` seconds passed.
        """
        if not self.over.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} s")
        if self.error is not None:
            raise self.error
        assert self.answer is not None
        return self.answer

    def pieces(self) -> list[str]:
        """Return the pieces that are there and were not taken yet, without waiting."""
        found = []
        while not self._pieces.empty():
            piece = self._pieces.get()
            if piece is None:
                self._pieces.put(None)
                break
            found.append(piece)
        return found

    def put(self, piece: str) -> None:
        """Hand a piece out."""
        if piece:
            self._pieces.put(piece)
            self._tell()

    def end(self, answer: Answer | None = None, error: BaseException | None = None) -> None:
        """End with an answer, or an error."""
        self.answer, self.error = answer, error
        self._pieces.put(None)
        self.over.set()
        self._tell()

    def _tell(self) -> None:
        if self._notify is not None:
            self._notify(self)
