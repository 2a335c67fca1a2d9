"""A target on a device: times, memory, and how far to believe them.

Times are FLOPs and bytes of every call (``graphs/plan/call_cost.py``) over the device's peaks, at
the efficiency that was fitted where the device was measured. Elsewhere it is a range: what
published figures of other stacks reached on a Jetson (``devices.py``). Both ends are computed, and
shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...graphs.caches import stage_slots
from ...graphs.errors import CapacityError, TargetError
from ...graphs.families.registry import smaller_images
from ...graphs.parts import VISION
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
from .devices import (
    CPU_DEVICE,
    DeviceSpec,
    Efficiency,
    Measured,
    compute_type,
    efficiency_range,
    figures_of,
    find_device_spec,
    measured,
)
from .estimate_target import EstimateTarget

CONTEXT = 1024
BUCKET = 128
"""Slots that ONNX Runtime's caches grow by (``runtime/backends/cpu_caches.py``)."""

RESERVE = 2 << 30
"""Bytes left for activations, and on shared memory for the system."""


@dataclass(frozen=True)
class PromptLengths:
    """Lengths of a prompt: rows of the question, tokens of the answer, rows engines hold."""

    text: int = 40
    tokens: int = 32
    context: int = CONTEXT


@dataclass(frozen=True)
class Machine:
    """A device, its rate in a target's type, and the efficiencies to compute with.

    efficiencies: one that was fitted, or the two ends of a range.
    """

    device: DeviceSpec
    flops: float | None
    efficiencies: tuple[Efficiency, ...]
    fitted: Measured | None

    @property
    def is_cpu(self) -> bool:
        """True where ONNX Runtime runs the graphs here: in FP32, over caches that grow."""
        return self.device.name == CPU_DEVICE

    def precision(self, of: str) -> str:
        """Return the precision that it computes in: a CPU widens FP16 graphs, not INT8 caches."""
        return of.replace("fp16", "fp32", 1) if self.is_cpu else of

    def slots(self, target: EstimateTarget, prompt: PromptLengths) -> Slots:
        """Return the slots of a stage's cache: buckets that grow on a CPU, fixed in engines."""
        fixed = stage_slots(target.plan, target.plan.visual_tokens, prompt.context)

        def slots(stage: int, held: int) -> int:
            return -(-held // BUCKET) * BUCKET if self.is_cpu else fixed[stage]

        return slots

    def ms(self, works: Sequence[Work], layers: int) -> list[float] | None:
        """Return milliseconds of some calls by efficiency; None where the rate is unknown.

        A fit adds operations and bytes up. Published figures say what was reached of one of them,
        the other being hidden behind it; so there the slower one counts, call by call.
        """
        if self.flops is None:
            return None
        bandwidth = self.device.bandwidth
        if self.fitted is not None:
            work = total_work(works)
            given = (work.flops, work.nbytes, layers, self.flops, bandwidth)
            return [efficiency.predict_ms(*given) for efficiency in self.efficiencies]
        return [
            1e3
            * sum(
                max(
                    work.flops / (efficiency.compute * self.flops),
                    work.nbytes / (efficiency.bandwidth * bandwidth),
                )
                for work in works
            )
            for efficiency in self.efficiencies
        ]

    def reading_ms(self, works: Sequence[Work]) -> list[float]:
        """Return milliseconds of reading all bytes, which decide a later token."""
        nbytes, bandwidth = total_work(works).nbytes, self.device.bandwidth
        return [1e3 * nbytes / end.bandwidth / bandwidth for end in self.efficiencies]


def estimate(
    target: EstimateTarget, device: str, prompt: PromptLengths, *, threads: int | None = None
) -> dict[str, Any]:
    """Return what ``target`` would take on ``device``, beside the unpruned model; plain data.

    Raises:
        TargetError: an unknown device, or a precision that it is not known to compute.
        CapacityError: a context that the prompt does not fit.
    """
    rows = target.prefix + target.plan.visual_tokens + prompt.text + prompt.tokens
    if device != CPU_DEVICE and rows > prompt.context:
        smaller = smaller_images(target.config)
        fewer = f", or build for smaller images: {smaller}" if smaller else ""
        raise CapacityError(
            f"an image of {target.plan.visual_tokens} tokens, {prompt.text} rows of question "
            f"and {prompt.tokens} tokens of answer take "
            f"{rows} rows, the context is {prompt.context}. Type: --context {-(-rows // 64) * 64}"
            f"{fewer}"
        )
    machine = machine_of(target, device, threads)
    targets = {"plan": target}
    if not target.plan.is_dense:
        targets["dense"] = target.dense
    known, fitted = machine.device, machine.fitted
    return {
        "model": target.name,
        "plan": target.plan.name,
        "precision": target.precision,
        "prompt": {**asdict(prompt), "prefix": target.prefix, "rows": rows},
        "decides_per_prompt": target.plan.probe is not None,
        "device": {
            "name": known.name,
            "flops": machine.flops,
            "bandwidth": known.bandwidth,
            "about": known.about,
            "sources": list(known.sources),
            "derived": known.derived,
        },
        "efficiency": {
            "fitted": fitted is not None,
            "ends": [asdict(end) for end in machine.efficiencies],
            "validations": fitted.validations if fitted else [],
            "error": fitted.error if fitted else None,
            "origin": fitted.origin if fitted else None,
        },
        "estimates": {name: _times(one, machine, prompt) for name, one in targets.items()},
        "memory": _memory(target, machine, prompt),
        "peers": [asdict(figure) | {"geometry": None} for figure in figures_of(device)],
    }


def machine_of(target: EstimateTarget, device: str, threads: int | None = None) -> Machine:
    """Return a device by its name, at the efficiency that is known of it; ``cpu`` is measured.

    Raises:
        TargetError: an unknown device, or a precision that it is not known to compute.
    """
    if device == CPU_DEVICE:
        return _this_cpu(target, threads or cores())
    return _published(device, target)


def _this_cpu(target: EstimateTarget, threads: int) -> Machine:
    """Return the machine that this runs on, its peaks measured now."""
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
    peaks = measure_peaks(threads=threads, read_bytes=max(work.weight_bytes for work in works))
    facts = machine_facts()
    device = DeviceSpec(
        name=CPU_DEVICE,
        about=f"this machine: {facts['processor']}, {threads} threads",
        flops={"fp32": peaks.flops},
        bandwidth=peaks.bandwidth,
        memory_bytes=facts["memory_bytes"],
        shared=True,
        sources=("measured now",),
    )
    return Machine(device, peaks.flops, (found.efficiency,), found)


def _published(name: str, target: EstimateTarget) -> Machine:
    """Return a device as its data sheet has it."""
    device = find_device_spec(name)
    found = measured(name, target.precision)
    if found is not None:
        ends: tuple[Efficiency, ...] = (found.efficiency,)
    else:
        compute, memory = efficiency_range(True), efficiency_range(False)
        ends = tuple(Efficiency(compute[i], memory[i], 0.0) for i in (1, 0))  # fastest first
    return Machine(device, device.flops[compute_type(target.precision)], ends, found)


def _times(target: EstimateTarget, machine: Machine, prompt: PromptLengths) -> dict[str, Any]:
    """Return milliseconds of every phase: [fastest, slowest]; None where the rate is unknown."""
    shape: dict[str, Any] = {
        "prefix": target.prefix,
        "visual": target.plan.visual_tokens,
        "slots": machine.slots(target, prompt),
    }
    cold = question_calls(target.plan, text=prompt.text, **shape)
    again = question_calls(target.plan, text=prompt.text, cached=True, **shape)
    step = token_calls(target.plan, text=prompt.text + prompt.tokens // 2, **shape)
    encoder = [call for call in cold if call.graph == VISION]
    decoder = [call for call in cold if call.graph != VISION]
    sizes = Sizes.of(machine.precision(target.precision))

    def works(calls: Sequence[GraphCall]) -> list[Work]:
        return [work_of(call, target.config, target.plan, sizes) for call in calls]

    def ms(calls: Sequence[GraphCall]) -> list[float] | None:
        layers = sum(layers_of(call, target.config, target.plan) for call in calls)
        return machine.ms(works(calls), layers)

    return {
        "plan": target.plan.name,
        "tower_ms": ms(encoder),
        "prefill_ms": ms(decoder),
        "first_token_ms": ms(cold),
        "second_question_ms": ms(again),
        "per_token_ms": ms(step) or machine.reading_ms(works(step)),
        "prefill_flops": total_work(works(decoder)).flops,
        "token_bytes": total_work(works(step)).nbytes,
    }


def _memory(target: EstimateTarget, machine: Machine, prompt: PromptLengths) -> dict[str, Any]:
    """Return bytes of weights and caches, against what the device has."""
    slots = machine.slots(target, prompt)
    element = Sizes.of(machine.precision(target.precision)).cache
    row = 2 * Geometry.of(target.config.text).widths[1] * element
    caches = 0.0
    for index, stage in enumerate(target.plan.stages):
        held = target.prefix + stage.visual_tokens + prompt.text + prompt.tokens
        caches += row * len(stage.attention_layers) * slots(index, held)
    weights = target.weights()
    return {
        "weight_bytes": weights,
        "cache_bytes": caches,
        "reserve_bytes": RESERVE,
        "device_bytes": machine.device.memory_bytes,
        "shared": machine.device.shared,
        "fits": weights + caches + RESERVE <= machine.device.memory_bytes,
    }
