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
from ...compile.quantize.fake_quantized import FakeQuantised
from ...graphs.errors import PlanError, TargetError
from ...graphs.plan.cost import Geometry
from ...graphs.plan.plan import StagePlan
from ...graphs.presets.presets import preset
from ...graphs.quantization import QUANTISED, QuantConfig, is_quantised, parse_quant_config
from ..evaluate import EVALUATE_MAX_TOKENS
from ..progress import CalibrationProgress, progress_steps
from ..run import layerwise as walk
from ..run.collect_ranges import collect
from ..sample_prompts import SamplePrompt, order_hash
from ..samples import Sample
from .agreement import Agreement, Referred
from .candidates import Pricing
from .choose import DEFAULT_CANDIDATES, Budget, Choice, choose_plan
from .dynamics import Dynamics, PromptReading
from .holdout import hold_out
from .measure_plans import Measuring, text_blind_plans
from .rationale import about_precision
from .thresholds import suggest_thresholds

DEFAULT_HOLDOUT = 0.33


@dataclass(frozen=True)
class SelectionGoal:
    """How a plan is to be chosen.

    budget: what it may lose, or cost. holdout: share of the samples that confirm what the others
    chose. most: plans that are measured. max_tokens: longest answer that is compared.
    quant_config: of the precision that the plan is for; None: FP32.
    """

    budget: Budget
    holdout: float = DEFAULT_HOLDOUT
    most: int = DEFAULT_CANDIDATES
    max_tokens: int = EVALUATE_MAX_TOKENS
    quant_config: QuantConfig | None = None

    def __post_init__(self) -> None:
        if self.quant_config is not None and self.quant_config.stages:
            raise PlanError(
                f"precision {self.quant_config.name} names stage{min(self.quant_config.stages)}, "
                f"but which "
                "stages the plan has is yet to be chosen. Leave stages out, or choose without "
                "--precision and name stages when you build: visistage engines"
            )

    @property
    def precision(self) -> str:
        """Of the bundles that are measured."""
        return "fp32" if self.quant_config is None else self.quant_config.name


def goal_or_plan(plan: str | None, **options: Any) -> str | SelectionGoal:
    """Return the plan that was named, or how to choose one.

    options: ``lose``, ``cost``, ``holdout``, ``most`` and ``precision``, None where not typed.

    Raises:
        PlanError: a plan and a goal, or a budget that is not valid.
        TargetError: a precision that plans are not measured in.
    """
    typed = {name: value for name, value in options.items() if value is not None}
    if plan is not None:
        if typed:
            option = {"most": "candidates"}.get(next(iter(typed)), next(iter(typed)))
            raise PlanError(
                f"found --{option} beside --plan {plan}, expected one of the two: a plan that is "
                f"named is not chosen. Leave out --{option} or --plan."
            )
        return plan
    if "precision" in typed:
        typed["quant_config"] = _quant_config(typed.pop("precision"))
    limits = {name: typed.pop(name) for name in ("lose", "cost") if name in typed}
    return SelectionGoal(Budget(**(limits or {"lose": 0.01})), **typed)


def _quant_config(precision: str) -> QuantConfig | None:
    """Parse the precision; None means FP32."""
    if precision == "fp32":
        return None
    if not is_quantised(precision):
        raise TargetError(
            f"--precision {precision}: plans are measured on this machine's CPU, in fp32, "
            f"{', '.join(QUANTISED)}, or a recipe such as int8:vision=float. For the FP16 graphs "
            "of a GPU choose in fp32: leave --precision out"
        )
    return parse_quant_config(precision)


class Chooser:
    """A wish and samples become a choice; ``progress`` is told of every step."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: TextFacts,
        fits: Mapping[str, str],
        measuring: Measuring,
        goal: SelectionGoal,
        progress: CalibrationProgress,
    ):
        self.checkpoint, self.texts, self.fits, self.measuring = checkpoint, texts, fits, measuring
        self.goal, self.progress, self.step = goal, progress, progress_steps(progress)
        text = checkpoint.config.text
        self.pricing = Pricing(Geometry.of(text), checkpoint.config.visual_tokens)
        self.dense = preset("dense", text.layers, checkpoint.config.visual_tokens)
        self.quantised_agreement: Agreement | None = None

    def choose(
        self, samples: Sequence[Sample], prompts: Sequence[SamplePrompt]
    ) -> tuple[Choice, list[SamplePrompt], dict[str, Any]]:
        """The choice, the prompts with an answer each, and the dynamics as JSON."""
        assert len(samples) == len(prompts), (len(samples), len(prompts))
        choosing, held = hold_out([_shown(one) for one in prompts], self.goal.holdout)
        with self.step("dense answers", len(prompts)) as report:
            answers = self.measuring.refer(
                self.dense, samples, held, self.goal.max_tokens, self._advance
            )
            report(f"{len(choosing)} to choose by, {len(held)} held out")
        prompts = [_answered(*both) for both in zip(prompts, answers, strict=True)]
        shown = [prompts[index] for index in choosing]
        fake_quantised = (
            None
            if self.goal.quant_config is None
            else self._fake_quantised(shown, self.goal.quant_config)
        )
        dynamics = self._dynamics(shown, fake_quantised)
        blind = [
            {"shallow": shallow, **self._measure(plan).to_dict()}
            for shallow, plan in text_blind_plans(dynamics.layers, self.dense.visual_tokens).items()
        ]
        choice = choose_plan(
            dynamics,
            self.pricing,
            self.goal.budget,
            self._measure,
            self.measuring.confirm if held else None,
            most=self.goal.most,
            text_blind=blind,
        )
        if self.quantised_agreement is not None:
            why = about_precision(self.goal.precision, self.quantised_agreement)
            choice = replace(choice, rationale={"precision": why, **choice.rationale})
        suggested = suggest_thresholds(dynamics).to_dict()
        return choice, prompts, dynamics.to_dict(suggested=suggested, text_blind=blind)

    def measured(self) -> dict[str, Any]:
        """How plans were measured: what a ``Choice`` does not know."""
        how = {"max_tokens": self.goal.max_tokens, "precision": self.goal.precision}
        return (
            how
            if self.quantised_agreement is None
            else {**how, "rounding": self.quantised_agreement.to_dict()}
        )

    def _fake_quantised(
        self, prompts: Sequence[SamplePrompt], quant_config: QuantConfig
    ) -> FakeQuantised:
        """The dense model rounded; from here on plans are measured so."""
        config, prefix = self.checkpoint.config, self.texts.prefix_ids
        with self.step("dense ranges", walk.layerwise_pieces(config, prefix)) as report:
            found = collect(
                self.checkpoint,
                prompts,
                self.dense,
                prefix,
                rows="dense",
                progress=self.progress.advance,
            )
            report(f"{len(found.groups)} groups of linear layers")
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
        fake_quantised = FakeQuantised(self.checkpoint, quant_config, ranges)
        self.measuring.ranges = ranges
        self.quantised_agreement = self._measure(self.dense)
        return fake_quantised

    def _dynamics(
        self, prompts: Sequence[SamplePrompt], fake_quantised: FakeQuantised | None
    ) -> Dynamics:
        """Readings of a dense walk. Answers are left out: the last prompt row is what is read."""
        config, prefix = self.checkpoint.config, self.texts.prefix_ids
        cosines: list[list[np.ndarray]] = [[] for _ in prompts]
        norms: list[list[np.ndarray]] = [[] for _ in prompts]

        def read(prompt: int, layer: int, cosine: np.ndarray, norm: np.ndarray) -> None:
            assert len(cosines[prompt]) == layer, "layers are read in their order"
            cosines[prompt].append(cosine)
            norms[prompt].append(norm)

        with self.step("dynamics", walk.layerwise_pieces(config, prefix)):
            walk.run_layerwise(
                self.checkpoint,
                [replace(one, answer_ids=()) for one in prompts],
                self.dense,
                prefix,
                reading=read,
                fake_quantised=fake_quantised,
                want_logits=False,
                progress=self.progress.advance,
            )
        return Dynamics.of(
            [
                PromptReading(np.stack(cosine), np.stack(norm))
                for cosine, norm in zip(cosines, norms, strict=True)
                if cosine
            ]
        )

    def _measure(self, plan: StagePlan) -> Agreement:
        with self.step(plan.name, self.measuring.asked) as report:
            found = self.measuring.measure(plan, self._advance)
            report(agrees(found))
        return found

    def _advance(self) -> None:
        self.progress.advance(1)


def agrees(found: Agreement) -> str:
    """What a step that measured has to show."""
    return f"agrees on {100 * found.tokens.share:.1f} % of {found.tokens.total} tokens"


def _shown(prompt: SamplePrompt) -> str:
    """A hash of the pixels that a prompt shows."""
    digest = hashlib.sha256()
    for part in prompt.parts:
        if isinstance(part, np.ndarray):
            digest.update(part.tobytes())
    return digest.hexdigest()


def _answered(prompt: SamplePrompt, dense: Referred) -> SamplePrompt:
    """Where no answer is known, what the dense model says: ranges need rows of answers, too."""
    return prompt if prompt.answer_ids else replace(prompt, answer_ids=dense.text_tokens)
