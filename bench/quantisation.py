"""What rounding costs and saves on the demo model: every scheme, observer and plan, in one run.

    python -m visistage.bench.quantisation [--samples 2000] [--rounds 60]

Each bundle answers the same held-out questions; agreement counts answers equal to those of the
dense FP32 bundle. Times are taken afterwards, all bundles taking turns on questions about pictures
that none has seen, one thread, tower and preprocessing included; the first decile is what an
undisturbed machine takes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

from ..calib.calibrate import calibrate
from ..calib.evaluate import EvaluationReport, evaluate
from ..calib.plan_search.goal import SelectionGoal
from ..calib.plan_search.measure_plans import Origin
from ..calib.run.collect_ranges import collect
from ..calib.sample_prompts import prepare
from ..calib.samples import calibration_samples, evaluation_samples
from ..compile.build import make_bundle
from ..compile.checkpoint.checkpoint import open_checkpoint
from ..compile.export.texts import text_facts
from ..compile.quantize.calibration_file import Calibration
from ..graphs.progress import Progress
from ..graphs.quantization import OBSERVERS
from ..runtime import load
from ..runtime.image.preprocessing import Preprocessing
from .record import save

NAME = "quantisation-demo"

INT8 = tuple(
    f"int8:observer={observer}{smooth}" for observer in OBSERVERS for smooth in ("", ",smooth=no")
)
MIXED = ("int8:vision=float", "int8:keep=5%", "int8:stage{last}=w4")
PRECISIONS = ("fp32", *INT8, *MIXED, "w8", "w4")


@dataclass(frozen=True)
class Case:
    """One bundle: what its ranges rest on, its plan (for the table), its precision."""

    ranges: str
    plan: str
    precision: str
    folder: Path


class StepNames(Progress):
    """A progress callback that prints which step begins."""

    def start(self, step: str, total: int | None = None) -> None:
        """Print the step."""
        print(step, flush=True)


@click.command()
@click.option("--samples", default=2000, show_default=True)
@click.option("--rounds", default=60, show_default=True)
@click.option("--lose", default=2.0, show_default=True, help="Per cent that the plan may lose.")
@click.option("--calibrate-on", "count", default=300, show_default=True)
@click.option("--work", default=".cache/bench/quantisation", type=click.Path(path_type=Path))
@click.option("--dry", is_flag=True, help="Print the rows and leave the record alone.")
def main(samples: int, rounds: int, lose: float, count: int, work: Path, dry: bool) -> None:
    """Calibrate, build, ask (one bundle a core), time in turns, record."""
    cases = list(_cases(work, count, lose))
    paths = [_built(case, work) for case in cases]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        asked = list(pool.map(_ask, paths, repeat(samples)))
    times = _times(paths, rounds)
    dense = asked[0][1]
    rows = [
        _row(case, path, report, answers, dense, *timed)
        for case, path, (report, answers), timed in zip(cases, paths, asked, times, strict=True)
    ]
    if dry:
        for row in rows:
            click.echo({key: value for key, value in row.items() if key != "by_type"})
        return
    command = f"python -m visistage.bench.quantisation --samples {samples} --rounds {rounds}"
    save(NAME, command, rows)


def _cases(work: Path, count: int, lose: float) -> list[Case]:
    """The dense FP32 bundle first: everything is compared with it."""
    samples, files = calibration_samples("demo", None, count)
    goal = SelectionGoal(lose=lose / 100)
    cases = []
    for name, wanted in (("dense", "dense"), ("calibrated", goal)):
        folder, made = calibrate(
            Origin("demo"), samples, wanted, files=files, out=work / name, progress=StepNames()
        )
        last = len(made.plan.stages) - 1
        cases += [
            Case("its own rows", made.plan.name, precision.format(last=last), folder)
            for precision in PRECISIONS
            if last or "{last}" not in precision
        ]
    others = {
        "the dense model's rows": {"rows": "dense"},
        "its own rows and the prefix": {"include_prefix": True},
    }
    for name, options in others.items():
        again = _again(made, samples, options)
        folder = work / name.replace(" ", "-").replace("'", "")
        again.save(folder)
        cases += [
            Case(name, made.plan.name, f"int8:observer={o}", folder) for o in ("minmax", "mse")
        ]
    return cases


def _again(made: Calibration, samples: Sequence, options: dict[str, Any]) -> Calibration:
    """The same calibration on other rows."""
    checkpoint = open_checkpoint("demo")
    texts = text_facts(checkpoint)
    preprocessing = Preprocessing.from_dict(texts.preprocessing)
    prompts, _ = prepare(samples, texts.encoder, preprocessing)
    found = collect(checkpoint, prompts, made.plan, texts.prefix_ids, **options)
    return replace(made, groups=found.groups, cache=found.cache, **options)


def _built(case: Case, work: Path) -> Path:
    out = work / "engines" / case.folder.parent.name / case.folder.name
    return make_bundle("demo", precision=case.precision, calibration=case.folder, out=out).path


def _ask(path: Path, samples: int) -> tuple[EvaluationReport, list[str]]:
    """The report of one bundle, and its answer to every question."""
    answers: list[str] = []
    with load(path, threads=1) as session:
        questions = evaluation_samples("demo", None, samples)
        report = evaluate(session, questions, heard=lambda answer: answers.append(answer.text))
    print(path.parent.parent.name, path.name, report.overall.share, flush=True)
    return report, answers


def _times(paths: Sequence[Path], rounds: int) -> list[tuple[list[float], list[float]]]:
    """Milliseconds to the first token, and per token after it, of every round; by bundle."""
    samples = evaluation_samples("demo", None, rounds + 1)
    first: list[list[float]] = [[] for _ in paths]
    later: list[list[float]] = [[] for _ in paths]
    with ExitStack() as stack:
        sessions = [stack.enter_context(load(path, threads=1)) for path in paths]
        for sample in samples:
            for index, session in enumerate(sessions):
                answer = session.infer(sample.image, sample.prompt, max_tokens=8)
                first[index].append(answer.timings.first_token_ms)
                if answer.timings.per_token_ms is not None:
                    later[index].append(answer.timings.per_token_ms)
    return [(one[1:], other[1:]) for one, other in zip(first, later, strict=True)]


def _row(
    case: Case,
    path: Path,
    report: EvaluationReport,
    answers: Sequence[str],
    dense: Sequence[str],
    first: Sequence[float],
    later: Sequence[float],
) -> dict[str, Any]:
    equal = sum(one == other for one, other in zip(answers, dense, strict=True))
    return {
        "plan": case.plan,
        "precision": case.precision,
        "ranges": case.ranges,
        "accuracy": report.overall.share,
        "by_type": {name: asdict(tally) for name, tally in report.by_type.items()},
        "agreement": equal / len(answers),
        "weight_bytes": _weight_bytes(path),
        "first_token_p10_ms": quantiles(first, n=10)[0],
        "first_token_median_ms": median(first),
        "per_token_p10_ms": quantiles(later, n=10)[0],
        "per_token_median_ms": median(later),
    }


def _weight_bytes(path: Path) -> int:
    from ..graphs.bundle import Bundle

    return Bundle.open(path).manifest.weight_bytes


if __name__ == "__main__":
    main()
