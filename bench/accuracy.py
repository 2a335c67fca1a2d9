"""Accuracy of the demo model under several plans, on questions about scenes it never saw.

    python -m visistage.bench.accuracy [--samples 2000]

Every plan answers the same questions; agreement counts equal answers with the dense plan. Adaptive
plans are compared with the exact one, too: same answers, same layers, same tokens kept.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

import click

from ..calib.evaluate import EvaluationReport, evaluate
from ..calib.samples import evaluation_samples
from ..compile.build import make_bundle
from ..demo.heldout import blind_accuracy
from ..graphs.bundle import Bundle
from ..graphs.plan.cost import reduction_percent
from ..runtime import Answer, load
from .record import save

EXACT, ADAPTIVE = "visipruner-code", "visipruner-adaptive"

DEMO_THRESHOLDS = "cosine=0.95,exit_cosine=0.95"
"""The published ones were chosen for 32 layers; in the demo's eight each token weighs more."""

PLANS = (
    "dense",
    "visipruner",
    *(f"visipruner:keep={keep}" for keep in (4, 1)),
    *(f"visipruner:t={t},keep={keep}" for t in (1, 2, 3) for keep in (16, 1)),
    "visipruner:shallow=2",
    EXACT,
    "visipruner-paper",
    ADAPTIVE,
    f"{ADAPTIVE}:boundaries=3-5",
    f"{EXACT}:{DEMO_THRESHOLDS}",
    f"{ADAPTIVE}:{DEMO_THRESHOLDS}",
    f"{ADAPTIVE}:boundaries=3-5,{DEMO_THRESHOLDS}",
    "fastv",
    "pyramiddrop",
    "exit-only",
)


@click.command()
@click.option("--samples", default=2000, show_default=True)
@click.option("--plan", "plans", multiple=True, help="Besides dense, instead of the usual ones.")
@click.option("--out", default="engines", show_default=True, help="Folder of the bundles.")
@click.option("--dry", is_flag=True, help="Print the rows and leave the record alone.")
def main(samples: int, plans: tuple[str, ...], out: str, dry: bool) -> None:
    """Build, ask (one plan a core), compare, record."""
    blind = blind_accuracy(samples)
    rows: list[dict[str, Any]] = [
        {"plan": "without the picture", "accuracy": blind.pop("all"), "by_type": blind}
    ]
    plans = tuple(dict.fromkeys(("dense", *plans))) if plans else PLANS
    bundles = [make_bundle("demo", plan=plan, out=Path(out)) for plan in plans]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        asked = list(pool.map(_ask, [bundle.path for bundle in bundles], repeat(samples)))
    answers = {plan: heard for plan, (_, heard) in zip(plans, asked, strict=True)}
    for plan, bundle, (report, heard) in zip(plans, bundles, asked, strict=True):
        row = _row(bundle, report, heard) | {"plan": plan}
        row["agreement"] = _share(a.text == b.text for a, b in _pairs(heard, answers["dense"]))
        if bundle.manifest.plan.kind == "adaptive" and exact_of(plan) in answers:
            row["exact"] = _exactness(heard, answers[exact_of(plan)])
        rows.append(row)
    if dry:
        for row in rows:
            click.echo({key: value for key, value in row.items() if key != "by_type"})
        return
    save("accuracy-demo", f"python -m visistage.bench.accuracy --samples {samples}", rows)


def exact_of(plan: str) -> str:
    """The exact plan with the thresholds of an adaptive one."""
    options = plan.partition(":")[2].split(",")
    shared = [one for one in options if one and not one.startswith(("boundaries", "buckets"))]
    return ":".join([EXACT, *([",".join(shared)] if shared else [])])


def _ask(path: Path, samples: int) -> tuple[EvaluationReport, list[Answer]]:
    """The report of one bundle, and its answer to every question."""
    answers: list[Answer] = []
    with load(path, threads=1) as session:
        report = evaluate(session, evaluation_samples("demo", None, samples), heard=answers.append)
    print(path.name, report.overall.share, flush=True)
    return report, answers


def _row(bundle: Bundle, report: EvaluationReport, answers: list[Answer]) -> dict[str, Any]:
    """One plan in numbers; t, K, e, MACs and bytes are means over the questions."""
    plan, text = bundle.manifest.plan, bundle.manifest.config.text
    facts = [answer.plan for answer in answers]
    kept = [len(fact.kept) for fact in facts if fact.kept is not None]
    rows = _mean(sum(fact.visual_tokens_per_layer) for fact in facts)
    dense_rows = _mean(fact.visual_tokens * text.layers for fact in facts)
    flops = _mean(fact.visual_flops for fact in facts)
    row_bytes = 2 * text.kv_heads * text.head_dim * bundle.manifest.cache_element_bytes
    return {
        "kind": plan.kind,
        "shallow": len(plan.stages[0].gated_layers),
        "trigger": _mean(fact.trigger for fact in facts),
        "exit": _mean(fact.exit for fact in facts),
        "keep": _mean(kept) if kept else None,
        "accuracy": report.overall.share,
        "by_type": {name: asdict(tally) for name, tally in report.by_type.items()},
        "visual_flops": flops,
        "visual_macs_saved_percent": reduction_percent(
            flops, _mean(fact.dense_visual_flops for fact in facts)
        ),
        "visual_kv_bytes": rows * row_bytes,
        "visual_kv_saved_percent": reduction_percent(rows, dense_rows),
    }


def _exactness(answers: list[Answer], exact: list[Answer]) -> dict[str, float]:
    """Shares of the questions on which a plan did as the released code does."""
    pairs = _pairs(answers, exact)
    return {
        "answer": _share(a.text == b.text for a, b in pairs),
        "trigger": _share(a.plan.trigger == b.plan.trigger for a, b in pairs),
        "kept": _share(a.plan.kept == b.plan.kept for a, b in pairs),
        "exit": _share(a.plan.exit == b.plan.exit for a, b in pairs),
        "undeviating": _share(not a.plan.deviations for a, _ in pairs),
    }


def _pairs(one: list[Answer], other: list[Answer]) -> list[tuple[Answer, Answer]]:
    return list(zip(one, other, strict=True))


def _share(values) -> float:
    return _mean(map(float, values))


def _mean(values) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


if __name__ == "__main__":
    main()
