"""Measure models of several shapes at several lengths, and fit what a device reaches of its peaks.

    python -m visistage.bench.fit [--threads 2] [--repetitions 10]

Models and plans take turns only within a model: sessions of all at once would not fit. The peaks
are measured beside every model. Writes ``results/estimate-DEVICE.json`` (every observation) and
``tools/estimate/measured.json`` (what ``visistage estimate`` reads).

    t = F / (c P) + B / (b W) + n h

F FLOPs, B bytes, P and W the peaks measured in the same run, n layers that were called. c and b are
the efficiencies; h is what calling a layer costs whatever it computes, without which small models
would be fitted as inefficient. Least squares of relative errors; nothing may be negative. To
validate, each model and each length is left out once, fitted without, and predicted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from ..compile.build import make_bundle
from ..compile.checkpoint.dummy import make_dummy
from ..compile.checkpoint.known_models import KNOWN_MODELS, KnownModel
from ..graphs.plan.call_cost import GraphCall, Sizes, layers_of, total_work, work_of
from ..runtime.session import Session
from ..tools.estimate.devices import MEASURED_FILE, Efficiency
from ..tools.profile.machine import cores
from ..tools.profile.roofline import MOST_BYTES, Peaks, measure_peaks
from ..tools.profile.sweep import sweep
from ..tools.profile.timing import Settings, measure_bundles
from .record import RESULTS, save

PLANS = ("dense", "visipruner")
SMALL = KNOWN_MODELS["llava-45m"]


def with_decoder(layers: int, hidden: int, intermediate: int) -> KnownModel:
    """Describe llava-45m with another decoder."""
    text = {
        **SMALL.config["text_config"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": hidden // 64,
    }
    about = f"llava-45m with {layers} layers of {hidden}"
    return KnownModel({**SMALL.config, "text_config": text}, SMALL.specials, about)


SHAPES = {
    "shallow-wide": with_decoder(6, 1024, 2752),
    "deep-wide": with_decoder(16, 1024, 2752),
}

MODELS = ",".join(["demo", "llava-45m", *SHAPES])


@dataclass(frozen=True)
class Observation:
    """One measured phase: what it did, what the machine could do then, and how long it took.

    length: visual tokens of a prefill, 0 for a later token. layers: layers called, over all calls.
    """

    model: str
    plan: str
    phase: str
    length: int
    flops: float
    nbytes: float
    layers: int
    ms: float
    peak_flops: float
    peak_bandwidth: float


def fit(observations: Sequence[Observation]) -> Efficiency:
    """Fit efficiencies to at least three observations, of compute and of memory.

    Raises:
        ValueError: too few, or all alike.
    """
    rows = np.array(
        [
            (1e3 * o.flops / o.peak_flops, 1e3 * o.nbytes / o.peak_bandwidth, float(o.layers))
            for o in observations
        ]
    )
    if len(rows) < rows.shape[1]:
        raise ValueError(f"{len(rows)} observations cannot fix {rows.shape[1]} numbers")
    times = np.array([o.ms for o in observations])
    weighted = rows / times[:, None]
    slow_compute, slow_memory, layer_ms = _not_negative(weighted, np.ones(len(times)))
    if not slow_compute or not slow_memory:
        raise ValueError("the observations do not tell operations from bytes")
    return Efficiency(1 / slow_compute, 1 / slow_memory, layer_ms)


def error_of(efficiency: Efficiency, seen: Observation) -> float:
    """Return the relative error of a prediction: 0.1 is 10 % too slow."""
    predicted = efficiency.predict_ms(
        seen.flops, seen.nbytes, seen.layers, seen.peak_flops, seen.peak_bandwidth
    )
    return predicted / seen.ms - 1


def _not_negative(matrix: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Solve least squares with no negative factor: the best of all choices of columns."""
    best, least = np.zeros(matrix.shape[1]), np.inf
    columns = range(matrix.shape[1])
    for chosen in (c for count in columns for c in combinations(columns, count + 1)):
        found = np.linalg.lstsq(matrix[:, chosen], wanted, rcond=None)[0]
        error = float(((matrix[:, chosen] @ found - wanted) ** 2).sum())
        if (found >= 0).all() and error < least:
            best, least = np.zeros(matrix.shape[1]), error
            best[list(chosen)] = found
    return best.tolist()


@dataclass(frozen=True)
class Validation:
    """Absolute relative errors of what was left out: their median and the largest, by group."""

    by: str
    median_error: float
    largest_error: float
    groups: dict[str, float]


def leave_one_out(
    observations: Sequence[Observation], by: str, group: Callable[[Observation], str | None]
) -> Validation:
    """Fit without each group, and predict it. ``group`` None: always in, never predicted.

    Raises:
        ValueError: fewer than two groups.
    """
    names = sorted({name for name in map(group, observations) if name is not None})
    if len(names) < 2:
        raise ValueError(f"leaving out one {by} needs two of them, found {names}")
    errors: dict[str, list[float]] = {}
    for name in names:
        known = fit([o for o in observations if group(o) != name])
        errors[name] = [abs(error_of(known, o)) for o in observations if group(o) == name]
    every = [error for own in errors.values() for error in own]
    groups = {name: median(own) for name, own in errors.items()}
    return Validation(by, median(every), max(every), groups)


def validate(observations: Sequence[Observation]) -> list[Validation]:
    """Leave out models, and lengths."""
    return [
        leave_one_out(observations, "model", lambda o: o.model),
        leave_one_out(observations, "length", lambda o: str(o.length) if o.length else None),
    ]


@click.command()
@click.option("--repetitions", default=10, show_default=True)
@click.option("--threads", type=int, help="Default: every core.")
@click.option("--out", default="engines", show_default=True, help="Folder of the bundles.")
@click.option("--models", default=MODELS, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Name to keep the record under.")
def main(repetitions: int, threads: int | None, out: str, models: str, device: str) -> None:
    """Build, measure, fit, record."""
    observations: list[Observation] = []
    for model in models.split(","):
        observations += list(_observe(model, Path(out), repetitions, threads))
    # A machine has one rate of products: the best that was seen, since something else disturbs.
    best = max(seen.peak_flops for seen in observations)
    observations = [replace(seen, peak_flops=best) for seen in observations]
    save(f"estimate-{device}", [asdict(seen) for seen in observations])
    MEASURED_FILE.write_text(json.dumps(fitted(), indent=1) + "\n")


def fitted() -> dict[str, Any]:
    """Return ``measured.json``, from the records: by device and precision, in digits that count."""
    known: dict[str, Any] = {}
    for file in sorted(RESULTS.glob("estimate-*.json")):
        record = json.loads(file.read_text())
        seen = [Observation(**row) for row in record["rows"]]
        known[file.stem.removeprefix("estimate-")] = {
            "fp32": {
                "efficiency": _rounded(asdict(fit(seen))),
                "validations": [_rounded(asdict(left)) for left in validate(seen)],
                "origin": {name: record[name] for name in ("command", "date", "device")},
            }
        }
    return known


def _rounded(facts: Any) -> Any:
    if isinstance(facts, dict):
        return {name: _rounded(value) for name, value in facts.items()}
    return float(f"{facts:.4g}") if isinstance(facts, float) else facts


def _observe(model: str, out: Path, repetitions: int, threads: int | None) -> Iterator[Observation]:
    """Yield prefills of several lengths, the vision encoder and later tokens, under all plans."""
    source = model
    if model in SHAPES:
        source = str(make_dummy(model, out / "checkpoints" / model, known_model=SHAPES[model]))
    bundles = {
        plan: make_bundle(source, plan=plan, out=out, dummy_weights=model in KNOWN_MODELS)
        for plan in PLANS
    }
    with ExitStack() as stack:
        sessions = {
            plan: stack.enter_context(Session(bundle, threads=threads))
            for plan, bundle in bundles.items()
        }
        series = measure_bundles(sessions, Settings(repetitions, warm_up=2, tokens=16))
        points = sweep(sessions, repetitions, parts=True)
    for plan, bundle in bundles.items():
        manifest = bundle.manifest

        def of(phase: str, length: int, calls: list[GraphCall], ms: float, plan=plan, m=manifest):
            sizes = Sizes.of(m.precision)
            work = total_work(work_of(call, m.config, m.plan, sizes) for call in calls)
            # Calls read their weights one after another: a cache holds those of one at best.
            peaks = _peaks(threads, work.nbytes / len(calls))
            layers = sum(layers_of(call, m.config, m.plan) for call in calls)
            return Observation(
                *(model, plan, phase, length, work.flops, work.nbytes, layers, ms),
                *(peaks.flops, peaks.bandwidth),
            )

        cold, _, step = series[plan].calls()
        spreads = series[plan].spreads()["cold"]
        yield of("vision", 0, [c for c in cold if c.graph == "vision"], spreads["vision"].median)
        yield of("token", 0, step, spreads["per_token"].median)
        for point in points[plan]:
            yield of("prefill", point.visual_tokens, list(point.calls), point.ms.median)


def _peaks(threads: int | None, nbytes: float) -> Peaks:
    """Return the machine's, reading about ``nbytes``: once for every power of two."""
    size = 1 << max((min(int(nbytes), MOST_BYTES) - 1).bit_length(), 22)
    return _measured_peaks(threads or cores(), size)


@cache
def _measured_peaks(threads: int, read_bytes: int) -> Peaks:
    return measure_peaks(threads=threads, read_bytes=read_bytes)


if __name__ == "__main__":
    main()
