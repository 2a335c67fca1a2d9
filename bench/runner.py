"""The other end of a runner: start it, ask it, and say clearly why it does not answer.

The lines that are exchanged: ``runners/serving.py``.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..graphs.errors import VisistageError

RUNNERS = Path(__file__).parent / "runners"
_END = None


class PeerError(VisistageError):
    """A peer that cannot be set up, or stopped answering; the message goes into the record."""


@dataclass(frozen=True)
class Ready:
    """A loaded runner: milliseconds of imports and of loading, and what it says of itself."""

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
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

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
        """Put one question.

        Raises:
            PeerError: it crashed, or took longer.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended: reading its last line says how
        reply = self._reply(seconds, "answering")
        if "tokens" in reply:
            reply["tokens"] = tuple(reply["tokens"])
        return _typed(Answered, reply, self.name)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(_END)

    def _reply(self, seconds: float, doing: str) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.process.kill()
            raise PeerError(f"{self.name}: {doing} took longer than {seconds:.0f} s") from None
        if line is _END:
            self.lines.put(_END)  # for whoever asks again
            code = self.process.wait()
            raise PeerError(f"{self.name}: ended while {doing} ({ending(code)}): {self._words()}")
        return parse_line(line, self.name)

    def _words(self) -> str:
        """The last that it wrote."""
        return last_line(self.log.read_text(errors="replace"))


def parse_line(line: str, name: str) -> dict[str, Any]:
    """The object of one line.

    Raises:
        PeerError: it is none.
    """
    try:
        reply = json.loads(line)
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        raise PeerError(f"{name}: said {line.strip()[:120]!r}, expected a line of JSON")
    return reply


def ending(code: int) -> str:
    """How a process ended."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def last_line(log: str) -> str:
    """The last line that says anything, without addresses and folders of this machine."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    text = lines[-1] if lines else "it wrote nothing"
    text = re.sub(r"\b\w+://\S+", "(address)", text)
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":]+/)+", ".../", text)[:300]


def _typed(kind, reply: dict[str, Any], name: str):
    try:
        return kind(**reply)
    except TypeError as error:
        raise PeerError(f"{name}: {error}, expected the lines of runners/serving.py") from None
