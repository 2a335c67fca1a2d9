"""The simulation behind ``visistage estimate --rate``, held against an engine under load.

    python -m visistage.bench.capacity [--model llava-45m] [--rounds 5]

A round measures the costs of an engine's calls as ``estimate`` does, then asks the same engine
about new images: at random times (Poisson), at shares of what it can answer, and by callers of
whom each asks again once he is answered. The simulation has those costs and the same times. In the
record: percentiles of the first token, measured and simulated, and their ratio, each the median of
the rounds; a machine that slows down within one round spoils only that one.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import count
from statistics import median

import click
import numpy as np

from ..graphs.bundle import Bundle
from ..runtime.engine import GAP_MS, Engine
from ..tools.estimate.capacity import measured_costs, typical_question
from ..tools.estimate.predict import PromptLengths
from ..tools.estimate.queueing import (
    ServingCosts,
    Traffic,
    arrivals,
    percentile,
    simulate_callers,
    simulated_firsts,
)
from .peer_models import PeerCheckpoint, bundle
from .record import dry_option, save

Pair = tuple[list[float], list[float]]
"""Milliseconds to the first tokens of a round, measured and simulated."""

Ask = Callable[[int], float]
"""Asks a question, by its number; returns the milliseconds to its first token."""


def asking(engine: Engine, prompt: PromptLengths, questions: int, seed: int) -> Ask:
    """Return what asks one of so many questions, each about an image of its own."""
    chance = np.random.default_rng(seed)
    side = engine.bundle.manifest.config.vision.image_size
    images = chance.integers(0, 256, (questions, side, side, 3), dtype=np.uint8)
    text = typical_question(prompt)

    def ask(number: int) -> float:
        answer = engine.submit(images[number], text, max_tokens=prompt.tokens).wait()
        return answer.timings.first_token_ms

    return ask


def at_times(ask: Ask, times_ms: list[float]) -> list[float]:
    """Ask at times from now on; return the milliseconds to each first token."""
    began = time.perf_counter()

    def later(number: int) -> float:
        late = (time.perf_counter() - began) * 1e3 - times_ms[number]
        return ask(number) + late

    with ThreadPoolExecutor(len(times_ms)) as threads:
        coming = []
        for number, at in enumerate(times_ms):
            time.sleep(max(0.0, began + at / 1e3 - time.perf_counter()))
            coming.append(threads.submit(later, number))
        return [own.result() for own in coming]


def by_callers(ask: Ask, callers: int, questions: int) -> list[float]:
    """Have callers ask, each again once he is answered; return the milliseconds."""
    found, turns, lock = [0.0] * questions, count(), threading.Lock()

    def caller() -> None:
        while True:
            with lock:
                number = next(turns)
            if number >= questions:
                return
            found[number] = ask(number)

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def answers_a_second(costs: ServingCosts, tokens: int) -> float:
    """Return what one engine answers with all its lanes at work, about new images."""
    each = costs.encode_ms + costs.prefill_ms + (tokens - 1) * costs.step_ms[-1] / costs.lanes
    return 1e3 / each


def compared(rounds: list[Pair]) -> dict:
    """Return percentiles of the first tokens of rounds, and ratios: medians, and each round's."""
    facts = {}
    for share in (50, 95):
        pairs = [[percentile(firsts, share) for firsts in pair] for pair in rounds]
        ratios = [simulated / measured for measured, simulated in pairs]
        measured, simulated = (median(side) for side in zip(*pairs, strict=True))
        facts[f"p{share}_ms"] = {"measured": measured, "simulated": simulated}
        facts[f"p{share}_ms"] |= {"ratio": median(ratios), "ratios": ratios}
    return facts


@click.command()
@click.option("--model", default="llava-45m", show_default=True, help="Or demo, llava-7b, ...")
@click.option("--plan", default="scope:keep=64", show_default=True)
@click.option("--precision", default="int8", show_default=True, help="Or fp32.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--questions", type=click.IntRange(20), default=100, show_default=True)
@click.option("--busy", type=float, multiple=True, default=(0.5, 0.8), show_default=True)
@click.option("--callers", type=click.IntRange(1), default=8, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--minutes", default=20.0, show_default=True, help="That each step of a setup takes.")
@dry_option
def main(
    model, plan, precision, rounds, questions, busy, callers, tokens, threads, minutes, dry
) -> None:
    """Measure costs, load the engine, simulate the same, record."""
    path = bundle(plan, precision, "cpu", PeerCheckpoint.named(model, minutes))
    prompt = PromptLengths(tokens=tokens)
    firsts: dict[str, list[Pair]] = defaultdict(list)
    costs = []
    with Engine(Bundle.open(path), lanes=callers, threads=threads) as engine:
        for number in range(rounds):
            costs.append(own := measured_costs(engine, prompt, number))
            for share in busy:
                traffic = Traffic(share * answers_a_second(own, tokens), tokens=tokens)
                times = [at for at, _ in arrivals(traffic, questions, number)]
                ask = asking(engine, prompt, questions, 1000 + number)
                simulated = simulated_firsts(own, traffic, questions, gap_ms=GAP_MS, seed=number)
                firsts[f"busy_{share:g}"].append((at_times(ask, times), simulated))
            ask = asking(engine, prompt, questions, 2000 + number)
            simulated = simulate_callers(own, callers, questions, tokens, gap_ms=GAP_MS)
            firsts["callers"].append((by_callers(ask, callers, questions), simulated))
            click.echo(f"round {number + 1} of {rounds}", err=True)
    rows: list[dict] = [{"key": "machine", "model": model, "plan": plan, "precision": precision}]
    rows[0] |= {"rounds": rounds, "questions": questions, "callers": callers, "tokens": tokens}
    rows += [{"key": load} | compared(pairs) for load, pairs in firsts.items()]
    rows.append({"key": "costs", "rounds": [asdict(own) for own in costs]})
    save(f"capacity-{model}", rows, dry=dry)


if __name__ == "__main__":
    main()
