"""Plans run for real: a bundle each, built, asked and removed, one at a time.

What is measured are the graphs that will be shipped, not a model of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import runtime
from ..compile.build import build
from ..compile.planfile import save_plan
from ..graphs.bundle import Bundle
from ..graphs.errors import CapacityError
from ..graphs.plan import Mode, Stage, StagePlan
from ..graphs.presets import preset
from .agreement import Agreement, Referred, agreement, reference
from .samples import Sample

Tick = Callable[[], None]


@dataclass(frozen=True)
class Origin:
    """Which checkpoint, as ``open_checkpoint`` and ``build`` take it."""

    model: str
    revision: str | None = None
    offline: bool = False
    dummy_weights: bool = False


class Measuring:
    """Agreement of plans with the dense model, on choosing and on held-out samples.

    Both are measured while a bundle exists, and those held out are not looked at before
    ``confirm``: building twice would take longer than asking.

    folder: for plans and bundles; empty between two calls.
    """

    def __init__(self, origin: Origin, folder: Path):
        self.origin, self.folder = origin, folder
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
        tick: Tick,
    ) -> list[Referred]:
        """Answer all samples with the dense bundle; ``held`` are the indices of those held out.

        Raises:
            CapacityError: the machine cannot hold the dense model's bundle; says what to do.
        """
        try:
            answers = self._with_bundle(
                dense, lambda session: reference(session, samples, max_tokens, tick)
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

    def measure(self, plan: StagePlan, tick: Tick = lambda: None) -> Agreement:
        """On the choosing samples."""

        def run(session: runtime.Session) -> Agreement:
            found = agreement(session, self._choosing, tick)
            if self._held:
                self._confirmed[plan.hash] = agreement(session, self._held, tick)
            return found

        return self._with_bundle(plan, run)

    def confirm(self, plan: StagePlan) -> Agreement:
        """On those held out; of a plan that was measured."""
        return self._confirmed[plan.hash]

    def _with_bundle(self, plan, run):
        """What ``run`` makes of a session with the plan's bundle, which is gone afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "plan.json"
        save_plan(plan, file)
        try:
            bundle: Bundle = build(
                **vars(self.origin), plan=str(file), target="cpu", out=self.folder
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
