"""Plans run for real: a bundle each, built, asked and removed, one at a time.

What is measured are the graphs that will be shipped, not a model of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ... import runtime
from ...compile.build import make_bundle
from ...compile.planfile import save_plan
from ...compile.quantize.calibration_file import Calibration
from ...graphs.bundle import Bundle
from ...graphs.errors import CapacityError
from ...graphs.plan.plan import StagePlan
from ...graphs.plan.stages import Mode, Stage
from ...graphs.presets.presets import preset
from ..samples import Sample
from .agreement import Agreement, Referred, agreement, reference

SampleProgress = Callable[[], None]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Origin:
    """Which checkpoint, as ``open_checkpoint`` and ``make_bundle`` take it."""

    model: str
    revision: str | None = None
    offline: bool = False
    dummy_weights: bool = False


class Measuring:
    """Agreement of plans with the dense model, on choosing and on held-out samples.

    Both are measured while a bundle exists, and those held out are not looked at before
    ``confirm``: building twice would take longer than asking.

    folder: for plans and bundles; gone between two calls. precision: of the plans' bundles; the
    dense answers are those of an FP32 bundle always. ``ranges`` must be set before plans are
    measured in a quantised one: of rows that none of them changes, for each has rows of its own.
    """

    def __init__(self, origin: Origin, folder: Path, precision: str = "fp32"):
        self.origin, self.folder, self.precision = origin, folder, precision
        self.ranges: Calibration | None = None
        self._choosing: list[Referred] = []
        self._held: list[Referred] = []
        self._confirmed: dict[str, Agreement] = {}

    @property
    def asked(self) -> int:
        """Samples that one measurement asks."""
        return len(self._choosing) + len(self._held)

    def refer(
        self,
        dense: StagePlan,
        samples: Sequence[Sample],
        held: Sequence[int],
        max_tokens: int,
        progress: SampleProgress,
    ) -> list[Referred]:
        """Answer all samples with the dense bundle; ``held`` are the indices of those held out.

        Raises:
            CapacityError: the machine cannot hold the dense model's bundle; says what to do.
        """
        try:
            answers = self._with_bundle(
                dense, lambda session: reference(session, samples, max_tokens, progress)
            )
        except CapacityError as error:
            raise CapacityError(
                f"{error}. To calibrate without running bundles, name the plan: --plan visipruner"
            ) from None
        assert not answers.unreadable, answers.unreadable  # their pictures were opened before
        out = set(held)
        self._choosing = [one for i, one in enumerate(answers.answers) if i not in out]
        self._held = [one for i, one in enumerate(answers.answers) if i in out]
        return list(answers.answers)

    def measure(self, plan: StagePlan, progress: SampleProgress = lambda: None) -> Agreement:
        """On the choosing samples."""
        # Else a build would look for a calibration of its own.
        assert self.precision == "fp32" or self.ranges is not None

        def run(session: runtime.Session) -> Agreement:
            found = agreement(session, self._choosing, progress)
            if self._held:
                self._confirmed[plan.hash] = agreement(session, self._held, progress)
            return found

        return self._with_bundle(plan, run, self.precision, self.ranges)

    def ship(self, calibration: Calibration, progress: SampleProgress = lambda: None) -> Agreement:
        """The plan of a calibration with its own ranges, on samples held out if there are any."""
        answers = self._held or self._choosing
        return self._with_bundle(
            calibration.plan,
            lambda session: agreement(session, answers, progress),
            self.precision,
            calibration,
        )

    @property
    def shipped_on(self) -> str:
        """Which samples ``ship`` asks."""
        return "held_out" if self._held else "choosing"

    @property
    def ship_asks(self) -> int:
        """How many."""
        return len(self._held or self._choosing)

    def confirm(self, plan: StagePlan) -> Agreement:
        """On those held out; of a plan that was measured."""
        return self._confirmed[plan.hash]

    def _with_bundle(
        self,
        plan: StagePlan,
        run: Callable[[runtime.Session], Found],
        precision: str = "fp32",
        calibration: Calibration | None = None,
    ) -> Found:
        """What ``run`` makes of a session with the plan's bundle, which is gone afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file, ranges = self.folder / "plan.json", None
        try:
            save_plan(plan, file)
            if calibration is not None:
                ranges = self.folder / "ranges"
                replace(calibration, plan=plan).save(ranges)
            bundle: Bundle = make_bundle(
                **vars(self.origin),
                plan=str(file),
                target="cpu",
                precision=precision,
                calibration=ranges,
                out=self.folder,
            )
            with runtime.load(bundle.path) as session:
                return run(session)
        finally:
            shutil.rmtree(self.folder)


def text_blind_plans(layers: int, visual_tokens: int) -> dict[int, StagePlan]:
    """By s: plans in which the first s layers are text-blind, and nothing else happens.

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
