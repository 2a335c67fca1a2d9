"""Plans run for real: a bundle each, built, asked and removed, one at a time.

The graphs that are measured are those that will be shipped, not a model of them.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ... import runtime
from ...compile.build import make_bundle
from ...compile.planfile import save_plan
from ...compile.quantize.calibration_file import Calibration
from ...graphs.errors import CapacityError, DataError
from ...graphs.families.family import Size
from ...graphs.plan.plan import StagePlan
from ...graphs.plan.stages import Mode, Stage
from ...graphs.presets.presets import preset
from ...graphs.progress import Progress
from ...pages.units import show_seconds
from ..samples import Sample
from .agreement import Agreement, DenseAnswer, agreement, dense_answers
from .measured_file import MeasuredFile
from .times import QuestionTimes, question_times

Found = TypeVar("Found")


@dataclass(frozen=True)
class Origin:
    """A checkpoint, as ``open_checkpoint`` and ``make_bundle`` take it."""

    model: str
    revision: str | None = None
    offline: bool = False
    dummy_weights: bool = False
    image_tokens: int | None = None
    canvas: Size | None = None


class PlanBundles:
    """Bundles of plans, asked how far they agree with the dense model.

    Choosing and held-out samples are both asked while a bundle exists, and those held out are not
    looked at before ``confirm``: building twice would take longer than asking.

    Args:
        origin: the checkpoint.
        folder: for plans and bundles; removed between two calls.
        precision: of the plans' bundles; the dense answers are always those of an FP32 bundle.
        progress: sees a step for every bundle.
        measured: what earlier runs measured; gets what this one does.

    Attributes:
        ranges: must be set before plans are measured in a quantised precision: of rows that none
            of the plans changes, for each has rows of its own.
        times: of every plan that was measured, by its hash; of the dense one in the precision of
            the others.
    """

    def __init__(
        self,
        origin: Origin,
        folder: Path,
        precision: str = "fp32",
        progress: Progress | None = None,
        measured: MeasuredFile | None = None,
    ):
        self.origin, self.folder, self.precision = origin, folder, precision
        self.measured = measured
        self.progress = progress or Progress()
        self.ranges: Calibration | None = None
        self.times: dict[str, QuestionTimes] = {}
        self._choosing: list[DenseAnswer] = []
        self._held: list[DenseAnswer] = []
        self._confirmed: dict[str, Agreement] = {}
        self.tried, self._started = 0, 0.0

    def refer(
        self, dense: StagePlan, samples: Sequence[Sample], held: Sequence[int], max_tokens: int
    ) -> tuple[DenseAnswer, ...]:
        """Answer all samples with the dense bundle; ``held`` are the indices of those held out.

        Raises:
            CapacityError: the machine cannot hold the dense model's bundle; says what to do.
        """

        def ask(session: runtime.Session) -> tuple[DenseAnswer, ...]:
            self.times[dense.hash] = question_times(session, samples)
            return dense_answers(session, samples, max_tokens, self.progress.advance)

        with self.progress.step("dense answers", len(samples)) as outcome:
            try:
                answers = self._with_bundle(dense, ask)
            except CapacityError as error:
                raise CapacityError(
                    f"{error}. To calibrate without running bundles, name the plan: "
                    "--plan visipruner"
                ) from None
            outcome.append(f"{len(samples) - len(held)} to choose by, {len(held)} held out")
        out = set(held)
        self._choosing = [answer for i, answer in enumerate(answers) if i not in out]
        self._held = [answer for i, answer in enumerate(answers) if i in out]
        return answers

    def candidate(self, plan: StagePlan, most: int) -> Agreement:
        """Measure the next of at most ``most`` plans; its step says which, and what is left."""
        now, left = time.perf_counter(), ""
        if self.tried:
            mean = (now - self._started) / self.tried
            left = f", about {show_seconds(mean * (most - self.tried))} left"
        else:
            self._started = now
        self.tried += 1
        return self.measure(plan, f", candidate {self.tried} of {most}{left}")

    def measure(self, plan: StagePlan, which: str = "") -> Agreement:
        """Return the agreement of a plan on the choosing samples; ``which`` ends its name."""
        # Else a build would look for a calibration of its own.
        assert self.precision == "fp32" or self.ranges is not None

        def run(session: runtime.Session) -> Agreement:
            asked = [answer.sample for answer in self._choosing]
            self.times[plan.hash] = question_times(session, asked)
            found = agreement(session, self._choosing, self.progress.advance)
            if self._held:
                self._confirmed[plan.hash] = agreement(session, self._held, self.progress.advance)
            return found

        asked = len(self._choosing) + len(self._held)
        key = self._key(plan)
        with self.progress.step(f"{plan.name}{which}", asked) as outcome:
            known = self.measured.find(key, Agreement) if self.measured else None
            times = self.measured.find([key, "times"], QuestionTimes) if self.measured else None
            if known is not None and times is not None:
                found, *confirmed = known
                (self.times[plan.hash],) = times
                self._confirmed |= dict.fromkeys([plan.hash], *confirmed) if confirmed else {}
                outcome.append("measured before, ")
            else:
                found = self._with_bundle(plan, run, self.precision, self.ranges)
                confirmed = [self._confirmed[plan.hash]] if self._held else []
                if self.measured:
                    self.measured.add(key, [found, *confirmed])
                    self.measured.add([key, "times"], [self.times[plan.hash]])
            outcome.append(_agrees(found))
        return found

    def _key(self, plan: StagePlan) -> list:
        """Return all that a measurement depends on besides the checkpoint, as JSON."""
        asked = [
            [[answer.sample.prompt, answer.tokens] for answer in answers]
            for answers in (self._choosing, self._held)
        ]
        return [plan.hash, self.precision, self.ranges and self.ranges.hash, asked]

    def confirm(self, plan: StagePlan) -> Agreement:
        """Return the agreement of a measured plan on the samples held out."""
        return self._confirmed[plan.hash]

    def ship(self, calibration: Calibration) -> dict:
        """Return the agreement of the plan of a calibration with its own ranges, as JSON.

        On the samples held out if there are any, as ``samples`` says.
        """
        answers = self._held or self._choosing
        with self.progress.step(f"as it ships, {self.precision}", len(answers)) as outcome:
            found = self._with_bundle(
                calibration.plan,
                lambda session: agreement(session, answers, self.progress.advance),
                self.precision,
                calibration,
            )
            outcome.append(_agrees(found))
        return {"samples": "held_out" if self._held else "choosing", **found.to_dict()}

    def _with_bundle(
        self,
        plan: StagePlan,
        run: Callable[[runtime.Session], Found],
        precision: str = "fp32",
        calibration: Calibration | None = None,
    ) -> Found:
        """Run a session with the plan's bundle, which is removed afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file, ranges = self.folder / "plan.json", None
        try:
            save_plan(plan, file)
            if calibration is not None:
                ranges = self.folder / "ranges"
                replace(calibration, plan=plan).save(ranges)
            bundle = make_bundle(
                **vars(self.origin),
                plan=str(file),
                target="cpu",
                precision=precision,
                calibration=ranges,
                out=self.folder,
                weights="link",  # no other tool will see it
            )
            with runtime.load(bundle.path) as session:
                return run(session)
        finally:
            shutil.rmtree(self.folder)


def hold_out(images: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Return indices (choosing, held out) of samples, each ascending; ``share`` are held out.

    Questions about one image stay together: a plan that was chosen on an image has seen it. The
    order of the samples says nothing, as files are often sorted by kind of question; the hash of
    the image decides, and so every run decides alike.

    Args:
        images: a hash (hex) of what each sample shows.
        share: 0 holds out nothing.

    Raises:
        DataError: ``share`` is no share below 1, or one image is all there is.
    """
    if not 0 <= share < 1:
        raise DataError(f"holdout: found {share:g}, expected 0 to below 1. Type --holdout 0.33.")
    of_image = Counter(images)
    known = sorted(of_image)
    if share and len(known) < 2:
        raise DataError(
            f"holdout: found {len(known)} image among {len(images)} samples, expected two or "
            "more: one must choose and another confirm. Add samples, or type --holdout 0."
        )
    wanted = share * len(images)
    held: set[str] = set()
    count = 0
    for key in known[:-1]:
        if count >= wanted:
            break
        held.add(key)
        count += of_image[key]
    return (
        [index for index, image in enumerate(images) if image not in held],
        [index for index, image in enumerate(images) if image in held],
    )


def text_blind_plans(layers: int, visual_tokens: int) -> dict[int, StagePlan]:
    """Return, by s, plans in which the first s layers are text-blind, and nothing else happens.

    By the rule of the preset ``visipruner`` for 7B. None in a decoder of fewer than four layers.
    """
    out = {}
    for shallow in sorted({layers * sixteenths // 16 for sixteenths in (1, 2, 3, 4)} - {0}):
        options = {"shallow": shallow, "t": layers - 2, "e": layers - 1, "keep": 1}
        modes = preset("visipruner", layers, visual_tokens, **options).stages[0].modes[:shallow]
        full: Mode = "dense"
        stage = Stage((0, layers), visual_tokens, modes + (full,) * (layers - shallow))
        out[shallow] = StagePlan(f"text-blind-{shallow}", layers, visual_tokens, (stage,))
    return out


def _agrees(found: Agreement) -> str:
    return f"agrees on {100 * found.tokens.share:.1f} % of {found.tokens.total} tokens"
