"""How time and memory grow: visual tokens, text, batch, images, questions, KV slots.

    python -m visistage.bench.scaling [--repeats 5]

Each point is a process of its own, so that its peak memory is its own; the plans of a point follow
each other. Sessions take prompts one by one, so the batch goes through the executor alone. Last,
all presets prefill the same images in turn: how much faster than dense each is, over how much
faster the roofline says it could be, with rates measured in the same run (``lower_bound.py``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import numpy as np

from ..compile.build import make_bundle
from ..compile.checkpoint.dummy import make_dummy
from ..graphs.config import ModelConfig
from ..graphs.errors import VisistageError
from ..graphs.presets.presets import PRESETS
from ..runtime import Answer, load
from .environments import ROOT
from .lower_bound import Rates, measure_rates, milliseconds, prefill_layers
from .record import dry_option, save, spread
from .runner import last_line
from .scaling_points import WARMUPS, ScalingPoint, noise, question

PUBLISHED_SIDE = 336
AXES = {
    "visual": (168, 252, 336, 504, 672),  # pixels; 144, 324, 576, 1 296 and 2 304 visual tokens
    "images": (1, 2, 3, 4, 5),
    "text": (0, 64, 256, 768),  # words
    "batch": (1, 2, 4, 8, 16),
    "questions": (1, 2, 4, 8, 16),
    "slots": (1024, 2048, 4096),
}
PLANS = ("dense", "visipruner")
SWEEPS = (*AXES, "presets")


def points(sweep: str, geometry: str) -> Iterator[ScalingPoint]:
    """Yield those of one sweep, the plans of each value together."""
    for value in AXES[sweep]:
        shape = {"visual": {}, "text": {"words": value}}.get(sweep, {sweep: value})
        side = value if sweep == "visual" else PUBLISHED_SIDE
        for plan in PLANS:
            yield ScalingPoint(sweep, value, plan, str(bundle(geometry, side, plan)), **shape)


def bundle(geometry: str, side: int, plan: str) -> Path:
    """Return a bundle with random weights for pictures of ``side`` pixels, built if need be."""
    checkpoint = make_dummy(geometry, ROOT / "dummy" / f"{geometry}-{side}", image_size=side)
    return make_bundle(str(checkpoint), plan=plan, out=ROOT / "bundles").path


def row_of(point: ScalingPoint, found: dict[str, Any]) -> dict[str, Any]:
    """Return what the record keeps of a point."""
    shape = {name: value for name, value in asdict(point).items() if name != "bundle"}
    facts = {name: value for name, value in found.items() if not isinstance(value, list)}
    row = shape | facts | {"slots": found.get("slots", point.slots)}
    return row | {name: spread(found[name]) for name in ("first_ms", "per_token_ms")}


def in_child(point: ScalingPoint, repeats: int, tokens: int, threads: int) -> dict[str, Any]:
    """Measure a point in a fresh process.

    Raises:
        VisistageError: it failed.
    """
    given = json.dumps([asdict(point), repeats, tokens, threads])
    done = subprocess.run(
        [sys.executable, "-m", "visistage.bench.scaling_points", given],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        where = f"{point.sweep} {point.value} {point.plan}"
        raise VisistageError(f"{where} failed: {last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def presets(geometry: str, repeats: int, threads: int, rates: Rates) -> list[dict[str, Any]]:
    """Return every preset's prefill beside dense's, and beside what the roofline predicts."""
    times: dict[str, list[float]] = {plan: [] for plan in PRESETS}
    predicted: dict[str, list[float]] = {plan: [] for plan in PRESETS}
    with ExitStack() as stack:
        sessions = {
            plan: stack.enter_context(load(bundle(geometry, PUBLISHED_SIDE, plan), threads=threads))
            for plan in PRESETS
        }
        manifest = sessions["dense"].bundle.manifest
        prefix = len(manifest.prefix.ids) if manifest.prefix else 0
        random = np.random.default_rng(0)
        for number in range(WARMUPS + repeats):
            (picture,) = noise(random, 1, PUBLISHED_SIDE)
            for plan, session in sessions.items():
                answer = session.infer(picture, question(0, number), max_tokens=1)
                if number >= WARMUPS:
                    times[plan].append(prefill_ms(answer))
                    predicted[plan].append(roofline_ms(manifest.config, answer, prefix, rates))
    dense, ideal = median(times["dense"]), mean(predicted["dense"])
    return [
        {"sweep": "presets", "plan": plan, "prefill_ms": spread(measured)}
        | compared(median(measured), dense, mean(predicted[plan]), ideal)
        for plan, measured in times.items()
    ]


def compared(measured: float, dense: float, roofline: float, ideal: float) -> dict[str, float]:
    """Return a plan's milliseconds and dense's, as measured and as predicted, as speed-ups."""
    speedup, promised = dense / measured, ideal / roofline
    return {
        "roofline_ms": roofline,
        "speedup": speedup,
        "predicted": promised,
        "reached": speedup / promised,
    }


def prefill_ms(answer: Answer) -> float:
    """Return the time inside the decoder's graphs, selections included, until the first token."""
    return sum(ms for name, ms in answer.timings.graphs_ms.items() if name != "vision")


def roofline_ms(config: ModelConfig, answer: Answer, prefix: int, rates: Rates) -> float:
    """Return, layer by layer, the longer of computing and reading, for the rows that really ran."""
    facts = answer.plan
    asked = facts.prompt_rows - facts.visual_tokens - prefix
    visual = facts.visual_tokens_per_layer
    works = prefill_layers(config.text, visual, prefix, asked, cached_layers=0)
    return sum(milliseconds(work, rates, "fp32") for work in works)


@click.command()
@click.option("--geometry", default="llava-45m", show_default=True, help="Of the dummy weights.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=8, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--sweep", "sweeps", multiple=True, type=click.Choice(SWEEPS), help="Only these.")
@dry_option
def main(geometry, repeats, tokens, threads, sweeps, dry) -> None:
    """Build, measure point by point, record; every point is a line of JSON on stdout."""
    rates = measure_rates(threads)
    rows: list[dict[str, Any]] = []
    for sweep in sweeps or SWEEPS:
        if sweep == "presets":
            rates = rates.best(measure_rates(threads))
            rows += presets(geometry, repeats, threads, rates)
            continue
        for point in points(sweep, geometry):
            try:
                row = row_of(point, in_child(point, repeats, tokens, threads))
            except VisistageError as error:
                label = f"{sweep} {point.value}, {point.plan}"
                row = {"sweep": sweep, "label": label, "failed": str(error)}
            click.echo(json.dumps(row))
            rows.append(row)
    machine = {"sweep": "machine", "threads": threads, "repeats": repeats, "tokens": tokens}
    save(f"scaling-{geometry}", [machine | {"rates": rates.to_dict()}, *rows], dry=dry)


if __name__ == "__main__":
    main()
