"""``visistage compare``: plans of one model at the same cost, timed in turns and asked the same.

bundles ─▶ times, in turns ─▶ answers, two questions an image ─▶ facts: a row for each plan

What was measured is kept as it comes: answers in files, times until a comparison is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from ...calib.evaluate import Refused, check_samples
from ...calib.samples import reject_unreadable
from ...calib.two_turns import Turns
from ...compile.matched_bundles import ComparedPlan
from ...graphs.bundle import MANIFEST, Bundle, sha256
from ...graphs.progress import Advance, Progress
from ...runtime import load
from ...runtime.hardware import busy_machine, cores
from ..profile.machine import machine_facts
from ..profile.timing import FIRST_TOKEN, Settings, Spread, measure_bundles
from .asking import Pair, ask_bundles, bundle_title
from .compare_facts import findings, row_facts

TIMES = "times.partial.json"
"""Times of a comparison that is not complete, beside its answers."""

QUICK = Settings(repetitions=20, warm_up=2, tokens=8)

WEIGHTS_SHARE = 3
"""Bundles are loaded together while their weights take less than one part in so many of the free
memory: a session takes about twice its weights."""

Times = dict[str, dict[str, Spread]]
"""First token, second question and later token, by name of the bundle."""


def compare(
    plans: Sequence[ComparedPlan],
    turns: Sequence[Turns],
    *,
    folder: Path,
    settings: Settings = QUICK,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time and ask every plan; return plain data.

    Args:
        plans: the dense one first.
        turns: pairs of questions, each with a right answer.
        folder: where answers are kept.
        settings: how much is timed.
        progress: the progress callback.

    Raises:
        VisistageError: no question can be asked, or a bundle does not run here.
    """
    progress = progress or Progress()
    settings.check()
    busy = busy_machine()
    machine = machine_facts()
    dense = plans[0].bundle
    bundles = list({plan.bundle.path: plan.bundle for plan in plans}.values())
    good, refused, threads = askable(dense, turns)
    times, together = _timed(bundles, settings, threads, folder, progress)
    with progress.step(f"{len(bundles)} plans, {len(good)} images", len(bundles) * len(good)):
        answers = ask_bundles(bundles, good, folder, progress.advance)
    heard = {bundle.path: pairs for bundle, pairs in zip(bundles, answers, strict=True)}
    complete = [i for i in range(len(good)) if all(pairs[i] for pairs in answers)]
    if not complete:
        reject_unreadable([*refused, *((turn.first.name, "an answer failed") for turn in good)])
    asked = [good[i] for i in complete]

    def pairs_of(plan: ComparedPlan) -> list[Pair]:
        return [pair for i in complete if (pair := heard[plan.bundle.path][i]) is not None]

    rows = [
        row_facts(plan, asked, pairs_of(plan), pairs_of(plans[0]), times[bundle_title(plan.bundle)])
        for plan in plans
    ]
    with contextlib.suppress(OSError):
        (folder / TIMES).unlink()
    return {
        "model": dense.manifest.model,
        "precision": dense.manifest.precision,
        "samples": len(asked),
        "second_questions": sum(turn.second is not None for turn in asked),
        "unreadable": len(turns) - len(asked),
        "settings": {**asdict(settings), "loaded_together": together},
        "machine": {**machine, "threads": threads},
        "busy": busy,
        "findings": findings(rows),
        "rows": rows,
    }


def askable(dense: Bundle, turns: Sequence[Turns]) -> tuple[list[Turns], list[Refused], int]:
    """Return the pairs whose questions can be asked, the samples of the others, and the threads
    that are fastest here.
    """
    with load(dense.path) as session:
        threads = session.executor.threads or cores()
        _, refused = check_samples(session, [s for turn in turns for s in turn.samples])
    names = {name for name, _ in refused}
    good = [turn for turn in turns if not names & {sample.name for sample in turn.samples}]
    if not good:
        reject_unreadable(refused)
    return good, refused, threads


def _timed(
    bundles: Sequence[Bundle], settings: Settings, threads: int, folder: Path, progress: Progress
) -> tuple[Times, int]:
    """Return the times of all bundles, and how many were loaded together."""
    groups = in_groups(bundles, psutil.virtual_memory().available // WEIGHTS_SHARE)
    manifests = [sha256(bundle.path / MANIFEST) for bundle in bundles]
    key = hashlib.sha256(json.dumps([manifests, asdict(settings)]).encode()).hexdigest()
    known = _read_times(folder / TIMES, key)
    if known is None:
        known = {}
        rounds = settings.warm_up + settings.repetitions
        with progress.step(f"times of {len(bundles)} plans, in turns", rounds * len(groups)):
            for group in groups:
                known |= _time_group(group, settings, threads, progress.advance)
        with contextlib.suppress(OSError):  # they are measured again then
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"key": key, "times": known}, default=asdict)
            (folder / TIMES).write_text(text, encoding="utf-8")
    return known, max(map(len, groups))


def in_groups(bundles: Sequence[Bundle], room: int) -> list[list[Bundle]]:
    """Divide bundles into groups whose weights fit into ``room`` bytes, the first one in each."""
    first, *others = bundles
    size = max(1, room // max(1, first.manifest.weight_bytes) - 1)
    groups = [[first, *others[at : at + size]] for at in range(0, len(others), size)]
    return groups or [[first]]


def _time_group(
    group: Sequence[Bundle], settings: Settings, threads: int, advance: Advance
) -> Times:
    with ExitStack() as stack:
        sessions = {
            bundle_title(bundle): stack.enter_context(load(bundle.path, threads=threads))
            for bundle in group
        }
        series = measure_bundles(sessions, settings, advance)
    found = {}
    for name, one in series.items():
        spreads = one.spreads()
        found[name] = {
            "first_token_ms": spreads["cold"][FIRST_TOKEN],
            "second_question_ms": spreads["again"][FIRST_TOKEN],
            "per_token_ms": spreads["cold"]["per_token"],
        }
    return found


def _read_times(file: Path, key: str) -> Times | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["key"] != key:
            return None
        return {
            name: {figure: Spread(**spread) for figure, spread in row.items()}
            for name, row in data["times"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
