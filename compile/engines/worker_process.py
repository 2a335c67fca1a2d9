"""Compilation of one engine in a child process: progress, peak memory, one clear error.

A compiler may crash, or be killed because memory is short; the build goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...graphs.child import isolated
from ...graphs.errors import EngineError
from ...graphs.progress import Advance, no_advance

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class CompileOutcome:
    """Outcome of a compilation: ``facts`` from the worker, seconds, bytes of memory at its peak.

    ``peak_bytes`` counts the mapped weights, ``peak_anonymous_bytes`` does not; both are 0 where
    the system has no such count.
    """

    facts: dict[str, Any]
    seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int


def run_worker(
    job: dict[str, Any], what: str, log: Path, advance: Advance = no_advance
) -> CompileOutcome:
    """Compile ``job`` (see ``worker.compile_engine``); ``what`` names it in errors.

    ``log`` receives messages of the compiler, ``advance`` is called for each step done.

    Raises:
        EngineError: it failed; the message says how, and where the log is.
    """
    started = time.perf_counter()
    answer: dict[str, Any] = {}
    with isolated(f"{__package__}.worker") as (command, options), log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            **options,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            start_new_session=True,  # Ctrl-C is ours to handle
        )
        memory = _Memory(process.pid)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            # If it ended at once, the exit code says why.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job).encode())
                process.stdin.close()
            for line in process.stdout:
                message = json.loads(line)
                if "step" in message:
                    advance(1)
                else:
                    answer = message
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            memory.stop()
    if "facts" not in answer:
        why = answer.get("error") or _reason(code, memory.peak, log)
        raise EngineError(f"{what} was not compiled: {why}. All the compiler said: {log}")
    seconds = time.perf_counter() - started
    return CompileOutcome(answer["facts"], seconds, memory.peak, memory.peak_anonymous)


def _reason(code: int, peak: int, log: Path) -> str:
    """Return why a worker ended without an answer."""
    used = f" with {peak / 2**30:.1f} GiB in use" if peak else ""
    if code == -signal.SIGKILL:
        return (
            f"the compiler was killed{used}, which is what happens when memory runs out. Build the "
            "bundle with smaller parts: --build-memory 8GiB"
        )
    if code < 0:
        return f"the compiler crashed ({signal.Signals(-code).name}){used}"
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"the compiler ended with code {code}: {lines[-1] if lines else 'nothing was said'}"


class _Memory:
    """Peak memory of a process, sampled while it runs."""

    def __init__(self, pid: int):
        self.peak = self.peak_anonymous = 0
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._observe, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _observe(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return  # it is over, or this is no Linux
            found = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
            self.peak = max(self.peak, int(found.get("VmHWM", 0)) * 1024)
            anonymous = int(found.get("RssAnon", 0)) * 1024
            self.peak_anonymous = max(self.peak_anonymous, anonymous)
