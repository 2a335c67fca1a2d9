"""Reading and writing in turn: an answer that begins before all is read.

Positions are counted apart for what is read and what is written, so a later read changes nothing
of an answer under way (``graphs.chain.group``). The checkpoint should be trained for that.
"""

from __future__ import annotations

from typing import Literal

from ..graphs.chain.chain import Chain
from ..graphs.chain.group import GroupReader
from ..graphs.errors import CapacityError, PromptError, VisistageError
from ..graphs.fields import show
from .opened_image import Source
from .session import Session
from .settings import DEFAULT_MAX_TOKENS
from .text.detokenize import TextStream
from .text.sampling import choose, whole_number

ENDS = tuple(" .,:;?!")
"""Beginnings of tokens that belong to the next word."""


class Conversation:
    """Images and texts read, and an answer written, in turn, on a bundle of a dense plan.

        conversation = runtime.Conversation(session, positions="group")
        conversation.read(session.open("photo.jpg"))
        conversation.read("What is this?")
        print(conversation.write(word=True))

    Another question on the session ends it.

    Args:
        session: whose caches it takes.
        positions: ``group``, the only ones.
        phi: position of the first row that is written.

    Raises:
        PlanError: the bundle's plan prunes something.
        PromptError: other positions.
    """

    def __init__(self, session: Session, positions: Literal["group"] = "group", phi: int = 0):
        if positions != "group":
            raise PromptError(f"positions is {show(positions)}, expected 'group'")
        self.session = session
        manifest = session.bundle.manifest
        self.room = max(manifest.contexts, default=manifest.config.text.max_positions)
        before, self._pending = session.encoder.frame_ids()
        self._text = TextStream(session.encoder.tokenizer)
        self._history: list[int] = []
        self._random = session.sampling.rng()
        with session.taking_turns():
            chain = Chain(manifest.plan, session.executor)
            self._reader = GroupReader(chain, phi)
            session.context.keep()
            session.executor.prepare([self.room])
            session.context.reset()
            session.turn += 1
            self._turn = session.turn
            self._read_ids(before)

    def read(self, given: Source | str) -> None:
        """Read an image, or text (a ``str``; the path of an image is a ``pathlib.Path``).

        Raises:
            PromptError: a control token in a text.
            ImageError: the image cannot be used.
            CapacityError: there is no room for it.
            VisistageError: the session was asked something else.
        """
        with self.session.taking_turns():
            self._check_turn()
            if isinstance(given, str):
                self._read_ids(self.session.encoder.text_ids(given))
                return
            opened = self.session.decode_image(given)
            encoded = self.session.encode_image(opened)
            self._check_room(encoded.rows.shape[1])
            self._reader.read(encoded.rows, encoded.inject, opened.layout)

    def write(self, max_tokens: int = DEFAULT_MAX_TOKENS, *, word: bool = False) -> str:
        """Go on with the answer; return what is added to it, "" once it has ended.

        ``word``: stop where the next word would begin, which more reading may still change.

        Raises:
            CapacityError: there is no room for it.
            VisistageError: the session was asked something else.
        """
        limit, session = whole_number("max_tokens", max_tokens, 1), self.session
        pieces: list[str] = []
        with session.taking_turns():
            self._check_turn()
            written: list[int] = []
            while self._pending:
                self._check_room(len(self._pending))
                logits = self._reader.write(session.context.embed(self._pending))[0, -1]
                token = choose(logits, session.sampling, self._history, self._random)
                if token in session.eos:
                    self._pending = ()
                    break
                if word and written and self._begins_word(token):
                    self._reader.take_back()  # its last row is to see what is read until then
                    break
                self._pending = (token,)
                written.append(token)
                self._history.append(token)
                pieces.append(self._text.push(token))
                if len(written) == limit:
                    break
        return "".join(pieces) if self._pending else "".join(pieces) + self._text.finish()

    def _begins_word(self, token: int) -> bool:
        raw = self.session.encoder.tokenizer.id_to_token(token) or ""
        return raw.replace("\u2581", " ").replace("\u0120", " ").startswith(ENDS)

    def _read_ids(self, ids: tuple[int, ...]) -> None:
        self._check_room(len(ids))
        if ids:
            self._history += ids
            self._reader.read(self.session.context.embed(ids))

    def _check_turn(self) -> None:
        if self._turn != self.session.turn:
            raise VisistageError(
                "this conversation was ended by another question on the same session. Load the "
                "bundle twice to have both"
            )

    def _check_room(self, rows: int) -> None:
        held = self._reader.source + self._reader.target
        if held + rows > self.room:
            raise CapacityError(
                f"the conversation holds {held} rows and has room for {self.room}, {rows} more do "
                "not fit. Begin another"
            )
