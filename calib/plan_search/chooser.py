"""The choice of a plan from samples: dense answers, dynamics, candidates, measurements.

For a quantised precision the dense answers stay those of FP32; everything after them is rounded,
under ranges of the dense model's rows on the choosing samples: the plan's own are known only when
there is a plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...compile.checkpoint.checkpoint import Checkpoint
from ...compile.export.texts import TextFacts
from ...compile.quantize.fake_quantized import FakeQuantised
from ...graphs.plan.cost import Geometry
from ...graphs.plan.plan import StagePlan
from ...graphs.presets.presets import preset
from ...graphs.progress import Progress
from ..run import layerwise
from ..run.collect_ranges import calibrated_ranges
from ..sample_prompts import SampleImage, SamplePrompt, usual_image
from ..samples import Sample
from .candidates import Pricing
from .choose import choose_plan
from .dynamics import Dynamics, PromptReading
from .goal import SelectionGoal
from .measure_plans import PlanBundles, hold_out, text_blind_plans
from .rationale import about_precision
from .thresholds import suggest_thresholds
from .times import about_times


@dataclass(frozen=True)
class Chosen:
    """A chosen plan, the prompts with an answer each, and what a calibration keeps of the choice.

    dynamics, choice: JSON, as ``dynamics`` and ``choose`` describe them.
    """

    plan: StagePlan
    prompts: list[SamplePrompt]
    dynamics: dict[str, Any]
    choice: dict[str, Any]


@dataclass(frozen=True)
class Chooser:
    """A checkpoint and a goal, for which ``choose`` finds a plan; ``progress`` sees every step."""

    checkpoint: Checkpoint
    texts: TextFacts
    fits: Mapping[str, str]
    bundles: PlanBundles
    goal: SelectionGoal
    progress: Progress

    @property
    def dense(self) -> StagePlan:
        """The plan that prunes nothing."""
        config = self.checkpoint.config
        return preset("dense", config.text.layers, config.visual_tokens)

    def choose(self, samples: Sequence[Sample], prompts: Sequence[SamplePrompt]) -> Chosen:
        """Choose a plan by ``samples``, of which ``prompts`` are the same, prepared."""
        assert len(samples) == len(prompts), (len(samples), len(prompts))
        goal, bundles, config = self.goal, self.bundles, self.checkpoint.config
        choosing, held = hold_out([_shown(prompt) for prompt in prompts], goal.holdout)
        answers = bundles.refer(self.dense, samples, held, goal.max_tokens)
        # Where no answer is known, the dense one: ranges need rows of answers, too.
        prompts = [
            prompt if prompt.answer_ids else replace(prompt, answer_ids=answer.text_tokens)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        shown = [prompts[index] for index in choosing]
        fake_quantised = rounding = None
        if goal.quant_config is not None:
            bundles.ranges = calibrated_ranges(
                self.checkpoint,
                self.fits,
                shown,
                self.dense,
                self.texts.prefix_ids,
                rows="dense",
                progress=self.progress,
            )
            rounding = bundles.measure(self.dense)
            fake_quantised = FakeQuantised(self.checkpoint, goal.quant_config, bundles.ranges)
        dynamics = self._dynamics(shown, fake_quantised)
        blind = [
            {"shallow": shallow, **bundles.measure(plan).to_dict()}
            for shallow, plan in text_blind_plans(dynamics.layers, config.visual_tokens).items()
        ]
        pricing = Pricing(
            Geometry.of(config.text),
            config.visual_tokens,
            len(self.texts.prefix_ids),
            round(np.mean([len(prompt.question) for prompt in shown])),
            usual_image(shown),
        )
        choice = choose_plan(
            dynamics,
            pricing,
            goal,
            lambda plan: bundles.candidate(plan, goal.most),
            bundles.confirm if held else None,
            text_blind=blind,
        )
        facts = {**choice.to_dict(), "max_tokens": goal.max_tokens, "precision": goal.precision}
        if rounding is not None:
            why = about_precision(goal.precision, rounding)
            facts |= {
                "reasons": {"precision": why, **choice.rationale},
                "rounding": rounding.to_dict(),
            }
        times = [bundles.times[pricing.plan(tried.candidate).hash] for tried in choice.tried]
        for found, measured in zip(facts["candidates"], times, strict=True):
            found |= asdict(measured)
        usual = bundles.times[self.dense.hash]
        facts["dense"] = asdict(usual)
        taken = None if choice.chosen is None else times[choice.chosen]
        facts["warnings"] += about_times(taken, usual)
        suggested = asdict(suggest_thresholds(dynamics))
        readings = dynamics.to_dict(suggested=suggested, text_blind=blind)
        return Chosen(choice.plan, prompts, readings, facts)

    def _dynamics(
        self, prompts: Sequence[SamplePrompt], fake_quantised: FakeQuantised | None
    ) -> Dynamics:
        """Read a dense run. Answers are left out: the last prompt row is what is read."""
        config, prefix = self.checkpoint.config, self.texts.prefix_ids
        reader = _Reader(len(prompts))
        with self.progress.step("dynamics", layerwise.layerwise_pieces(config, prefix)):
            layerwise.run_layerwise(
                self.checkpoint,
                [replace(prompt, answer_ids=()) for prompt in prompts],
                self.dense,
                prefix,
                observer=reader,
                fake_quantised=fake_quantised,
                advance=self.progress.advance,
            )
        read = Dynamics.of([PromptReading(*np.stack(rows, 1)) for rows in reader.rows if rows])
        return replace(read, blocks=reader.blocks) if self.goal.depth else read


class _Reader(layerwise.LayerObserver):
    """Keeps cosines and norms of each prompt, layer by layer."""

    reads = True

    def __init__(self, prompts: int):
        self.rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(prompts)]
        self.turned: dict[int, list[float]] = {}

    def read(self, prompt: int, layer: int, cosine: np.ndarray, norm: np.ndarray) -> None:
        """Keep one layer of a prompt."""
        assert len(self.rows[prompt]) == layer, "layers are read in their order"
        self.rows[prompt].append((cosine, norm))

    def turns(self, layer: int, cosine: np.ndarray) -> None:
        """Keep how far a layer turns a prompt's rows."""
        self.turned.setdefault(layer, []).extend(cosine.tolist())

    @property
    def blocks(self) -> tuple[float, ...]:
        """By layer, 1 - the mean cosine of rows before and behind it."""
        return tuple(1 - float(np.mean(self.turned[layer])) for layer in sorted(self.turned))


def _shown(prompt: SamplePrompt) -> str:
    """Return a hash of the pixels that a prompt shows."""
    digest = hashlib.sha256()
    for part in prompt.parts:
        if isinstance(part, SampleImage):
            digest.update(part.pixels.tobytes())
    return digest.hexdigest()
