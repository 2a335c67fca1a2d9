"""Kill builds with SIGKILL at random moments; each must go on to the bytes of an undisturbed one.

    python tests/kill_builds.py --times 100 --seed 0

Each build is a process forked from this one, which has built once: what is killed is the build,
not Python's start, nor torch's first trace. Half of the builds may be killed a second time, while
they resume.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from visistage.compile.build import make_bundle
from visistage.compile.steps import BuildNotes
from visistage.graphs.bundle import Bundle, sha256
from visistage.tests.support import toy

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"


def build(model: Path, out: Path, wait: float | None) -> bool:
    """Build in a process that is killed after ``wait`` seconds; return whether it had finished."""
    process = os.fork()
    if not process:
        code = 1
        try:
            make_bundle(str(model), plan=PLAN, out=out)
            code = 0
        finally:
            os._exit(code)
    if wait is not None:
        time.sleep(wait)
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def contents(out: Path) -> dict[str, str]:
    """Return the hash of every file of the only bundle in ``out``."""
    bundle = Bundle.open(out)
    bundle.check(rehash=True)
    return {file.name: sha256(file) for file in bundle.path.iterdir() if file.name[0] != "."}


def main() -> int:
    """Kill and resume as often as asked; 0 if all came out equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    equal, kills, steps_done = 0, 0, Counter()
    with tempfile.TemporaryDirectory() as scratch:
        model = toy.make_checkpoint(Path(scratch) / "toy", layers=3)
        make_bundle(str(model), plan=PLAN, out=Path(scratch) / "whole")
        started = time.perf_counter()
        build(model, Path(scratch) / "again", None)
        usual = time.perf_counter() - started
        wanted = contents(Path(scratch) / "whole")
        for _ in range(options.times):
            out = Path(scratch) / "out"
            while build(model, out, chance.uniform(0, usual)):
                shutil.rmtree(out)  # too late to be killed
            killed = 1
            if chance.random() < 0.5:
                killed += not build(model, out, chance.uniform(0, usual))
            kills += killed
            partial = next(out.glob("*/*.partial"), None)
            notes = partial and BuildNotes.read(partial)
            steps_done[len(notes.steps) if notes else 0] += 1
            assert build(model, out, None)
            equal += contents(out) == wanted
            shutil.rmtree(out)
    found = ", ".join(f"{count} after {steps}" for steps, count in sorted(steps_done.items()))
    print(f"{kills} kills (steps noted when the last resume began: {found})")
    print(f"{equal} of {options.times} killed builds came out equal, seed {options.seed}")
    return int(equal != options.times)


if __name__ == "__main__":
    sys.exit(main())
