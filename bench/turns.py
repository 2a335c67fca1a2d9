"""The same held-out questions to bundles of a demo: for their answers, or in turns for time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

from ..calib.evaluate import EvaluationReport, evaluate
from ..calib.samples import Sample, evaluation_samples
from ..demo.easy_vqa import easy_vqa_samples
from ..runtime import Answer, load

Asked = tuple[EvaluationReport, list[Answer]]


EASY_VQA = "easy-vqa"
SERIES = {"demo": "demo", "demo-576": "demo-576", EASY_VQA: "demo"}
"""Series of questions, and the model that each is put to."""


def series_samples(series: str, count: int) -> list[Sample]:
    """Return at most ``count`` questions of one of ``SERIES``, none of them trained on."""
    if series != EASY_VQA:
        return evaluation_samples(series, None, count)
    return [
        Sample(f"easy-VQA {number}", made.image, made.question, made.answer, made.kind)
        for number, made in enumerate(easy_vqa_samples(count))
    ]


def ask_all(paths: Sequence[Path], samples: int, series: str = "demo") -> list[Asked]:
    """Ask every bundle ``samples`` questions, a bundle a core; one thread each."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_ask, paths, repeat(samples), repeat(series)))


def _ask(path: Path, samples: int, series: str) -> Asked:
    answers: list[Answer] = []
    with load(path, threads=1) as session:
        report = evaluate(session, series_samples(series, samples), heard=answers.append)
    print(path, report.overall.share, flush=True)
    return report, answers


def accuracy_facts(asked: Asked, dense: Asked) -> dict[str, Any]:
    """Return the accuracy, also by type, and the share of answers equal to the dense bundle's."""
    report, answers = asked
    pairs = zip(answers, dense[1], strict=True)
    return {
        "accuracy": report.overall.share,
        "by_type": {name: asdict(tally) for name, tally in report.by_type.items()},
        "agreement": mean(a.text == b.text for a, b in pairs),
    }


def take_turns(paths: Sequence[Path], rounds: int, tokens: int) -> list[list[Answer]]:
    """Return the answers of each bundle in ``rounds`` rounds, after one that allocates.

    Each round asks every bundle about the same new image, so that whatever else the machine does
    affects all alike; one thread, vision encoder and preprocessing included.
    """
    with ExitStack() as stack:
        sessions = [stack.enter_context(load(path, threads=1)) for path in paths]
        answers = [
            [session.infer(sample.image, sample.prompt, max_tokens=tokens) for session in sessions]
            for sample in evaluation_samples("demo", None, rounds + 1)
        ]
    return [list(own) for own in zip(*answers[1:], strict=True)]


def mean(values: Iterable[float]) -> float:
    """Return the mean of at least one value, truth values too."""
    listed = list(values)
    return sum(listed) / len(listed)
