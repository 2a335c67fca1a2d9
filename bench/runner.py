"""Client of a runner: starts it, asks it, and reports why it does not answer.

The lines that are exchanged: ``runners/serving.py``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..graphs.errors import VisistageError

RUNNERS = Path(__file__).parent / "runners"


class PeerError(VisistageError):
    """A peer that cannot be set up, or stopped answering; the message goes into the record."""


@dataclass(frozen=True)
class Ready:
    """A loaded runner: milliseconds of imports and of loading, and facts for the record."""

    import_ms: float
    load_ms: float
    peak_mib: float
    about: dict[str, str]


@dataclass(frozen=True)
class Answered:
    """One answer; units as in ``runners/serving.py``."""

    prompt_tokens: int
    tokens: tuple[int, ...]
    first_ms: float
    per_token_ms: float
    peak_mib: float


class Runner:
    """A process that holds one model; use as a context manager.

    Args:
        name: of the peer, for messages.
        command: an interpreter, a script of ``runners/`` and its settings.
        log: where its stderr goes.
        variables: of its environment, besides this process's.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, variables: Mapping[str, str] = {}
    ):
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **variables},
                text=True,
            )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if need be by force."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()

    def ready(self, seconds: float) -> Ready:
        """Wait until the model is loaded.

        Raises:
            PeerError: it failed, or took longer.
        """
        reply = self._reply(seconds, "loading")
        reply.pop("ready", None)
        return _typed(Ready, reply, self.name)

    def ask(self, request: Mapping[str, Any], seconds: float) -> Answered:
        """Ask one question.

        Raises:
            PeerError: it crashed, or took longer.
        """
        reply = self.exchange(request, seconds)
        if "tokens" in reply:
            reply["tokens"] = tuple(reply["tokens"])
        return _typed(Answered, reply, self.name)

    def exchange(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the object that a runner answers with.

        Raises:
            PeerError: it crashed, or took longer.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended: reading its last line says how
        return self._reply(seconds, "answering")

    def _reply(self, seconds: float, doing: str) -> dict[str, Any]:
        """Read the next line: a runner writes one for each request, whole."""
        stream = self.process.stdout
        assert stream is not None
        if not wait([stream.fileno()], seconds):
            self.process.kill()
            raise PeerError(f"{self.name}: {doing} took longer than {seconds:.0f} s")
        line = stream.readline()
        if line:
            return parse_line(line, self.name)
        how = ending(self.process.wait())
        words = last_line(self.log.read_text(errors="replace"))
        raise PeerError(f"{self.name}: ended while {doing} ({how}): {words}")


def parse_line(line: str, name: str) -> dict[str, Any]:
    """Return the object of one line.

    Raises:
        PeerError: the line has none.
    """
    try:
        reply = json.loads(line)
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        raise PeerError(f"{name}: said {line.strip()[:120]!r}, expected a line of JSON")
    return reply


def ending(code: int) -> str:
    """Describe how a process ended."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def last_line(log: str) -> str:
    """Return the last line with text, without addresses and folders of this machine."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    text = lines[-1] if lines else "it wrote nothing"
    text = re.sub(r"\b\w+://\S+", "(address)", text)
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":]+/)+", ".../", text)[:300]


def _typed(kind, reply: dict[str, Any], name: str):
    try:
        return kind(**reply)
    except TypeError as error:
        raise PeerError(f"{name}: {error}, expected the lines of runners/serving.py") from None
