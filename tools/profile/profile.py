"""``visistage profile``: a bundle, and beside it another, timed part by part; the whole path.

bundle ─▶ answers ─▶ memory (own process) ─▶ peaks ─▶ questions in turns ─▶ sweep ─▶ operators
       ─▶ facts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...graphs.bundle import Bundle
from ...graphs.errors import BundleError
from ...graphs.plan.call_cost import GraphCall, total_work
from ...graphs.progress import Progress
from ...graphs.targets import ONNXRUNTIME, find_target
from ...runtime.backends.ort_packages import install_gpu
from ...runtime.hardware import busy_machine
from ...runtime.session import Session
from ..explain.dense import dense_bundle, how_to_build, is_unpruned
from ..findings import changed_answers, slower
from .answers import answer_pairs, answers_to, comparison_facts, image_questions
from .machine import cores, machine_facts
from .operators import operator_times
from .peak_memory import footprint
from .polygraphy_runs import polygraphy_facts, polygraphy_runs
from .power import Meter
from .profile_facts import above_roofline, dominant, power_facts, run_facts, speed_up
from .roofline import CPU_PROVIDER, CUDA_PROVIDER, FILES, Peaks, measure_peaks, providers, works_of
from .sweep import SweepPoint, sweep
from .timing import Settings, TimedSeries, measure_bundles

Measured = TypeVar("Measured")

PLAN, AGAINST = "plan", "against"
SWEEP_REPETITIONS = 3
MOST_TOKENS = 8
"""Tokens of an answer where something else than its time is measured."""


@dataclass(frozen=True)
class TimedRuns:
    """Times that sessions of all bundles took: series and sweeps by bundle, and the rest."""

    device: str | None
    peaks: Peaks | None
    series: dict[str, TimedSeries]
    sweeps: dict[str, list[SweepPoint]]
    meter: Meter
    polygraphy: dict[str, Any]


def profile(
    path: Path,
    *,
    against: Path | None = None,
    settings: Settings | None = None,
    operators: bool = True,
    backend: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure everything about the bundle's times; return plain data.

    Args:
        path: a bundle, or a folder holding exactly one.
        against: another bundle of the same model; by default a dense one beside it.
        settings: how much is measured.
        operators: whether to run ONNX Runtime's profiler, too.
        backend: as ``Session`` takes it.
        threads: likewise.
        progress: the progress callback.

    Raises:
        VisistageError: a bundle that cannot be run here or compared, or a setting without sense.
    """
    settings, progress = settings or Settings(), progress or Progress()
    settings.check()
    busy = busy_machine()
    bundle = Bundle.open(path)
    other = baseline_bundle(bundle, against)
    bundles = {PLAN: bundle} | ({AGAINST: other} if other else {})
    dense = other if other and is_unpruned(bundle, other) else dense_bundle(bundle, None)
    questions = image_questions(bundle.manifest.model) if dense else []
    progress.start("answers", 2 * len(questions))
    with Session(bundle, backend=backend, threads=threads) as session:
        threads = threads or session.executor.threads  # as many for both bundles
        answers = answers_to(questions, session, progress)
    options: dict[str, Any] = {"backend": backend, "threads": threads}
    pairs = []
    if dense:
        with Session(dense, **options) as session:
            unpruned = answers_to(questions, session, progress)
        pairs = answer_pairs(questions, answers, unpruned)
    few = {"tokens": min(settings.tokens, MOST_TOKENS), **options}

    memory = _each(bundles, "memory", progress, lambda one: footprint(one.path, **few))
    timed = _time(bundles, settings, options, progress)
    noted = {}
    if operators and timed.device is None:
        onnx = {n: b for n, b in bundles.items() if _backend_of(b, backend) == ONNXRUNTIME}
        noted = _each(onnx, "operators", progress, lambda one: operator_times(one, **few))
    runs = {}
    for name, one in bundles.items():
        alike = one.manifest.precision == bundle.manifest.precision
        peaks = timed.peaks if alike else None
        measured = (timed.series[name], memory[name], timed.sweeps[name], peaks, timed.meter)
        runs[name] = run_facts(one, *measured) | {"operators": noted.get(name)}
    return {
        "bundle": str(bundle.path),
        "settings": asdict(settings),
        "machine": {**machine_facts(), "threads": threads or cores()},
        "device": timed.device,
        "peaks": timed.peaks and asdict(timed.peaks),
        "beaten": above_roofline(runs),
        "no_peaks": None if timed.peaks else _why_no_peaks(bundle),
        "runs": runs,
        "speed_up": speed_up(runs[PLAN], runs[AGAINST]) if other else None,
        "findings": [
            *changed_answers(pairs),
            *filter(None, [busy]),
            *(_slower(runs) if other else []),
        ],
        "answers": dense and comparison_facts(questions, pairs, dense),
        "dense_hint": None if dense else _how_to_compare(bundle),
        "how_to_compare": None if other else _how_to_compare(bundle),
        "power": power_facts(timed.meter),
        "dominant": dominant(runs[PLAN]),
        "polygraphy": timed.polygraphy,
        "commands": [
            {"about": run.about, "command": run.text}
            for run in polygraphy_runs(bundle, timed.series[PLAN].call_ms())
        ],
    }


def baseline_bundle(bundle: Bundle, given: Path | None) -> Bundle | None:
    """Open the bundle at ``given``, or one with the plan ``dense`` beside ``bundle``, if any.

    Raises:
        BundleError: ``given`` is no bundle, is ``bundle`` itself, or is of another model.
    """
    if given is None:
        return dense_bundle(bundle, None)
    other = Bundle.open(given)
    if other.path.resolve() == bundle.path.resolve():
        raise BundleError(
            f"--against {given} is the bundle that is profiled. Name another one: "
            f"{how_to_build(bundle.manifest)}"
        )
    if other.manifest.config != bundle.manifest.config:
        raise BundleError(
            f"{other.path} is of another model ({other.manifest.model}) than {bundle.path} "
            f"({bundle.manifest.model}): their times would say nothing about plans. "
            f"Build one of the same: {how_to_build(bundle.manifest)}"
        )
    return other


def _slower(runs: Mapping[str, dict[str, Any]]) -> list[str]:
    kinds = {
        "first token": ("cold", "first_token"),
        "second question": ("again", "first_token"),
        "later token": ("cold", "per_token"),
    }
    times = {
        title: (runs[PLAN][kind][name]["median"], runs[AGAINST][kind][name]["median"])
        for title, (kind, name) in kinds.items()
    }
    return slower(times, runs[AGAINST]["name"])


def _how_to_compare(bundle: Bundle) -> str | None:
    """Return what to type for a comparison; None for the unpruned model itself."""
    return None if bundle.manifest.plan.is_dense else how_to_build(bundle.manifest)


def _each(
    bundles: Mapping[str, Bundle],
    step: str,
    progress: Progress,
    measure: Callable[[Bundle], Measured],
) -> dict[str, Measured]:
    """Measure every bundle, as one step."""
    progress.start(step, len(bundles))
    measured = {}
    for name, bundle in bundles.items():
        measured[name] = measure(bundle)
        progress.advance()
    return measured


def _time(
    bundles: Mapping[str, Bundle], settings: Settings, options: dict[str, Any], progress: Progress
) -> TimedRuns:
    """Time sessions of all bundles beside one another."""
    bundle, backend = bundles[PLAN], _backend_of(bundles[PLAN], options["backend"])
    with ExitStack() as stack:
        sessions = {n: stack.enter_context(Session(b, **options)) for n, b in bundles.items()}
        executor = sessions[PLAN].executor
        graphs = dict(getattr(executor, "sessions", {}))
        device, threads = executor.device_name, options["threads"]
        peaks = _peaks(bundle, device, threads)
        meter = stack.enter_context(Meter.find())
        progress.start("questions", settings.warm_up + settings.repetitions)
        series = measure_bundles(sessions, settings, progress.advance)
        progress.start("visual tokens")
        whole_images = backend != ONNXRUNTIME and find_target(bundle.manifest.target).engines
        sweeps = sweep(sessions, SWEEP_REPETITIONS, parts=not whole_images)
        again = _peaks(bundle, device, threads)  # the better one is nearer to what is possible
        if peaks is not None and again is not None:
            peaks = peaks.better(again)
    progress.start("polygraphy")  # now: a device has no room for its engines twice
    stock = polygraphy_facts(bundle, backend, series[PLAN].call_ms(), graphs, settings.repetitions)
    return TimedRuns(device, peaks, series, sweeps, meter, stock)


def _peaks(bundle: Bundle, device: str | None, threads: int | None) -> Peaks | None:
    """Measure the machine where the bundle runs, in the type of its products, if it can be."""
    manifest = bundle.manifest
    if manifest.precision not in FILES or (device is not None and CUDA_PROVIDER not in providers()):
        return None
    step = [GraphCall(f"stage{index}", 1, 1) for index in range(len(manifest.plan.stages))]
    return measure_peaks(
        # A CPU computes FP16 graphs in FP32, from a widened copy.
        precision="fp32" if device is None else manifest.precision,
        threads=threads or cores(),
        provider=CPU_PROVIDER if device is None else CUDA_PROVIDER,
        read_bytes=total_work(works_of(manifest, step)).weight_bytes,
    )


def _why_no_peaks(bundle: Bundle) -> str:
    precision = bundle.manifest.precision
    if precision not in FILES:
        return f"there is no product of precision {precision} to measure"
    return f"a GPU's products are measured by ONNX Runtime on it; type: {install_gpu()}"


def _backend_of(bundle: Bundle, backend: str | None) -> str:
    """Return the back end that runs a bundle, where ``backend`` was asked for."""
    return backend or find_target(bundle.manifest.target).backend
