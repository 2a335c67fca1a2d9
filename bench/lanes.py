"""Tokens a second of an engine, by the answers that it writes at once.

    python -m visistage.bench.lanes [--model llava-45m] [--rounds 7]

A step appends one token to every answer under way, in one call that reads the weights once; each
answer reads its own caches. Rounds time the steps of 1, 2, 4, ... answers one after the other, so
that whatever else the machine does affects all alike. Beside each figure is its lower bound
(``lower_bound.py``), by rates measured before and after, in the same run.
"""

from __future__ import annotations

from contextlib import ExitStack
from statistics import median

import click
import numpy as np

from ..graphs.bundle import Bundle
from ..graphs.plan.call_cost import Work
from ..graphs.plan.cost import plan_loads
from ..runtime.engine import Engine
from ..tools.estimate.capacity import lane_counts, step_ms, typical_question
from ..tools.estimate.predict import PromptLengths
from .lower_bound import Rates, measure_rates, milliseconds, step_work
from .peer_models import OURS, PeerCheckpoint, bundle
from .record import dry_option, save


def lower_bound_ms(
    engine: Engine, prompt: PromptLengths, answers: int, rates: Rates, precision: str
) -> float:
    """Return the least milliseconds of a step of so many answers: weights are read once."""
    manifest = engine.bundle.manifest
    visual = [load.visual_tokens for load in plan_loads(manifest.plan)]
    one = step_work(manifest.config.text, visual, prompt.text + prompt.tokens // 2)
    work = Work(
        one.flops * answers,
        one.weight_bytes,
        one.cache_bytes * answers,
        one.attention_flops * answers,
    )
    return milliseconds(work, rates, precision)


@click.command()
@click.option("--model", default="llava-45m", show_default=True, help="Or demo, llava-7b, ...")
@click.option("--plan", default="scope:keep=64", show_default=True)
@click.option(
    "--precision", "precisions", multiple=True, default=("fp32", "int8"), show_default=True
)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--lanes", type=click.IntRange(2), default=8, show_default=True)
@click.option("--tokens", type=click.IntRange(16), default=64, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--minutes", default=20.0, show_default=True, help="That each step of a setup takes.")
@dry_option
def main(model, plan, precisions, rounds, lanes, tokens, threads, minutes, dry) -> None:
    """Time steps of one answer, two, four, ... and record tokens a second."""
    subject = PeerCheckpoint.named(model, minutes)
    prompt = PromptLengths(tokens=tokens)
    question, side = typical_question(prompt), subject.side
    chance = np.random.default_rng(0)

    def asked(count: int) -> list[tuple[np.ndarray, str]]:
        images = chance.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        return [(image, question) for image in images]

    counts = lane_counts(lanes)
    rates = measure_rates(threads)
    with ExitStack() as stack:
        engines = {}
        for precision in precisions:
            path = bundle(plan, precision, "cpu", subject)
            engine = Engine(Bundle.open(path), lanes=lanes, threads=threads)
            engines[precision] = stack.enter_context(engine)
            engine.eos = frozenset()
        taken: dict[tuple[str, int], list[float]] = {}
        for number in range(rounds + 1):  # the first warms up
            for precision, engine in engines.items():
                for count in counts:
                    ms = step_ms(engine, asked(count), tokens)
                    if number:
                        taken.setdefault((precision, count), []).append(ms)
            click.echo(f"round {number} of {rounds}", err=True)
        rates = rates.best(measure_rates(threads))
        rows = []
        for (precision, count), steps in taken.items():
            alone = taken[precision, 1]
            speedups = [count * one / own for one, own in zip(alone, steps, strict=True)]
            bound = lower_bound_ms(engines[precision], prompt, count, rates, precision)
            rows.append(
                {
                    "precision": OURS[precision],
                    "answers": count,
                    "step_ms": median(steps),
                    "tokens_a_second": 1e3 * count / median(steps),
                    "speedup": median(speedups),
                    "speedups": speedups,
                    "bound_ms": bound,
                    "bound_share": bound / median(steps),
                }
            )
    machine = {"key": "machine", "model": model, "plan": plan, "rounds": rounds}
    save(f"lanes-{model}", [machine | {"rates": rates.to_dict()}, *rows], dry=dry)


if __name__ == "__main__":
    main()
