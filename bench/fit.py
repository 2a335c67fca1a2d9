"""Measure models of several shapes at several lengths, and fit what a device reaches of its peaks.

    python -m visistage.bench.fit [--threads 2] [--repetitions 10]

Models and plans take turns only within a model: sessions of all at once would not fit. The peaks
are measured beside every model. Writes ``results/estimate-DEVICE.json`` (every observation) and
``tools/estimate/measured.json`` (what ``visistage estimate`` reads).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ..compile.build import make_bundle
from ..compile.checkpoint.dummy import make_dummy
from ..compile.checkpoint.known_models import KNOWN_MODELS, KnownModel
from ..graphs.plan.call_cost import GraphCall, Sizes, layers_of, total_work, work_of
from ..runtime.session import Session
from ..tools.estimate.devices import MEASURED_FILE
from ..tools.profile.machine import cores
from ..tools.profile.roofline import MOST_BYTES, Peaks, measure_peaks
from ..tools.profile.sweep import sweep
from ..tools.profile.timing import Settings, measure_bundles
from .fit_peaks import Observation, fit, validate
from .record import RESULTS, save

PLANS = ("dense", "visipruner")
SMALL = KNOWN_MODELS["llava-45m"]


def with_decoder(layers: int, hidden: int, intermediate: int) -> KnownModel:
    """llava-45m with another decoder."""
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
    best = max(one.peak_flops for one in observations)
    observations = [replace(one, peak_flops=best) for one in observations]
    given = f" --threads {threads}" if threads else ""
    given += f" --models {models}" if models != MODELS else ""
    command = f"python -m visistage.bench.fit --repetitions {repetitions}{given}"
    save(f"estimate-{device}", command, [asdict(one) for one in observations])
    MEASURED_FILE.write_text(json.dumps(fitted(), indent=1) + "\n")


def fitted() -> dict[str, Any]:
    """``measured.json``, from the records: by device and precision, in digits that count."""
    known: dict[str, Any] = {}
    for file in sorted(RESULTS.glob("estimate-*.json")):
        record = json.loads(file.read_text())
        seen = [Observation(**row) for row in record["rows"]]
        known[file.stem.removeprefix("estimate-")] = {
            "fp32": {
                "efficiency": _rounded(asdict(fit(seen))),
                "validations": [_rounded(asdict(one)) for one in validate(seen)],
                "origin": {name: record[name] for name in ("command", "date", "device")},
            }
        }
    return known


def _rounded(facts: Any) -> Any:
    if isinstance(facts, dict):
        return {name: _rounded(value) for name, value in facts.items()}
    return float(f"{facts:.4g}") if isinstance(facts, float) else facts


def _observe(model: str, out: Path, repetitions: int, threads: int | None) -> Iterator[Observation]:
    """Prefills of several lengths, the tower, and later tokens of one model under all plans."""
    source = model
    if model in SHAPES:
        source = str(make_dummy(model, out / "checkpoints" / model, known_model=SHAPES[model]))
    bundles = {
        plan: make_bundle(source, plan=plan, out=out, dummy_weights=model in KNOWN_MODELS)
        for plan in PLANS
    }
    settings = Settings(repetitions, warm_up=2, tokens=16)
    with ExitStack() as stack:
        sessions = {
            plan: stack.enter_context(Session(bundle, threads=threads))
            for plan, bundle in bundles.items()
        }
        series = measure_bundles(sessions, settings)
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


_measured: dict[int, Peaks] = {}


def _peaks(threads: int | None, nbytes: float) -> Peaks:
    """The machine's, reading about ``nbytes``: once for every power of two."""
    size = 1 << max((min(int(nbytes), MOST_BYTES) - 1).bit_length(), 22)
    if size not in _measured:
        _measured[size] = measure_peaks(threads=threads or cores(), read_bytes=size)
    return _measured[size]


if __name__ == "__main__":
    main()
