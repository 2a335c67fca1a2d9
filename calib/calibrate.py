"""``calibrate``: samples become a plan with reasons, ranges, and a page about both.

    samples ─▶ dense answers ─▶ dynamics ─▶ text-blind ─▶ candidates ─▶ plan ─▶ ranges ─▶ page
    read once  a bundle         FP32 walk   bundles, one at a time      held out  its stages' rows

With a plan given nothing is chosen and no bundle runs: what remains is one walk of the checkpoint,
one layer's weights in memory at a time. That is how a 7B goes through a small machine.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..compile import walk
from ..compile.build import versions
from ..compile.checkpoint import Checkpoint, open_checkpoint
from ..compile.collect import collect, fits
from ..compile.planfile import resolve_plan, save_plan
from ..compile.steps import NOTES, Silent, Workshop
from ..compile.texts import TextFacts, prompt_encoder, text_facts
from ..graphs.cost import Geometry
from ..graphs.errors import PlanError
from ..graphs.plan import StagePlan
from ..graphs.presets import preset
from ..runtime.preprocessing import Preprocessing
from .agreement import Agreement, Referred
from .calibration import Calibration, SampleFacts
from .candidates import Pricing
from .choose import DEFAULT_CANDIDATES, Budget, Choice, choose_plan
from .dynamics import Dynamics, Reading
from .evaluate import DEFAULT_MAX_TOKENS
from .holdout import hold_out
from .measuring import Measuring, Origin, text_blind_plans
from .prompts import Prompt, order_hash, prepare
from .report import write_report
from .samples import Sample
from .thresholds import suggest_thresholds

PLAN = "plan.yaml"
DEFAULT_HOLDOUT = 0.33


class Watcher(Protocol):
    """Who is told how a calibration goes."""

    def start(self, step: str, total: int | None) -> None:
        """A step begins; ``total`` units will be done if that is known."""

    def advance(self, units: int) -> None:
        """Some units are done."""

    def done(self, step: str, seconds: float, outcome: str) -> None:
        """It is done, with this to show for it."""


@dataclass(frozen=True)
class Wish:
    """How a plan is to be chosen.

    budget: what it may lose, or cost. holdout: share of the samples that confirm what the others
    chose. most: plans that are measured. max_tokens: longest answer that is compared.
    """

    budget: Budget
    holdout: float = DEFAULT_HOLDOUT
    most: int = DEFAULT_CANDIDATES
    max_tokens: int = DEFAULT_MAX_TOKENS


def calibrate(
    origin: Origin,
    samples: Sequence[Sample],
    plan: str | Wish,
    *,
    files: Sequence[str] = (),
    out: str | Path = "calibrations",
    watcher: Watcher,
) -> tuple[Path, Calibration]:
    """Calibrate a model in ``OUT/<model>/``; what is there is replaced once all is done.

    Args:
        origin: the checkpoint.
        samples: read once, in their order.
        plan: a static plan, as ``resolve_plan`` takes it, or how to choose one.
        files: names of the files that the samples are from, without folders.
        out: folder of all calibrations.
        watcher: told of every step.

    Raises:
        VisistageError: whatever the user can mend; nothing is left behind then.
    """
    step = _steps(watcher)
    with step("open checkpoint"):
        checkpoint = open_checkpoint(**vars(origin), progress=watcher.advance)
        given = _given(plan, checkpoint) if isinstance(plan, str) else None
        texts = text_facts(checkpoint)
    with step("read samples", len(samples)) as tell:
        prompts, unreadable = prepare(
            samples,
            prompt_encoder(checkpoint),
            Preprocessing.from_dict(texts.preprocessing),
            lambda: watcher.advance(1),
        )
        tell(f"{len(prompts)} read, {len(unreadable)} unreadable")
    with step("hash weights"):
        facts = fits(checkpoint, texts)

    # No key of an earlier run: what a calibration that was cut short had measured is not kept.
    workshop = Workshop(Path(out) / checkpoint.name, uuid.uuid4().hex, Silent())
    with workshop, _removed_unless_finished(workshop.folder):
        dynamics: dict[str, Any] = {}
        choice: dict[str, Any] = {}
        if isinstance(plan, Wish):
            named = {name for name, _ in unreadable}
            readable = [one for one in samples if Path(one.name).name not in named]
            measuring = Measuring(origin, workshop.folder / "bundles")
            chooser = _Chooser(checkpoint, texts, measuring, plan, watcher)
            taken, prompts, dynamics = chooser.choose(readable, prompts)
            choice = {**taken.to_dict(), "max_tokens": plan.max_tokens}
            given = taken.plan
        assert given is not None
        with step("ranges", walk.pieces(checkpoint.config, texts.prefix_ids)) as tell:
            groups = collect(checkpoint, prompts, given, texts.prefix_ids, progress=watcher.advance)
            tell(f"{len(groups)} groups of linear layers")
        names = tuple(one.name for one in prompts)
        calibration = Calibration(
            model=checkpoint.name,
            fits=facts,
            plan=given,
            rows="stage",
            include_prefix=False,
            samples=SampleFacts(tuple(files), names, order_hash(prompts), tuple(unreadable)),
            groups=groups,
            versions=versions(),
            dynamics=dynamics,
            choice=choice,
        )
        with step("write"):
            calibration.save(workshop.folder)
            save_plan(given, workshop.folder / PLAN)
            write_report(calibration, workshop.folder)
            (workshop.folder / NOTES).unlink(missing_ok=True)
            workshop.finish()
    return workshop.final, calibration


class _Chooser:
    """The middle of ``calibrate``: everything that only a choice needs."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: TextFacts,
        measuring: Measuring,
        wish: Wish,
        watcher: Watcher,
    ):
        self.checkpoint, self.texts, self.measuring = checkpoint, texts, measuring
        self.wish, self.watcher, self.step = wish, watcher, _steps(watcher)
        text = checkpoint.config.text
        self.pricing = Pricing(Geometry.of(text), checkpoint.config.visual_tokens)
        self.dense = preset("dense", text.layers, checkpoint.config.visual_tokens)

    def choose(
        self, samples: Sequence[Sample], prompts: Sequence[Prompt]
    ) -> tuple[Choice, list[Prompt], dict[str, Any]]:
        """The choice, the prompts with an answer each, and the dynamics as JSON."""
        assert len(samples) == len(prompts), (len(samples), len(prompts))
        choosing, held = hold_out([_shown(one) for one in prompts], self.wish.holdout)
        with self.step("dense answers", len(prompts)) as tell:
            answers = self.measuring.refer(
                self.dense, samples, held, self.wish.max_tokens, self._tick
            )
            tell(f"{len(choosing)} to choose by, {len(held)} held out")
        prompts = [_answered(*both) for both in zip(prompts, answers, strict=True)]
        dynamics = self._dynamics([prompts[index] for index in choosing])
        blind = [
            {"shallow": shallow, **self._measure(plan).to_dict()}
            for shallow, plan in text_blind_plans(dynamics.layers, self.dense.visual_tokens).items()
        ]
        choice = choose_plan(
            dynamics,
            self.pricing,
            self.wish.budget,
            self._measure,
            self.measuring.confirm if held else None,
            most=self.wish.most,
            text_blind=blind,
        )
        suggested = suggest_thresholds(dynamics).to_dict()
        return choice, prompts, dynamics.to_dict(suggested=suggested, text_blind=blind)

    def _dynamics(self, prompts: Sequence[Prompt]) -> Dynamics:
        """Readings of a dense walk. Answers are left out: the last prompt row is what is read."""
        config, prefix = self.checkpoint.config, self.texts.prefix_ids
        cosines: list[list[np.ndarray]] = [[] for _ in prompts]
        norms: list[list[np.ndarray]] = [[] for _ in prompts]

        def read(prompt: int, layer: int, cosine: np.ndarray, norm: np.ndarray) -> None:
            assert len(cosines[prompt]) == layer, "layers are read in their order"
            cosines[prompt].append(cosine)
            norms[prompt].append(norm)

        with self.step("dynamics", walk.pieces(config, prefix)):
            walk.walk(
                self.checkpoint,
                [replace(one, answer_ids=()) for one in prompts],
                self.dense,
                prefix,
                reading=read,
                want_logits=False,
                progress=self.watcher.advance,
            )
        return Dynamics.of(
            [
                Reading(np.stack(cosine), np.stack(norm))
                for cosine, norm in zip(cosines, norms, strict=True)
                if cosine
            ]
        )

    def _measure(self, plan: StagePlan) -> Agreement:
        with self.step(plan.name, self.measuring.asked) as tell:
            found = self.measuring.measure(plan, self._tick)
            tell(f"agrees on {100 * found.tokens.share:.1f} % of {found.tokens.total} tokens")
        return found

    def _tick(self) -> None:
        self.watcher.advance(1)


def _given(plan: str, checkpoint: Checkpoint) -> StagePlan:
    config = checkpoint.config
    staged = resolve_plan(plan, config.text.layers, config.visual_tokens)
    if staged.kind != "static":
        raise PlanError(
            f"plan '{staged.name}' decides per prompt, so no stage has rows of its own to "
            "calibrate on. Name a static plan, such as visipruner, or leave out --plan"
        )
    return staged


def _shown(prompt: Prompt) -> str:
    """A hash of the pixels that a prompt shows."""
    digest = hashlib.sha256()
    for part in prompt.parts:
        if isinstance(part, np.ndarray):
            digest.update(part.tobytes())
    return digest.hexdigest()


def _answered(prompt: Prompt, dense: Referred) -> Prompt:
    """Where no answer is known, what the dense model says: ranges need rows of answers, too."""
    return prompt if prompt.answer_ids else replace(prompt, answer_ids=dense.text_tokens)


Tell = Callable[[str], None]


def _steps(watcher: Watcher) -> Callable[..., Any]:
    """Steps that the watcher sees; what a step tells in the end is shown beside it."""

    @contextmanager
    def step(name: str, total: int | None = None) -> Iterator[Tell]:
        outcome: list[str] = []
        watcher.start(name, total)
        started = time.perf_counter()
        yield outcome.append
        watcher.done(name, time.perf_counter() - started, "".join(outcome))

    return step


@contextmanager
def _removed_unless_finished(folder: Path) -> Iterator[None]:
    """Ctrl-C counts as well."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
