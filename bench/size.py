"""Time, memory and bytes of building a bundle, step by step, in a fresh process.

    python -m visistage.bench.size --model llava-7b --target cuda --dummy-weights

Peak memory is the process's largest resident set so far, the imports included; an engine is
compiled in a process of its own, whose peak is its own. Weights mapped from disk count as far as
they were touched.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time

import click

from ..graphs.progress import Progress, StepFact
from ..runtime.hardware import peak_memory
from .record import save


class StepLog(Progress):
    """A progress callback that keeps seconds, bytes and the peak so far of every step."""

    def __init__(self):
        self.rows: list[dict] = []

    def done(self, fact: StepFact) -> None:
        """Note a step."""
        self.rows.append(
            {
                "step": fact.name,
                "seconds": round(fact.seconds, 2),
                "bytes": fact.nbytes,
                "peak_mib": round(peak_memory() / 2**20),
            }
        )


@click.command()
@click.option("--model", default="llava-7b", show_default=True)
@click.option("--target", default="cuda", show_default=True)
@click.option("--plan", default="visipruner", show_default=True)
@click.option("--dummy-weights", is_flag=True)
@click.option("--out", help="Folder for the bundle; a temporary one by default.")
@click.option("--child", is_flag=True, hidden=True)
def main(model: str, target: str, plan: str, dummy_weights: bool, out: str | None, child: bool):
    """Open the checkpoint first (making dummy weights is not building), then measure a child."""
    from ..compile.checkpoint.checkpoint import open_checkpoint

    if child:
        _measure(model, target, plan, dummy_weights, out)
        return
    started = time.perf_counter()
    checkpoint = open_checkpoint(model, dummy_weights=dummy_weights)
    opening = round(time.perf_counter() - started, 1)
    folder = out or tempfile.mkdtemp(dir=".", prefix="size-")
    command = [sys.executable, "-m", "visistage.bench.size", *sys.argv[1:]]
    try:
        child_process = subprocess.run(
            [*command, "--out", folder, "--child"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        if out is None:
            shutil.rmtree(folder)
    facts = json.loads(child_process.stdout.splitlines()[-1])
    origin = {"checkpoint_bytes": checkpoint.file_bytes, "checkpoint_seconds": opening}
    rows = [{"model": model, "target": target, **origin, **facts}]
    save(f"size-{model}-{target}", rows)


def _measure(model: str, target: str, plan: str, dummy_weights: bool, out: str | None) -> None:
    from ..compile.build import make_bundle
    from ..compile.engines.engines import compile_engines
    from ..graphs.targets import find_target

    steps = StepLog()
    started = time.perf_counter()
    bundle = make_bundle(
        model, plan=plan, target=target, dummy_weights=dummy_weights, out=out, progress=steps
    )
    engine_bytes = 0
    if find_target(target).engines:
        peaks = {}
        for engine in compile_engines(bundle, progress=steps).engines:
            engine_bytes += engine.nbytes
            peaks[f"engine {engine.name}"] = round(engine.peak_bytes / 2**20)
        for row in steps.rows:
            row["peak_mib"] = peaks.get(row["step"], row["peak_mib"])
    facts = {
        "plan": bundle.manifest.plan.name,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mib": max(row["peak_mib"] for row in steps.rows),
        "engine_bytes": engine_bytes,
        "bundle_bytes": sum(fact.nbytes for fact in bundle.manifest.files.values()),
        "steps": steps.rows,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
