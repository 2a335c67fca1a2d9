"""A conversation about images: every question with all that was said before.

    chat = session.chat("photo.jpg")
    chat.ask("How many people?")
    print(chat.ask("And what do they do?"))
    chat.edit("And where are they?")            # instead of the last question
    other = chat.fork()                         # goes on from here, apart

A plan that looks at the question chooses its visual tokens anew for each (``reselect``, equal to
asking the whole conversation at once), or keeps those of the first question (``sticky``, which
computes the new text alone). Where no edge looks at the question both are the same, and the second
way is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..graphs.chain.rows import Prefilled
from ..graphs.errors import PromptError
from ..graphs.fields import show
from .answer import Answer
from .loaded import Images
from .prompt_parts import PromptPart, tail_of
from .settings import AnswerSettings
from .stream import Stream

if TYPE_CHECKING:
    from .session import Session

Selection = Literal["reselect", "sticky"]


class Chat:
    """See the module. Questions on the session between its own cost a conversation time only.

    Args:
        session: that answers.
        image: what the first question is about.
        system: a message before all others.
        selection: of visual tokens, where the plan chooses them by the question.

    Attributes:
        messages: so far, as ``Session.stream`` takes them.
        images: their images in order.

    Raises:
        PromptError: ``selection`` is not known.
        ImageError: an image cannot be read.
    """

    def __init__(
        self,
        session: Session,
        image: Images = None,
        *,
        system: str | None = None,
        selection: Selection = "reselect",
    ):
        if selection not in get_args(Selection):
            raise PromptError(
                f"selection is {show(selection)}; expected {' or '.join(get_args(Selection))}"
            )
        self.session, self.selection = session, selection
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.images: list[Any] = []
        self._next_images = self._opened(image)
        self._turn: int | None = None  # of the session, while its stages hold this conversation
        self._done: Prefilled | None = None

    def ask(self, prompt: str, image: Images = None, **settings: Any) -> Answer:
        """Answer ``prompt``; arguments and errors as in ``stream``."""
        stream = self.stream(prompt, image, **settings)
        for _ in stream:
            pass
        assert stream.answer is not None
        return stream.answer

    def stream(self, prompt: str, image: Images = None, **settings: Any) -> ChatStream:
        """Answer piece by piece; the turn is part of the conversation once its answer is over.

        Args:
            prompt: the question.
            image: one or several that it adds to the conversation.
            **settings: fields of ``AnswerSettings``.

        Raises:
            PromptError, ImageError: the input cannot be used, or a conversation that keeps its
                first selection gets another image.
            CapacityError: the conversation does not fit the model's context.
        """
        added = [*self._next_images, *self._opened(image)]
        if added and self.images and self._keeps and not self._blind:
            raise PromptError(
                "a conversation that keeps its first selection takes no further images. Begin "
                "another, or choose selection='reselect'"
            )
        blocks = [*({"type": "image"} for _ in added), {"type": "text", "text": prompt}]
        question = {"role": "user", "content": blocks}
        messages, images = [*self.messages, question], [*self.images, *added]
        begin = self._go_on if self._keeps and not added else self._begin
        pieces = self.session.start(images, messages, AnswerSettings(**settings), begin)
        return ChatStream(self, pieces, messages, images)

    def edit(self, prompt: str, image: Images = None, **settings: Any) -> Answer:
        """Ask something else instead of the last question, about the images that it added."""
        kept = self._undo()
        self._next_images = kept
        return self.ask(prompt, image, **settings)

    def undo(self) -> None:
        """Take the last question and its answer back, with the images that it added."""
        self._undo()

    def fork(self) -> Chat:
        """Return a conversation that goes on from here apart; what both share is held once."""
        other = Chat(self.session, selection=self.selection)
        other.messages, other.images = list(self.messages), list(self.images)
        other._next_images, other._done = list(self._next_images), self._done
        return other

    def add(self, messages: Sequence[dict[str, Any]], images: Sequence[Any]) -> None:
        """Take a finished turn into the conversation; the session's stages hold it."""
        self.messages, self.images = list(messages), list(images)
        self._next_images, self._turn = [], self.session.turn

    def _undo(self) -> list[Any]:
        """Take the last turn back; return the images that it added."""
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            raise PromptError("there is no question to take back. Ask one")
        question = self.messages[-2]
        added = sum(block["type"] == "image" for block in question["content"])
        kept = self.images[len(self.images) - added :]
        self.messages, self.images = self.messages[:-2], self.images[: len(self.images) - added]
        return kept

    @property
    def _blind(self) -> bool:
        """True where no edge of the plan looks at the question."""
        plan = self.session.bundle.manifest.plan
        return plan.blind_stages == len(plan.stages) and not plan.whole_prompt

    @property
    def _keeps(self) -> bool:
        """True where later turns go on in the stages as they are."""
        whole = self.session.bundle.manifest.plan.whole_prompt
        return self._blind or (self.selection == "sticky" and not whole)

    def _opened(self, image: Images) -> list[Any]:
        given = [] if image is None else image if isinstance(image, (list, tuple)) else [image]
        return [self.session.decode_image(source) for source in given]

    def _begin(self, parts: Sequence[PromptPart]) -> Prefilled:
        self._done = self.session.context.prefill(parts)
        return self._done

    def _go_on(self, parts: Sequence[PromptPart]) -> Prefilled:
        """Append what is new; where the stages hold something else, first what they held."""
        context = self.session.context
        if self._done is None or not self.messages:
            return self._begin(parts)
        if self._turn is None or self._turn + 1 != self.session.turn or not context.length:
            begun = self._messages_selected_by()
            self._done = context.prefill(self.session.prompt_parts(begun, self.session.asked))
        logits = context.go_on(tail_of(parts))
        return replace(self._done, logits=logits[None])

    def _messages_selected_by(self) -> list[dict[str, Any]]:
        """Return the messages up to the question that brought the last image, or the first."""
        asked = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        seeing = [at for at in asked if self.messages[at]["content"][0]["type"] == "image"]
        return self.messages[: (seeing or asked[:1])[-1] + 1]


class ChatStream(Iterator[str]):
    """The pieces of an answer of a conversation; ``answer`` is the whole once they are out.

    One that is closed early, or interrupted, leaves the conversation as it was.
    """

    def __init__(self, chat: Chat, pieces: Stream, messages: Sequence, images: Sequence):
        self._chat, self._pieces = chat, pieces
        self._messages, self._images = messages, images

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            if self.answer is not None and self._messages:
                said = {"role": "assistant", "content": self.answer.text}
                self._chat.add([*self._messages, said], self._images)
                self._messages = ()
            raise

    @property
    def answer(self) -> Answer | None:
        """The whole answer; None until it is over."""
        return self._pieces.answer

    def close(self) -> None:
        """End the answer here."""
        self._pieces.close()
