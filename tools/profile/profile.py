"""``visistage profile``: a bundle, and beside it another, timed part by part; the whole path.

bundle ─▶ memory (own process) ─▶ peaks ─▶ questions in turns ─▶ sweep ─▶ operators ─▶ facts
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...graphs.bundle import Bundle
from ...graphs.errors import PromptError
from ...graphs.plan.call_cost import GraphCall, Sizes, work_of
from ...graphs.targets import ONNXRUNTIME, find_target
from ...runtime.session import Session
from .baseline import baseline_bundle, missing
from .commands import as_facts, commands_of
from .machine import cores, machine_facts
from .operators import operator_times
from .peak_memory import Footprint, footprint
from .peaks import CPU_PROVIDER, CUDA_PROVIDER, FILES, Peaks, measure_peaks, providers
from .power import Meter
from .profile_facts import above_roofline, dominant, power_facts, run_facts, speed_up
from .sweep import sweep
from .timing import Settings, TimedSeries, measure_bundles

PLAN, AGAINST = "plan", "against"
SWEEP_ROUNDS = 3
ProfileProgress = Callable[[str, int, int], None]
"""(what runs now, steps done of it, steps in all)."""


def profile(
    path: Path,
    *,
    against: Path | None = None,
    settings: Settings | None = None,
    operators: bool = True,
    backend: str | None = None,
    threads: int | None = None,
    progress: ProfileProgress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Everything that is known about the bundle's times, as plain data.

    Args:
        path: a bundle, or a folder holding exactly one.
        against: another bundle of the same model; by default a dense one that lies beside.
        settings: how much is measured.
        operators: whether to run ONNX Runtime's profiler, too.
        backend: as ``Session`` takes it.
        threads: likewise.
        progress: told what goes on.

    Raises:
        VisistageError: a bundle that cannot be run here or compared, or a setting without sense.
    """
    settings = settings or Settings()
    _check(settings)
    bundle = Bundle.open(path)
    other = baseline_bundle(bundle, against)
    bundles = {PLAN: bundle} | ({AGAINST: other} if other else {})
    with Session(bundle, backend=backend, threads=threads) as session:
        threads = threads or session.executor.threads  # as many for both bundles
    options: dict[str, Any] = {"backend": backend, "threads": threads}

    memory: dict[str, Footprint] = {}
    for number, (name, one) in enumerate(bundles.items()):
        progress("memory", number, len(bundles))
        memory[name] = footprint(one.path, tokens=min(settings.tokens, 8), **options)
    with ExitStack() as stack:
        sessions = {n: stack.enter_context(Session(b, **options)) for n, b in bundles.items()}
        device = sessions[PLAN].executor.device_name
        peaks = _peaks(bundle, device, threads)
        quantises = settings.warm_up + settings.repetitions
        done = 0

        def one_round(count: int) -> None:
            nonlocal done
            done += count
            progress("questions", done, quantises)

        meter = stack.enter_context(Meter.find())
        series = measure_bundles(sessions, settings, one_round)
        progress("visual tokens", 0, 1)
        points = sweep(sessions, SWEEP_ROUNDS, parts=_cuts(bundle, backend))
        if peaks is not None:  # once more: the better one is nearer to what the machine can do
            peaks = _better(peaks, _peaks(bundle, device, threads))
    noted: dict[str, Any] = {}
    if operators and device is None:
        noting = {n: b for n, b in bundles.items() if _on(b, backend) == ONNXRUNTIME}
        for number, (name, one) in enumerate(noting.items()):
            progress("operators", number, len(noting))
            noted[name] = asdict(operator_times(one, tokens=min(settings.tokens, 8), **options))
    runs = {
        name: run_facts(
            one,
            series[name],
            memory[name],
            points[name],
            peaks if one.manifest.precision == bundle.manifest.precision else None,
            meter,
        )
        | {"operators": noted.get(name)}
        for name, one in bundles.items()
    }
    return {
        "bundle": str(bundle.path),
        "settings": asdict(settings),
        "machine": {**machine_facts(), "threads": threads or cores()},
        "device": device,
        "peaks": peaks and asdict(peaks),
        "beaten": above_roofline(runs),
        "no_peaks": None if peaks else _why_no_peaks(bundle),
        "runs": runs,
        "speed_up": speed_up(runs[PLAN], runs[AGAINST]) if other else None,
        "how_to_compare": None if other else missing(bundle),
        "power": power_facts(meter),
        "dominant": dominant(runs[PLAN]),
        "commands": as_facts(commands_of(bundle, _all_calls(series[PLAN]))),
    }


def _check(settings: Settings) -> None:
    for name, least in (("repetitions", 1), ("warm_up", 0), ("tokens", 2)):
        value = getattr(settings, name)
        if value < least:
            raise PromptError(
                f"--{name.replace('_', '-')} is {value}: it must be at least {least}"
                + (", for a later token's time" if name == "tokens" else "")
            )


def _peaks(bundle: Bundle, device: str | None, threads: int | None) -> Peaks | None:
    """The machine's, where the bundle runs and in the type of its products; None: not known."""
    manifest = bundle.manifest
    if manifest.precision not in FILES or (device is not None and CUDA_PROVIDER not in providers()):
        return None
    return measure_peaks(
        # A CPU computes FP16 graphs in FP32, from a widened copy.
        precision="fp32" if device is None else manifest.precision,
        threads=threads or cores(),
        provider=CPU_PROVIDER if device is None else CUDA_PROVIDER,
        read_bytes=_step_bytes(bundle),
    )


def _why_no_peaks(bundle: Bundle) -> str:
    precision = bundle.manifest.precision
    if precision not in FILES:
        return f"there is no product of precision {precision} to measure"
    return "a GPU's products are measured by ONNX Runtime; type: pip install onnxruntime-gpu"


def _step_bytes(bundle: Bundle) -> float:
    """What one later token reads of the weights."""
    manifest = bundle.manifest
    sizes = Sizes.of(manifest.precision)
    stages = range(len(manifest.plan.stages))
    calls = [GraphCall(f"stage{index}", 1, 1) for index in stages]
    return sum(work_of(c, manifest.config, manifest.plan, sizes).weight_bytes for c in calls)


def _better(one: Peaks, other: Peaks | None) -> Peaks:
    assert other is not None
    return replace(
        one,
        flops=max(one.flops, other.flops),
        bandwidth=max(one.bandwidth, other.bandwidth),
    )


def _cuts(bundle: Bundle, backend: str | None) -> bool:
    """Whether stages take parts of a picture: graphs do, engines were compiled for whole ones."""
    return backend == ONNXRUNTIME or not find_target(bundle.manifest.target).engines


def _on(bundle: Bundle, backend: str | None) -> str:
    """The back end that runs it. Of operators only ONNX Runtime's own times are read."""
    return backend or find_target(bundle.manifest.target).backend


def _all_calls(series: TimedSeries) -> list[GraphCall]:
    cold, _, step = series.calls()
    return [*cold, *step]
