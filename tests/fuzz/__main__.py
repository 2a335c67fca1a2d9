"""Hostile inputs for all that visistage reads; each must end in a result or a message.

    python -m visistage.tests.fuzz --cases 10000 --seed 1     all readers, in turns
    python -m visistage.tests.fuzz --cases 500 --only image   one of them
    python -m visistage.tests.fuzz --only image --first 417 --cases 1     that case again

A case is a reader of ``readers.py`` and a number: with equal seeds it is the same on every machine.
Readers run in a process of their own; it is started again after a case that ends it. A finding is
what is neither a result nor a ``VisistageError``: another exception, the end of the process, more
than ``SECONDS``, more than ``MEMORY`` beyond what it had before, or a message beyond a screen.
"""

from __future__ import annotations

import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from visistage.graphs.errors import VisistageError
from visistage.runtime.hardware import cores

SECONDS = 20.0
"""A case may take; on a machine with other work, ten times what the slowest takes."""
MEMORY = 1 << 30
"""Bytes by which one case may raise the peak of its process."""
SCREEN = 2_400
"""Characters of a message: a screen of 80 columns and 30 lines."""
ADDRESS_SPACE = 40 << 30


def check(reader: str, number: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run one case; return its name, how it ended, and the message or traceback."""
    from visistage.tests.fuzz.readers import READERS

    rng = random.Random(f"{seed} {reader} {number}")
    name, act = READERS[reader](rng, folder)
    try:
        act()
    except VisistageError as error:
        text = str(error)
        if len(text) > SCREEN:
            return {"case": name, "end": "long message", "text": text[:300]}
        return {"case": name, "end": "message", "text": text}
    except Exception:
        return {"case": name, "end": "traceback", "text": traceback.format_exc()[-3000:]}
    return {"case": name, "end": "result", "text": ""}


def serve(seed: int) -> None:
    """Answer cases from stdin, a line of JSON each; runs in the child."""
    import resource

    from visistage.runtime.hardware import peak_memory
    from visistage.tests.fuzz.readers import seeds

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        seeds()  # takes long, and counts to no case
        for line in sys.stdin:
            reader, number = json.loads(line)
            before = peak_memory() or 0
            begun = time.monotonic()
            facts = check(reader, number, seed, Path(folder))
            facts["seconds"] = time.monotonic() - begun
            grown = (peak_memory() or 0) - before
            if grown > MEMORY and facts["end"] in ("result", "message"):
                facts |= {"end": "memory", "text": f"{grown / 2**30:.1f} GiB: {facts['text']}"}
            print(json.dumps(facts), file=out, flush=True)


class Child:
    """A process that runs cases; started when first asked, and again after a case that ended it."""

    def __init__(self, seed: int):
        self.seed = seed
        self.process: subprocess.Popen | None = None

    def ask(self, reader: str, number: int) -> dict[str, Any]:
        """Return how a case ended."""
        if self.process is None:
            serve = ["-m", "visistage.tests.fuzz", "--serve", f"--seed={self.seed}"]
            command = [sys.executable, *serve]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes)
            wait_first = 300.0  # imports, seeds
        else:
            wait_first = 0.0
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([reader, number]) + "\n")
        self.process.stdin.flush()
        answered = wait([self.process.stdout.fileno()], SECONDS + wait_first)
        line = self.process.stdout.readline() if answered else ""
        if line:
            return json.loads(line)
        self.close()
        end = f"ended with {self.code}" if answered else f"over {SECONDS:.0f} s"
        return {"case": "", "end": "crash" if answered else "hang", "text": end, "seconds": SECONDS}

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.code = self.process.wait()
            self.process = None


def run(
    cases: int,
    seed: int,
    only: tuple[str, ...] = (),
    first: int = 0,
    processes: int = 1,
    *,
    show: bool = False,
) -> tuple[dict[str, Counter], list[dict[str, Any]], float]:
    """Run cases in turns over the readers.

    Returns:
        how many cases of each reader ended how; the findings; the seconds of the slowest case.
    """
    from visistage.tests.fuzz.readers import READERS

    names = only or tuple(READERS)
    ends: dict[str, Counter] = {name: Counter() for name in names}
    findings, slowest = [], 0.0
    children = queue.SimpleQueue[Child]()
    for _ in range(processes):
        children.put(Child(seed))

    def ask(index: int) -> tuple[str, int, dict[str, Any]]:
        reader, number = names[index % len(names)], first + index // len(names)
        child = children.get()
        try:
            return reader, number, child.ask(reader, number)
        finally:
            children.put(child)

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with (
        Progress(*columns, TimeRemainingColumn(), disable=not show) as bar,
        ThreadPoolExecutor(processes) as pool,
    ):
        for reader, number, facts in bar.track(
            pool.map(ask, range(cases)), total=cases, description="cases"
        ):
            ends[reader][facts["end"]] += 1
            slowest = max(slowest, facts["seconds"])
            if facts["end"] not in ("result", "message"):
                findings.append({"reader": reader, "number": number, **facts})
                last = facts["text"].strip().splitlines()[-1:] or [""]
                bar.console.print(
                    f"{reader} {number}: {facts['end']}: {facts['case'][:80]!a}: {last[0][:200]!a}",
                    markup=False,
                )
    for _ in range(processes):
        children.get().close()
    return ends, findings, slowest


@click.command()
@click.option("--cases", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--only", multiple=True, help="Readers; may be repeated.")
@click.option(
    "--first", type=click.IntRange(0), default=0, help="Number of the first case of each."
)
@click.option("--processes", type=click.IntRange(1), default=cores(), show_default="cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON of findings.")
@click.option("--serve", "serving", is_flag=True, hidden=True)
def main(
    cases: int,
    seed: int,
    only: tuple[str, ...],
    first: int,
    processes: int,
    out: Path | None,
    serving: bool,
) -> None:
    """Give hostile inputs to every reader; exit code 1 if any ended otherwise than it should."""
    if serving:
        serve(seed)
        return
    from visistage.tests.fuzz.readers import READERS

    unknown = set(only) - set(READERS)
    if unknown:
        raise click.BadParameter(f"no reader {sorted(unknown)[0]!r}: {', '.join(READERS)}")
    begun = time.monotonic()
    ends, findings, slowest = run(cases, seed, only, first, processes, show=True)
    if out is not None:
        out.write_text(json.dumps(findings, indent=1))
    for reader, counts in ends.items():
        words = ", ".join(f"{count} {end}" for end, count in sorted(counts.items()))
        click.echo(f"{reader:12} {words}")
    click.echo(
        f"{cases} cases in {time.monotonic() - begun:.0f} s, the slowest {slowest:.1f} s, "
        f"{len(findings)} findings"
    )
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
