"""A subject on a device: times, memory, and how far to believe them.

Times are FLOPs and bytes of every call (``graphs/plan/call_cost.py``) over the device's peaks, at
the efficiency that was fitted where the device was measured. Elsewhere it is a range: what
published figures of other stacks reached on a Jetson (``peers.py``). Both ends are computed, and
shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...graphs.contract import stage_slots
from ...graphs.errors import CapacityError, TargetError
from ...graphs.plan.call_cost import (
    GraphCall,
    Sizes,
    Slots,
    Work,
    layers_of,
    question_calls,
    token_calls,
    total_work,
    work_of,
)
from ...graphs.plan.cost import Geometry
from ..profile.machine import cores, machine_facts
from ..profile.roofline import measure_peaks
from .devices import CPU_DEVICE, DeviceSpec, compute_type, find_device_spec
from .estimate_target import EstimateTarget
from .fit_peaks import Efficiency
from .measured import Measured, measured
from .peer_figures import efficiency_range, figures_of

CONTEXT = 1024
BUCKET = 128
"""Slots that ONNX Runtime's caches grow by (``runtime/backends/cpu_caches.py``)."""

RESERVE = 2 << 30
"""Bytes left for activations, and on shared memory for the system."""


@dataclass(frozen=True)
class PromptLengths:
    """What is asked: rows of the question, tokens of the answer, rows that engines hold."""

    text: int = 40
    tokens: int = 32
    context: int = CONTEXT


@dataclass(frozen=True)
class Machine:
    """A device's peaks and the efficiencies to compute with: one, or the two ends of a range."""

    name: str
    flops: float | None
    bandwidth: float
    memory_bytes: float
    efficiencies: tuple[Efficiency, ...]
    fitted: Measured | None

    def ms(self, works: Sequence[Work], layers: int, efficiency: Efficiency) -> float:
        """Milliseconds of some calls.

        A fit adds operations and bytes up. Published figures say what was reached of one of them,
        the other being hidden behind it; so there the slower one counts, call by call.
        """
        assert self.flops is not None
        if self.fitted is not None:
            work = total_work(works)
            peaks = (self.flops, self.bandwidth)
            return efficiency.predict_ms(work.flops, work.nbytes, layers, *peaks)
        return 1e3 * sum(
            max(
                work.flops / (efficiency.compute * self.flops),
                work.nbytes / (efficiency.bandwidth * self.bandwidth),
            )
            for work in works
        )


def estimate(
    target: EstimateTarget, device: str, prompt: PromptLengths, *, threads: int | None = None
) -> dict[str, Any]:
    """What ``target`` would take on ``device``, beside the unpruned model; plain data.

    Raises:
        TargetError: an unknown device, or a precision that it is not known to compute.
        CapacityError: a context that the prompt does not fit.
    """
    rows = target.prefix + target.plan.visual_tokens + prompt.text + prompt.tokens
    if device != CPU_DEVICE and rows > prompt.context:
        raise CapacityError(
            f"a picture, {prompt.text} rows of question and {prompt.tokens} tokens of answer take "
            f"{rows} rows, the context is {prompt.context}. Type: --context {-(-rows // 64) * 64}"
        )
    if device == CPU_DEVICE:
        machine, known = _this_cpu(target, threads), None
    else:
        known = find_device_spec(device)
        machine = _published(known, target)
    targets = {"plan": target}
    if not target.plan.is_dense:
        targets["dense"] = target.dense
    return {
        "model": target.name,
        "plan": target.plan.name,
        "precision": target.precision,
        "prompt": {**asdict(prompt), "prefix": target.prefix, "rows": rows},
        "decides_per_prompt": target.plan.probe is not None,
        "device": _device_facts(machine, known, threads),
        "efficiency": _efficiency_facts(machine),
        "estimates": {
            name: _times(one, machine, prompt, device == CPU_DEVICE)
            for name, one in targets.items()
        },
        "memory": _memory(target, machine, known, prompt, device == CPU_DEVICE),
        "peers": [asdict(f) | {"geometry": None} for f in figures_of(device)],
    }


def _run_in(machine: Machine, precision: str) -> str:
    """The precision that a machine computes in: a CPU widens FP16 graphs, and leaves caches as INT8
    where they are.
    """
    return precision.replace("fp16", "fp32", 1) if machine.name == CPU_DEVICE else precision


def _this_cpu(target: EstimateTarget, threads: int | None) -> Machine:
    """The machine that this runs on, its peaks measured now."""
    if compute_type(target.precision) == "int8" or target.precision.startswith("w"):
        raise TargetError(
            f"no rate of precision '{target.precision}' is known for this CPU. Profile a bundle "
            "instead: visistage profile BUNDLE, or estimate --precision fp32"
        )
    found = measured(CPU_DEVICE, "fp32")
    if found is None:
        raise TargetError(
            "no CPU was measured for this version, so its efficiency is unknown. In a clone, "
            "measure this one: python -m visistage.bench.fit"
        )
    step = [GraphCall(f"stage{index}", 1, 1) for index in range(len(target.plan.stages))]
    sizes = Sizes.of("fp32")
    works = [work_of(call, target.config, target.plan, sizes) for call in step]
    read = max(work.weight_bytes for work in works)
    peaks = measure_peaks(threads=threads or cores(), read_bytes=read)
    memory = machine_facts()["memory_bytes"]
    return Machine(CPU_DEVICE, peaks.flops, peaks.bandwidth, memory, (found.efficiency,), found)


def _published(device: DeviceSpec, target: EstimateTarget) -> Machine:
    """A device as its data sheet has it."""
    kind = compute_type(target.precision)
    found = measured(device.name, target.precision)
    if found is not None:
        ends: tuple[Efficiency, ...] = (found.efficiency,)
    else:
        compute, memory = efficiency_range(True), efficiency_range(False)
        ends = tuple(Efficiency(compute[i], memory[i], 0.0) for i in (1, 0))  # fastest first
    return Machine(
        device.name, device.flops[kind], device.bandwidth, device.memory_bytes, ends, found
    )


def _times(
    target: EstimateTarget, machine: Machine, prompt: PromptLengths, bucketed: bool
) -> dict[str, Any]:
    """Milliseconds of every phase: [fastest, slowest]; None where the device's rate is unknown."""
    slots = _slots(target, prompt, bucketed)
    shape: dict[str, Any] = {
        "prefix": target.prefix,
        "visual": target.plan.visual_tokens,
        "slots": slots,
    }
    cold = question_calls(target.plan, text=prompt.text, **shape)
    again = question_calls(target.plan, text=prompt.text, cached=True, **shape)
    middle = prompt.text + prompt.tokens // 2
    step = token_calls(target.plan, text=middle, **shape)
    precision = _run_in(machine, target.precision)
    sizes = Sizes.of(precision)

    def works(calls: Sequence[GraphCall]) -> list[Work]:
        return [work_of(call, target.config, target.plan, sizes) for call in calls]

    def ms(calls: Sequence[GraphCall]) -> list[float] | None:
        if machine.flops is None:
            return None
        layers = sum(layers_of(call, target.config, target.plan) for call in calls)
        return [machine.ms(works(calls), layers, one) for one in machine.efficiencies]

    def reading(calls: Sequence[GraphCall]) -> list[float]:
        """A later token where the rate of products is unknown: bytes alone, which decide it."""
        nbytes = total_work(works(calls)).nbytes
        return [1e3 * nbytes / one.bandwidth / machine.bandwidth for one in machine.efficiencies]

    encoder = [call for call in cold if call.graph == "vision"]
    decoder = [call for call in cold if call.graph != "vision"]
    return {
        "plan": target.plan.name,
        "tower_ms": ms(encoder),
        "prefill_ms": ms(decoder),
        "first_token_ms": ms(cold),
        "second_question_ms": ms(again),
        "per_token_ms": ms(step) or reading(step),
        "prefill_flops": total_work(works(decoder)).flops,
        "token_bytes": total_work(works(step)).nbytes,
    }


def _slots(target: EstimateTarget, prompt: PromptLengths, bucketed: bool) -> Slots:
    """Slots of a stage's cache: buckets that grow on ONNX Runtime, fixed in engines."""
    fixed = stage_slots(target.plan, target.plan.visual_tokens, prompt.context)

    def slots(stage: int, held: int) -> int:
        return -(-held // BUCKET) * BUCKET if bucketed else fixed[stage]

    return slots


def _memory(
    target: EstimateTarget,
    machine: Machine,
    device: DeviceSpec | None,
    prompt: PromptLengths,
    bucketed: bool,
) -> dict[str, Any]:
    """Bytes of weights and caches, against what the device has."""
    geometry = Geometry.of(target.config.text)
    precision = _run_in(machine, target.precision)
    slots = _slots(target, prompt, bucketed)
    row = 2 * geometry.widths[1] * Sizes.of(precision).cache
    caches = 0.0
    for index, stage in enumerate(target.plan.stages):
        held = target.prefix + stage.visual_tokens + prompt.text + prompt.tokens
        caches += row * stage.depth * slots(index, held)
    weights = target.weights()
    needed = weights + caches
    return {
        "weight_bytes": weights,
        "cache_bytes": caches,
        "reserve_bytes": RESERVE,
        "device_bytes": machine.memory_bytes,
        "shared": device is None or device.shared,
        "fits": needed + RESERVE <= machine.memory_bytes,
    }


def _device_facts(
    machine: Machine, device: DeviceSpec | None, threads: int | None
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": machine.name,
        "flops": machine.flops,
        "bandwidth": machine.bandwidth,
    }
    if device is None:
        return facts | {
            "about": f"this machine: {machine_facts()['processor']}, {threads or cores()} threads",
            "sources": ["measured now"],
            "derived": "",
        }
    return facts | {
        "about": device.about,
        "sources": list(device.sources),
        "derived": device.derived,
    }


def _efficiency_facts(machine: Machine) -> dict[str, Any]:
    fitted = machine.fitted
    return {
        "fitted": fitted is not None,
        "ends": [asdict(one) for one in machine.efficiencies],
        "validations": fitted.validations if fitted else [],
        "error": fitted.error if fitted else None,
        "origin": fitted.origin if fitted else None,
    }
