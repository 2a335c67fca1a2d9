"""Replicas for a rate of questions: costs measured here or estimated, and a simulation of them."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np

from ...graphs.bundle import Bundle
from ...graphs.errors import TargetError
from ...graphs.parts import VISION
from ...graphs.plan.call_cost import (
    GraphCall,
    Sizes,
    Work,
    layers_of,
    question_calls,
    token_calls,
    work_of,
)
from ...runtime.engine import GAP_MS, Engine
from .devices import CPU_DEVICE
from .estimate_target import EstimateTarget
from .predict import Machine, PromptLengths, machine_of
from .queueing import ServingCosts, Traffic, encoders_needed, replicas_needed

QUESTIONS = 12
"""Cold and known questions that measured costs are medians of."""

STEP_TOKENS = 48
"""Tokens, at least, of the answers whose steps are timed."""


def capacity(
    target: EstimateTarget,
    device: str,
    prompt: PromptLengths,
    traffic: Traffic,
    p95_ms: float,
    *,
    lanes: int,
    bundle: Bundle | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Return the replicas that keep ``p95_ms`` to the first token; plain data.

    On this machine the costs of a bundle are measured; of other devices, and of the unpruned model
    beside the plan, they are estimated (the slower end of a range).

    Raises:
        TargetError: the device's rate is unknown, or no number of replicas is enough.
    """
    measured = bundle is not None and device == CPU_DEVICE
    if measured:
        assert bundle is not None
        with Engine(bundle, lanes=lanes, threads=threads) as engine:
            costs = {"plan": measured_costs(engine, prompt)}
    else:
        machine = machine_of(target, device, threads)
        targets = {"plan": target} | ({} if target.plan.is_dense else {"dense": target.dense})
        costs = {
            name: estimated_costs(each, machine, prompt, lanes) for name, each in targets.items()
        }
    return {
        "rate": traffic.rate,
        "p95_ms": p95_ms,
        "questions_per_image": traffic.questions_per_image,
        "tokens": traffic.tokens,
        "lanes": lanes,
        "measured": measured,
        "device": device,
        "costs": {name: asdict(own) for name, own in costs.items()},
        "needed": {name: _needed(own, traffic, p95_ms) for name, own in costs.items()},
        "image_bytes": _image_bytes(target),
    }


def _needed(costs: ServingCosts, traffic: Traffic, p95_ms: float) -> dict[str, Any]:
    """Return replicas of one kind, and of two where that takes fewer machines."""
    found = replicas_needed(costs, traffic, p95_ms, gap_ms=GAP_MS)
    if found is None:
        alone = costs.encode_ms + costs.prefill_ms
        raise TargetError(
            f"no number of replicas keeps {p95_ms:g} ms at the 95th percentile: a question about a "
            f"new image takes {alone:.0f} ms alone. Allow more with --p95, or prune more: "
            "--plan scope:keep=64"
        )
    apart = encoders_needed(costs, traffic, p95_ms, gap_ms=GAP_MS, most=found.replicas)
    return {
        **asdict(found),
        "apart": apart and {"encoders": apart[0], **asdict(apart[1])},
    }


def _image_bytes(target: EstimateTarget) -> int:
    """Return the bytes of an image's rows that enter: they travel where encoders are apart."""
    return target.plan.entering * target.config.text.hidden * 2


def estimated_costs(
    target: EstimateTarget, machine: Machine, prompt: PromptLengths, lanes: int
) -> ServingCosts:
    """Return costs from operations and bytes, at the slower end of the machine's efficiencies.

    A step of several answers reads the weights once, and every answer's own cache.

    Raises:
        TargetError: the machine's rate is unknown.
    """
    config, plan = target.config, target.plan
    sizes = Sizes.of(machine.precision(target.precision))
    shape: dict[str, Any] = {
        "prefix": target.prefix,
        "visual": plan.visual_tokens,
        "slots": machine.slots(target, prompt),
    }

    def ms(calls: list[GraphCall], answers: int = 1) -> float:
        works = [work_of(call, config, plan, sizes) for call in calls]
        works = [
            Work(w.flops * answers, w.weight_bytes, w.cache_bytes * answers, w.attention_flops)
            for w in works
        ]
        found = machine.ms(works, sum(layers_of(call, config, plan) for call in calls))
        if found is None:
            raise TargetError(
                f"{machine.device.name} has no known rate in {target.precision}. Name another "
                "precision, or device"
            )
        return max(found)

    cold = question_calls(plan, text=prompt.text, **shape)
    known = question_calls(plan, text=prompt.text, cached=True, **shape)
    step = token_calls(plan, text=prompt.text + prompt.tokens // 2, **shape)
    decoder = [call for call in cold if call.graph != VISION]
    return ServingCosts(
        encode_ms=ms([call for call in cold if call.graph == VISION]),
        prefill_ms=ms(decoder),
        question_ms=ms(known),
        calls=len(decoder),
        step_ms=tuple(ms(step, answers) for answers in range(1, lanes + 1)),
    )


def measured_costs(engine: Engine, prompt: PromptLengths, seed: int = 0) -> ServingCosts:
    """Measure the costs of an idle engine: medians of new images, known ones, and steps.

    Its answers have their full length from here on.
    """
    engine.eos = frozenset()
    chance, lanes = np.random.default_rng(seed), engine.lanes
    side = engine.bundle.manifest.config.vision.image_size
    question = typical_question(prompt)

    def image() -> np.ndarray:
        return chance.integers(0, 256, (side, side, 3), dtype=np.uint8)

    prepared, new, known, encodes, calls = [], [], [], [], 0
    for at in range(1 + QUESTIONS):
        picture = image()
        first = engine.submit(picture, question, max_tokens=1).wait().timings
        again = engine.submit(picture, f"{question}{at}", max_tokens=1).wait().timings
        if not at:  # the first loads what is loaded late
            continue
        encode = sum(ms for name, ms in first.graphs_ms.items() if _encodes(name))
        encodes.append(encode)
        prepared.append(first.preprocess_ms)
        new.append(first.first_token_ms - first.preprocess_ms - encode)
        known.append(again.first_token_ms - again.preprocess_ms)
        calls = sum(not _encodes(name) for name in first.graphs_ms)
    tokens = max(STEP_TOKENS, prompt.tokens)
    steps = {
        count: step_ms(engine, [(image(), question) for _ in range(count)], tokens)
        for count in lane_counts(lanes)
    }
    whole = np.interp(range(1, lanes + 1), list(steps), list(steps.values()))
    return ServingCosts(
        float(np.median(encodes)),
        float(np.median(new)),
        float(np.median(known)),
        max(1, calls),
        tuple(float(ms) for ms in whole),
        float(np.median(prepared)),
    )


def typical_question(prompt: PromptLengths) -> str:
    """Return a question of about as many tokens as ``prompt`` says."""
    return "word " * max(1, prompt.text // 2)


def _encodes(graph: str) -> bool:
    return not graph.startswith(("stage", "select", "probe", "serve"))


def lane_counts(lanes: int) -> list[int]:
    """Return the numbers of answers whose steps are timed; those between are interpolated."""
    return [1 << power for power in range(lanes.bit_length()) if 1 << power < lanes] + [lanes]


def step_ms(engine: Engine, asked: list[tuple[np.ndarray, str]], tokens: int) -> float:
    """Return the milliseconds of a step of answers to some questions, all of them under way.

    The engine's answers have ``tokens`` tokens: it knows no end.
    """
    tickets = [engine.submit(*own, max_tokens=tokens) for own in asked]

    def over() -> bool:
        return any(ticket.over.is_set() for ticket in tickets)

    def seen() -> tuple[float, int, int]:
        time.sleep(0.001)
        return time.perf_counter(), engine.steps, engine.tokens

    _, steps, written = seen()
    while not over():  # until a step is one of all answers
        now = seen()
        if now[1] > steps and now[2] - written == len(asked) * (now[1] - steps):
            break
        _, steps, written = now
    first = last = seen()
    while not over():
        last = seen()
    elapsed, done = last[0] - first[0], last[1] - first[1]
    for ticket in tickets:
        ticket.wait()
    return elapsed * 1e3 / max(1, done)
