"""The command for a conversation in a terminal, or through a pipe."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..graphs.errors import VisistageError
from .options import (
    backend_option,
    bundle_at,
    bundle_option,
    max_tokens_option,
    quiet,
    threads_option,
    verbose,
)
from .show.output import note, say

if TYPE_CHECKING:
    from ..runtime.chat import Chat

HELP = """\
/image FILE...   add images to the next question
/undo            take the last question and its answer back
/reset           begin again, without images
/stats           what the last answer cost, and what the plan kept
/save FILE       write the conversation as JSON
/help, /quit     or Ctrl-D; Ctrl-C ends an answer"""


@click.command()
@click.argument("images", nargs=-1, type=click.Path(exists=True), metavar="[IMAGE]...")
@bundle_option
@click.option("--system", help="A message before all others.")
@click.option(
    "--selection",
    type=click.Choice(["reselect", "sticky"]),
    default="reselect",
    show_default=True,
    help="Choose visual tokens anew for each question, or keep those of the first.",
)
@max_tokens_option
@backend_option
@threads_option
@quiet
@verbose
def chat(images, bundle, system, selection, max_tokens, backend, threads) -> None:
    """Talk about images, question by question.

    Every answer knows what was said before. In a pipe each line is a question, answers alone go to
    stdout, and the exit code is 2 where a line could not be answered. Without --bundle: what
    VISISTAGE_BUNDLE names, or the newest in ./engines.

    \b
    visistage chat photo.jpg
    visistage chat photo.jpg --system "Answer in one word."
    printf 'What is this?\\nWhy?\\n' | visistage chat photo.jpg -q

    \b
    /image FILE...  adds images      /undo   takes a question back    /stats  what it cost
    /save FILE      as JSON          /reset  begins again             /quit   or Ctrl-D
    """
    path = bundle_at(bundle)
    from .. import runtime

    with runtime.load(path, backend=backend, threads=threads) as session:
        terminal = ChatTerminal(session.chat(list(images), system=system, selection=selection))
        if sys.stdin.isatty():
            note("/help lists commands; Ctrl-D ends")
        for line in lines():
            if not terminal.take(line, max_tokens):
                break
        if terminal.failed and not sys.stdin.isatty():
            raise SystemExit(2)


def lines() -> Iterator[str]:
    """Yield what is typed, with the keys of readline, or the lines of a pipe; Ctrl-D ends it."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            say("", err=True)
            return


class ChatTerminal:
    """A conversation as lines: questions, and commands that begin with a slash."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self._added: list[str] = []
        self._answer: Any = None
        self.failed = False
        self.commands: dict[str, Callable[[list[str]], None]] = {
            "/image": self._image,
            "/undo": lambda _: self.chat.undo(),
            "/reset": self._reset,
            "/stats": self._stats,
            "/save": self._save,
            "/help": lambda _: say(HELP, err=True),
        }

    def take(self, line: str, max_tokens: int) -> bool:
        """Do what a line says; return False at the end. Errors that can be mended are told."""
        line = line.strip()
        if line in ("/quit", "/exit"):
            return False
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._ask(line, max_tokens)
        except VisistageError as error:
            self.failed = True
            say(f"error: {error}", err=True)
        return True

    def _command(self, line: str) -> None:
        try:
            name, *words = shlex.split(line)
        except ValueError as error:
            raise VisistageError(f"{line}: {error}") from None
        if name not in self.commands:
            raise VisistageError(f"{name} is no command. Type /help")
        self.commands[name](words)

    def _ask(self, prompt: str, max_tokens: int) -> None:
        with self.chat.stream(prompt, self._added, max_tokens=max_tokens) as pieces:
            try:
                for number, piece in enumerate(pieces):
                    say(piece if number else piece.lstrip(), nl=False)
            except KeyboardInterrupt:
                say()
                note("the answer was stopped, and the question is not part of the conversation")
                return
        say()
        self._answer, self._added = pieces.answer, []

    def _image(self, words: list[str]) -> None:
        if not words:
            raise VisistageError("/image needs a file: /image photo.jpg")
        for word in words:
            self.chat.session.decode_image(word)  # an error now, not with the question
        self._added += words
        note(f"{len(self._added)} image{'s' * (len(self._added) != 1)} with the next question")

    def _reset(self, _: list[str]) -> None:
        chat = self.chat
        system = next((m["content"] for m in chat.messages if m["role"] == "system"), None)
        self.chat = chat.session.chat(system=system, selection=chat.selection)
        self._answer, self._added = None, []
        note("begun again")

    def _stats(self, _: list[str]) -> None:
        if self._answer is None:
            raise VisistageError("nothing was answered yet. Ask a question")
        from .show.answer_view import answer_table
        from .show.output import show

        show(answer_table(self._answer, self.chat.session.bundle.manifest), err=True)

    def _save(self, words: list[str]) -> None:
        if len(words) != 1:
            raise VisistageError("/save needs one file: /save conversation.json")
        from ..graphs.files import write_to_place

        try:
            write_to_place(Path(words[0]), json.dumps(self.chat.messages, indent=2) + "\n")
        except OSError as error:
            raise VisistageError(f"{words[0]}: {error.strerror}. Name another file") from None
        note(f"{len(self.chat.messages)} messages in {words[0]}")
