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
    Call,
    Sizes,
    Slots,
    Work,
    layers_of,
    question_calls,
    token_calls,
    total,
    work_of,
)
from ...graphs.plan.cost import Geometry
from ..profile.machine import cores, machine_facts
from ..profile.peaks import measure_peaks
from .devices import CPU, Device, compute_type, find_device
from .estimate_target import Subject
from .fit_peaks import Efficiency
from .measured import Measured, measured
from .peer_figures import efficiency_range, figures_of

CONTEXT = 1024
BUCKET = 128
"""Slots that ONNX Runtime's caches grow by (``runtime/backends/cpu_caches.py``)."""

RESERVE = 2 << 30
"""Bytes left for activations, and on shared memory for the system."""


@dataclass(frozen=True)
class Prompt:
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
            work = total(works)
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
    subject: Subject, device: str, prompt: Prompt, *, threads: int | None = None
) -> dict[str, Any]:
    """What ``subject`` would take on ``device``, beside the unpruned model; plain data.

    Raises:
        TargetError: an unknown device, or a precision that it is not known to compute.
        CapacityError: a context that the prompt does not fit.
    """
    rows = subject.prefix + subject.plan.visual_tokens + prompt.text + prompt.tokens
    if device != CPU and rows > prompt.context:
        raise CapacityError(
            f"a picture, {prompt.text} rows of question and {prompt.tokens} tokens of answer take "
            f"{rows} rows, the context is {prompt.context}. Type: --context {-(-rows // 64) * 64}"
        )
    if device == CPU:
        machine, known = _this_cpu(subject, threads), None
    else:
        known = find_device(device)
        machine = _published(known, subject)
    subjects = {"plan": subject}
    if not subject.plan.is_dense:
        subjects["dense"] = subject.dense
    return {
        "model": subject.name,
        "plan": subject.plan.name,
        "precision": subject.precision,
        "prompt": {**asdict(prompt), "prefix": subject.prefix, "rows": rows},
        "decides_per_prompt": subject.plan.probe is not None,
        "device": _device_facts(machine, known, threads),
        "efficiency": _efficiency_facts(machine),
        "estimates": {
            name: _times(one, machine, prompt, device == CPU) for name, one in subjects.items()
        },
        "memory": _memory(subject, machine, known, prompt, device == CPU),
        "peers": [asdict(f) | {"geometry": None} for f in figures_of(device)],
    }


def _run_in(machine: Machine, precision: str) -> str:
    """The precision that a machine computes in: a CPU widens FP16 graphs, and leaves caches as INT8
    where they are.
    """
    return precision.replace("fp16", "fp32", 1) if machine.name == CPU else precision


def _this_cpu(subject: Subject, threads: int | None) -> Machine:
    """The machine that this runs on, its peaks measured now."""
    if compute_type(subject.precision) == "int8" or subject.precision.startswith("w"):
        raise TargetError(
            f"no rate of precision '{subject.precision}' is known for this CPU. Profile a bundle "
            "instead: visistage profile BUNDLE, or estimate --precision fp32"
        )
    found = measured(CPU, "fp32")
    if found is None:
        raise TargetError(
            "no CPU was measured for this version, so its efficiency is unknown. In a clone, "
            "measure this one: python -m visistage.bench.fit"
        )
    step = [Call(f"stage{index}", 1, 1) for index in range(len(subject.plan.stages))]
    sizes = Sizes.of("fp32")
    works = [work_of(call, subject.config, subject.plan, sizes) for call in step]
    read = max(work.weight_bytes for work in works)
    peaks = measure_peaks(threads=threads or cores(), read_bytes=read)
    memory = machine_facts()["memory_bytes"]
    return Machine(CPU, peaks.flops, peaks.bandwidth, memory, (found.efficiency,), found)


def _published(device: Device, subject: Subject) -> Machine:
    """A device as its data sheet has it."""
    kind = compute_type(subject.precision)
    found = measured(device.name, subject.precision)
    if found is not None:
        ends: tuple[Efficiency, ...] = (found.efficiency,)
    else:
        compute, memory = efficiency_range(True), efficiency_range(False)
        ends = tuple(Efficiency(compute[i], memory[i], 0.0) for i in (1, 0))  # fastest first
    return Machine(
        device.name, device.flops[kind], device.bandwidth, device.memory_bytes, ends, found
    )


def _times(subject: Subject, machine: Machine, prompt: Prompt, bucketed: bool) -> dict[str, Any]:
    """Milliseconds of every phase: [fastest, slowest]; None where the device's rate is unknown."""
    slots = _slots(subject, prompt, bucketed)
    shape: dict[str, Any] = {
        "prefix": subject.prefix,
        "visual": subject.plan.visual_tokens,
        "slots": slots,
    }
    cold = question_calls(subject.plan, text=prompt.text, **shape)
    again = question_calls(subject.plan, text=prompt.text, cached=True, **shape)
    middle = prompt.text + prompt.tokens // 2
    step = token_calls(subject.plan, text=middle, **shape)
    precision = _run_in(machine, subject.precision)
    sizes = Sizes.of(precision)

    def works(calls: Sequence[Call]) -> list[Work]:
        return [work_of(call, subject.config, subject.plan, sizes) for call in calls]

    def ms(calls: Sequence[Call]) -> list[float] | None:
        if machine.flops is None:
            return None
        layers = sum(layers_of(call, subject.config, subject.plan) for call in calls)
        return [machine.ms(works(calls), layers, one) for one in machine.efficiencies]

    def reading(calls: Sequence[Call]) -> list[float]:
        """A later token where the rate of products is unknown: bytes alone, which decide it."""
        nbytes = total(works(calls)).nbytes
        return [1e3 * nbytes / one.bandwidth / machine.bandwidth for one in machine.efficiencies]

    tower = [call for call in cold if call.graph == "vision"]
    decoder = [call for call in cold if call.graph != "vision"]
    return {
        "plan": subject.plan.name,
        "tower_ms": ms(tower),
        "prefill_ms": ms(decoder),
        "first_token_ms": ms(cold),
        "second_question_ms": ms(again),
        "per_token_ms": ms(step) or reading(step),
        "prefill_flops": total(works(decoder)).flops,
        "token_bytes": total(works(step)).nbytes,
    }


def _slots(subject: Subject, prompt: Prompt, bucketed: bool) -> Slots:
    """Slots of a stage's cache: buckets that grow on ONNX Runtime, fixed in engines."""
    fixed = stage_slots(subject.plan, subject.plan.visual_tokens, prompt.context)

    def slots(stage: int, held: int) -> int:
        return -(-held // BUCKET) * BUCKET if bucketed else fixed[stage]

    return slots


def _memory(
    subject: Subject, machine: Machine, device: Device | None, prompt: Prompt, bucketed: bool
) -> dict[str, Any]:
    """Bytes of weights and caches, against what the device has."""
    geometry = Geometry.of(subject.config.text)
    precision = _run_in(machine, subject.precision)
    slots = _slots(subject, prompt, bucketed)
    row = 2 * geometry.widths[1] * Sizes.of(precision).cache
    caches = 0.0
    for index, stage in enumerate(subject.plan.stages):
        held = subject.prefix + stage.visual_tokens + prompt.text + prompt.tokens
        caches += row * stage.depth * slots(index, held)
    weights = subject.weights()
    needed = weights + caches
    return {
        "weight_bytes": weights,
        "cache_bytes": caches,
        "reserve_bytes": RESERVE,
        "device_bytes": machine.memory_bytes,
        "shared": device is None or device.shared,
        "fits": needed + RESERVE <= machine.memory_bytes,
    }


def _device_facts(machine: Machine, device: Device | None, threads: int | None) -> dict[str, Any]:
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
