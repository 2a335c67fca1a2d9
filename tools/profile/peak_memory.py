"""Load time and peak memory of a bundle, in a process of its own, which reads its job from stdin.

A peak belongs to a process: beside a second bundle, or after one, it could be the other's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ...graphs.child import isolated
from ...graphs.errors import CapacityError
from ...runtime.hardware import peak_memory


@dataclass(frozen=True)
class Footprint:
    """Milliseconds until a bundle can be asked; bytes resident then, and at most while it answers.

    Weights that are mapped count as far as they were touched.
    """

    load_ms: float
    loaded_bytes: int
    peak_bytes: int


def footprint(bundle: Path, *, tokens: int, **options) -> Footprint:
    """Load ``bundle`` and answer one prompt elsewhere; ``options`` as ``Session`` takes them.

    Raises:
        CapacityError: the process failed, usually for lack of memory.
    """
    job = {"bundle": str(bundle.absolute()), "tokens": tokens, "options": options}
    with isolated(__name__) as (command, where):
        done = subprocess.run(
            command, **where, input=json.dumps(job), capture_output=True, text=True
        )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise CapacityError(
            f"the process that measures the memory of {bundle} ended with {done.returncode}"
            f"{''.join(f': {line}' for line in last)}. Free memory, or take a smaller bundle"
        )
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Read a job from stdin, do it, and write the footprint to stdout."""
    job = json.load(sys.stdin)
    start = time.perf_counter()
    from ...runtime.session import load

    session = load(job["bundle"], **job["options"])
    load_ms = (time.perf_counter() - start) * 1e3
    loaded = psutil.Process().memory_info().rss
    from .timing import prompts, time_questions

    with session:
        time_questions(session, next(prompts()), job["tokens"])
    print(json.dumps(asdict(Footprint(load_ms, loaded, peak_memory()))))
