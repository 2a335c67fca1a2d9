"""The middle of ``calibrate``: everything that only a choice needs.

For a quantised precision the dense answers stay those of FP32; everything after them is rounded,
under ranges of the dense model's rows on the choosing samples: the plan's own are known only when
there is a plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...compile.build_spec import versions
from ...compile.checkpoint.checkpoint import Checkpoint
from ...compile.export.texts import TextFacts
from ...compile.quantize.calibration_file import Calibration, SampleFacts
from ...compile.quantize.fake_quantized import Rounded
from ...graphs.errors import PlanError
from ...graphs.plan.cost import Geometry
from ...graphs.plan.plan import StagePlan
from ...graphs.presets.presets import preset
from ...graphs.quantization import Recipe
from ..evaluate import DEFAULT_MAX_TOKENS
from ..progress import Watcher, steps
from ..run import layerwise as walk
from ..run.collect_ranges import collect
from ..sample_prompts import Prompt, order_hash
from ..samples import Sample
from .agreement import Agreement, Referred
from .candidates import Pricing
from .choose import DEFAULT_CANDIDATES, Budget, Choice, choose_plan
from .dynamics import Dynamics, Reading
from .holdout import hold_out
from .measure_plans import Measuring, text_blind_plans
from .rationale import about_precision
from .thresholds import suggest_thresholds

DEFAULT_HOLDOUT = 0.33


@dataclass(frozen=True)
class Wish:
    """How a plan is to be chosen.

    budget: what it may lose, or cost. holdout: share of the samples that confirm what the others
    chose. most: plans that are measured. max_tokens: longest answer that is compared. recipe: of
    the precision that the plan is for; None: FP32.
    """

    budget: Budget
    holdout: float = DEFAULT_HOLDOUT
    most: int = DEFAULT_CANDIDATES
    max_tokens: int = DEFAULT_MAX_TOKENS
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.recipe is not None and self.recipe.stages:
            raise PlanError(
                f"precision {self.recipe.name} names stage{min(self.recipe.stages)}, but which "
                "stages the plan has is yet to be chosen. Leave stages out, or choose without "
                "--precision and name stages when you build: visistage engines"
            )

    @property
    def precision(self) -> str:
        """Of the bundles that are measured."""
        return "fp32" if self.recipe is None else self.recipe.name


class Chooser:
    """A wish and samples become a choice; ``watcher`` is told of every step."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: TextFacts,
        fits: Mapping[str, str],
        measuring: Measuring,
        wish: Wish,
        watcher: Watcher,
    ):
        self.checkpoint, self.texts, self.fits, self.measuring = checkpoint, texts, fits, measuring
        self.wish, self.watcher, self.step = wish, watcher, steps(watcher)
        text = checkpoint.config.text
        self.pricing = Pricing(Geometry.of(text), checkpoint.config.visual_tokens)
        self.dense = preset("dense", text.layers, checkpoint.config.visual_tokens)
        self.rounding: Agreement | None = None

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
        shown = [prompts[index] for index in choosing]
        rounded = None if self.wish.recipe is None else self._rounded(shown, self.wish.recipe)
        dynamics = self._dynamics(shown, rounded)
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
        if self.rounding is not None:
            why = about_precision(self.wish.precision, self.rounding)
            choice = replace(choice, reasons={"precision": why, **choice.reasons})
        suggested = suggest_thresholds(dynamics).to_dict()
        return choice, prompts, dynamics.to_dict(suggested=suggested, text_blind=blind)

    def measured(self) -> dict[str, Any]:
        """How plans were measured: what a ``Choice`` does not know."""
        how = {"max_tokens": self.wish.max_tokens, "precision": self.wish.precision}
        return how if self.rounding is None else {**how, "rounding": self.rounding.to_dict()}

    def _rounded(self, prompts: Sequence[Prompt], recipe: Recipe) -> Rounded:
        """The dense model rounded; from here on plans are measured so."""
        config, prefix = self.checkpoint.config, self.texts.prefix_ids
        with self.step("dense ranges", walk.pieces(config, prefix)) as tell:
            found = collect(
                self.checkpoint,
                prompts,
                self.dense,
                prefix,
                rows="dense",
                progress=self.watcher.advance,
            )
            tell(f"{len(found.groups)} groups of linear layers")
        ranges = Calibration(
            model=self.checkpoint.name,
            fits=self.fits,
            plan=self.dense,
            rows="dense",
            include_prefix=False,
            samples=SampleFacts((), tuple(one.name for one in prompts), order_hash(prompts)),
            groups=found.groups,
            versions=versions(),
            cache=found.cache,
        )
        rounded = Rounded(self.checkpoint, recipe, ranges)
        self.measuring.ranges = ranges
        self.rounding = self._measure(self.dense)
        return rounded

    def _dynamics(self, prompts: Sequence[Prompt], rounded: Rounded | None) -> Dynamics:
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
                rounded=rounded,
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
            tell(agrees(found))
        return found

    def _tick(self) -> None:
        self.watcher.advance(1)


def agrees(found: Agreement) -> str:
    """What a step that measured has to show."""
    return f"agrees on {100 * found.tokens.share:.1f} % of {found.tokens.total} tokens"


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
