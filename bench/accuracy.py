"""Accuracy of the demo model under several plans, on questions about scenes it never saw.

    python -m visistage.bench.accuracy [--samples 2000]

Every plan answers the same questions; agreement counts equal answers with the dense plan.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import repeat
from pathlib import Path

import click

from ..calib.evaluate import Report, evaluate
from ..compile.build import build
from ..console.evaluation import chosen_samples
from ..demo.heldout import blind_accuracy
from ..graphs.cost import Geometry, dense_cost, plan_cost, reduction_percent
from ..runtime import load
from .record import save

PLANS = (
    "dense",
    "visipruner",
    *(f"visipruner:keep={keep}" for keep in (4, 1)),
    *(f"visipruner:t={t},keep={keep}" for t in (1, 2, 3) for keep in (16, 1)),
    "visipruner:shallow=2",
    "fastv",
    "pyramiddrop",
    "exit-only",
)


@click.command()
@click.option("--samples", default=2000, show_default=True)
@click.option("--plan", "plans", multiple=True, help="Instead of the usual ones.")
@click.option("--out", default="engines", show_default=True, help="Folder of the bundles.")
def main(samples: int, plans: tuple[str, ...], out: str) -> None:
    """Build, ask (one plan a core), compare, record."""
    blind = blind_accuracy(samples)
    rows = [{"plan": "without the picture", "accuracy": blind.pop("all"), "by_type": blind}]
    plans = plans or PLANS
    bundles = [build("demo", plan=plan, out=Path(out)) for plan in plans]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        asked = list(pool.map(_ask, [bundle.path for bundle in bundles], repeat(samples)))
    dense = asked[0][1]
    for plan, bundle, (report, answers) in zip(plans, bundles, asked, strict=True):
        rows.append(_row(bundle, report, plan) | {"agreement": _agreement(answers, dense)})
    save("accuracy-demo", f"python -m visistage.bench.accuracy --samples {samples}", rows)


def _ask(path: Path, samples: int) -> tuple[Report, tuple[str, ...]]:
    """The report of one bundle, and its answer to every question."""
    questions = chosen_samples("demo", None, samples)
    with load(path, threads=1) as session:
        report = evaluate(session, questions)
    wrong = {miss.name: miss.given for miss in report.misses}
    print(path.name, report.overall.accuracy, flush=True)
    return report, tuple(wrong.get(sample.name, sample.answer) for sample in questions)


def _row(bundle, report, plan: str) -> dict:
    facts = bundle.manifest
    geometry = Geometry.of(facts.config.text)
    prefix = len(facts.prefix.ids) if facts.prefix else 0
    sizes = {"prefix": prefix, "text": 12}
    cost = plan_cost(facts.plan, geometry, **sizes, accounting="graphs")
    full = dense_cost(facts.plan, geometry, **sizes)
    return {
        "plan": plan,
        "shallow": sum(mode != "dense" for mode in facts.plan.stages[0].modes),
        "trigger": facts.plan.trigger,
        "exit": facts.plan.exit,
        "keep": facts.plan.keep,
        "accuracy": report.overall.accuracy,
        "by_type": {name: asdict(tally) for name, tally in report.by_type.items()},
        "visual_macs_saved_percent": reduction_percent(cost.visual_macs, full.visual_macs),
        "visual_kv_saved_percent": reduction_percent(cost.visual_kv_bytes, full.visual_kv_bytes),
    }


def _agreement(answers: tuple[str, ...], dense: tuple[str, ...]) -> float:
    return sum(a == b for a, b in zip(answers, dense, strict=True)) / len(dense)


if __name__ == "__main__":
    main()
