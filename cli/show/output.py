"""The one place that writes to the terminal, or to what stands for it.

Whatever is written is clean (``graphs.foreign_text``); characters that the stream's encoding lacks
appear as escapes. Nothing on stderr is worth ending a command, so it may be closed or full; stdout
may not, as the answer is lost then.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

from ...graphs.errors import CapacityError
from ...graphs.foreign_text import escape_json, printable, shortened

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPE_WIDTH = 160
"""A pipe has no width; tables must not be folded to 80 columns for a program that reads them."""


LINE_CHARACTERS = 300
"""Length of a note: a few lines of a terminal."""


class Loudness:
    """The amount that commands tell besides their results and errors."""

    quiet = False


class Output:
    """stdout or stderr as a file that is written to and flushed at once.

    Raises:
        BrokenPipeError: stdout has no reader any more.
        CapacityError: stdout is closed, or what it goes to is full.
    """

    def __init__(self, *, err: bool = False):
        self.err = err

    def __getattr__(self, name: str) -> Any:
        """Return what else rich asks of a file: its encoding, whether it is a terminal."""
        return getattr(self._stream, name)

    @property
    def _stream(self) -> TextIO | None:
        return sys.stderr if self.err else sys.stdout

    def write(self, text: str) -> int:
        """Write ``text`` as it is."""
        return self._do("write", text)

    def flush(self) -> None:
        """Hand over what was written."""
        self._do("flush")

    def _do(self, what: str, *arguments: str) -> Any:
        stream = self._stream
        try:
            if stream is not None:
                return getattr(stream, what)(*arguments)
            reason = "it is closed"
        except BrokenPipeError:
            if not self.err:
                raise
        except (OSError, ValueError) as error:  # ValueError: it was closed meanwhile
            reason = getattr(error, "strerror", None) or str(error)
        if not self.err:
            raise CapacityError(
                f"standard output cannot be written: {reason}. Free some room there, or let it go "
                "elsewhere: > answer.txt"
            )
        return 0


def prepare_streams() -> None:
    """Let both streams replace what their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def abandon(stream: TextIO | None) -> None:
    """Let what ``stream`` still holds go nowhere, so that Python's own last flush cannot fail."""
    try:
        if stream is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # a stream without a file, in a test
        return


def say(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print ``text`` on stdout, or on stderr."""
    output = Output(err=err)
    output.write(printable(f"{text}\n" if nl else str(text)))
    output.flush()


def note(text: object | None) -> None:
    """Print on stderr what is good to know, unless it is nothing or -q was given."""
    if text and not Loudness.quiet:
        say(shortened(str(text), LINE_CHARACTERS), err=True)


class Spoken(logging.Handler):
    """A handler of the package's warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning on stderr."""
        say(self.format(record), err=True)


def show_json(facts: Any) -> None:
    """Print facts as JSON on stdout; of no other encoding than UTF-8 more than ASCII."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    text = json.dumps(facts, indent=2, ensure_ascii=encoding != "utf8")
    say(escape_json(text))


def console(*, err: bool = False, **options: Any) -> Console:
    """Return a console that shows foreign text as text, whatever markup or escapes it holds."""
    from rich.console import Console
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(self, renderable, options=None):
            for part in super().render(renderable, options):
                yield part if part.control else Segment(printable(part.text), part.style)

    made = CleanConsole(
        file=cast(TextIO, Output(err=err)),
        stderr=err,
        highlight=False,
        markup=False,
        emoji=False,
        **options,
    )
    if not made.is_terminal and "width" not in options:
        made.width = PIPE_WIDTH
    return made


def silent(console: Console) -> bool:
    """Return whether a console shows no bars: it is a file, or -q was given."""
    return Loudness.quiet or not console.is_terminal


def show(table: RenderableType, *, err: bool = False) -> None:
    """Print a table on stdout, or on stderr unless -q was given."""
    if not (err and Loudness.quiet):
        console(err=err).print(table)
