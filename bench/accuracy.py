"""Accuracy of the demo model under several plans, on questions about scenes it never saw.

    python -m visistage.bench.accuracy [--samples 2000]

Every plan answers the same questions; agreement counts equal answers with the dense plan.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ..calib.evaluate import evaluate
from ..compile.build import build
from ..console.evaluation import chosen_samples
from ..demo.heldout import blind_accuracy
from ..graphs.cost import Geometry, dense_cost, plan_cost, reduction_percent
from ..runtime import load
from .record import save

PLANS = (
    "dense",
    "visipruner",
    *(f"visipruner:keep={keep}" for keep in (64, 4, 1)),
    *(f"visipruner:t={t}" for t in (1, 2, 3)),
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
    """Build, ask, compare, record."""
    questions = chosen_samples("demo", None, samples)
    blind = blind_accuracy(samples)
    rows = [{"plan": "without the picture", "accuracy": blind.pop("all"), "by_type": blind}]
    dense: tuple[str, ...] | None = None
    for plan in plans or PLANS:
        bundle = build("demo", plan=plan, out=Path(out))
        with load(bundle.path) as session:
            report = evaluate(session, questions)
        wrong = {miss.name: miss.given for miss in report.misses}
        answers = tuple(wrong.get(sample.name, sample.answer) for sample in questions)
        dense = dense or answers
        rows.append(_row(bundle, report, plan) | {"agreement": _agreement(answers, dense)})
        print(rows[-1], flush=True)
    save("accuracy-demo", f"python -m visistage.bench.accuracy --samples {samples}", rows)


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
        "first_token_ms": report.first_token_ms,
    }


def _agreement(answers: tuple[str, ...], dense: tuple[str, ...]) -> float:
    return sum(a == b for a, b in zip(answers, dense, strict=True)) / len(dense)


if __name__ == "__main__":
    main()
