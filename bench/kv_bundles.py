"""Bundles of the demo with an INT8 cache beside the same bundles with a float one.

    python -m visistage.bench.kv_bundles [--samples 2000] [--rounds 60]

What bench/kv_cache.py measured in torch, measured on what is built: held-out questions answered by
ONNX Runtime, bytes that one question's cache and one kept picture take, and decode steps in turns
with the float cache. Both bundles of a pair rest on one calibration, made on other questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

from ..calib.calibrate import calibrate
from ..calib.evaluate import evaluate
from ..calib.plan_search.measure_plans import Origin
from ..calib.samples import calibration_samples, evaluation_samples
from ..compile.build import make_bundle
from ..graphs.bundle import Bundle
from ..runtime import Session, load
from .quantisation import Untold
from .record import save

NAME = "kv-bundles-demo"
PLANS = ("dense", "visipruner")
PAIRS = (("fp32", "fp32:cache=int8"), ("int8", "int8:cache=int8"))
STEPS = 64
"""Tokens of a timed answer, however the model would like to end: the demo's own are short."""


@dataclass(frozen=True)
class AskedBundle:
    """What a bundle said to the held-out questions, and what they took."""

    accuracy: float
    answers: tuple[str, ...]
    question_bytes: float
    picture_bytes: float


@click.command()
@click.option("--samples", default=2000, show_default=True)
@click.option("--rounds", default=60, show_default=True)
@click.option("--calibrate-on", "count", default=300, show_default=True)
@click.option("--work", default=".cache/bench/kv-bundles", type=click.Path(path_type=Path))
@click.option("--dry", is_flag=True, help="Print the rows and leave the record alone.")
def main(samples: int, rounds: int, count: int, work: Path, dry: bool) -> None:
    """Calibrate both plans, build the pairs, ask, time in turns, record."""
    rows = []
    for plan in PLANS:
        given, files = calibration_samples("demo", None, count)
        origin, folder = Origin("demo"), work / plan
        known, _ = calibrate(origin, given, plan, files=files, out=folder, progress=Untold())
        for pair in PAIRS:
            options = {"plan": plan, "calibration": known, "out": work / "engines"}
            made = [
                make_bundle("demo", precision=one, **(options if one != "fp32" else _bare(options)))
                for one in pair
            ]
            rows += _pair(plan, made, samples, rounds)
    if dry:
        for row in rows:
            click.echo(row)
        return
    command = f"python -m visistage.bench.kv_bundles --samples {samples} --rounds {rounds}"
    command += f" --calibrate-on {count}"
    save(NAME, command, rows)


def _bare(options: dict[str, Any]) -> dict[str, Any]:
    """A float precision with a plan takes no calibration."""
    return {name: value for name, value in options.items() if name != "calibration"}


def _pair(plan: str, bundles: Sequence[Bundle], samples: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of a bundle with a float cache and of the one with an INT8 cache."""
    asked = [_ask(bundle, samples) for bundle in bundles]
    steps = _steps(bundles, rounds)
    rows = []
    for bundle, one, times in zip(bundles, asked, steps, strict=True):
        equal = sum(a == b for a, b in zip(one.answers, asked[0].answers, strict=True))
        rows.append(
            {
                "plan": plan,
                "precision": bundle.manifest.precision,
                "cache": bundle.manifest.cache_dtype,
                "questions": samples,
                "accuracy": one.accuracy,
                "agreement": equal / samples,
                "question_bytes": one.question_bytes,
                "picture_bytes": one.picture_bytes,
                "per_token_p10_ms": quantiles(times, n=10)[0],
                "per_token_median_ms": median(times),
            }
        )
        click.echo(rows[-1], err=True)
    return rows


def _ask(bundle: Bundle, samples: int) -> AskedBundle:
    """Every held-out question; bytes are means over them."""
    answers: list[str] = []
    question: list[int] = []
    picture: list[int] = []
    with load(bundle.path, threads=1) as session:

        def heard(answer: Any) -> None:
            answers.append(answer.text)
            question.append(_question_bytes(session))
            cached = session.context.cached.get(session.context.current_key or "")
            picture.append(0 if cached is None else sum(c.nbytes for c in cached.caches.values()))

        report = evaluate(session, evaluation_samples("demo", None, samples), heard=heard)
    return AskedBundle(
        report.overall.accuracy,
        tuple(answers),
        sum(question) / len(question),
        sum(picture) / len(picture),
    )


def _question_bytes(session: Session) -> int:
    """Of the slots in use after an answer, in every stage."""
    manifest, chain = session.bundle.manifest, session.context.chain
    text = manifest.config.text
    row = 2 * text.kv_heads * text.head_dim * manifest.cache_element_bytes
    stages = zip(chain.plan.stages, chain.slots, strict=True)
    return sum(slots.used * stage.depth * row for stage, slots in stages)


def _steps(bundles: Sequence[Bundle], rounds: int) -> list[list[float]]:
    """Milliseconds a decode step, of every round; the bundles take turns, one thread."""
    times: list[list[float]] = [[] for _ in bundles]
    with ExitStack() as stack:
        sessions = [stack.enter_context(load(one.path, threads=1)) for one in bundles]
        for session in sessions:
            session.eos = frozenset()
        for number, sample in enumerate(evaluation_samples("demo", None, rounds + 1)):
            for session, found in zip(sessions, times, strict=True):
                answer = session.infer(sample.image, sample.prompt, max_tokens=STEPS)
                if number:  # the first warms up
                    found.append(answer.timings.per_token_ms)
    return times


if __name__ == "__main__":
    main()
