"""The same held-out questions to bundles of the demo: for their answers, or in turns for time."""

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
from ..calib.samples import evaluation_samples
from ..runtime import Answer, load

Asked = tuple[EvaluationReport, list[Answer]]


def ask_all(paths: Sequence[Path], samples: int) -> list[Asked]:
    """Ask every bundle ``samples`` questions, a bundle a core; one thread each."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_ask, paths, repeat(samples)))


def _ask(path: Path, samples: int) -> Asked:
    answers: list[Answer] = []
    with load(path, threads=1) as session:
        report = evaluate(session, evaluation_samples("demo", None, samples), heard=answers.append)
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
