"""The goal of a choice of plan: a budget, and how plans are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...graphs.config import ModelConfig
from ...graphs.errors import PlanError, TargetError
from ...graphs.presets.presets import preset
from ...graphs.quantization import QUANTISED, QuantConfig, is_quantised, parse_quant_config
from ...graphs.selectors.registry import COUNTING_SELECTORS
from ...graphs.vision_contract import vision_spec
from ..evaluate import EVALUATE_MAX_TOKENS
from .agreement import Agreement

DEFAULT_LOSE = 0.01

SELECTORS = ("scope", "divprune", "cls")
"""Entry selectors that are tried by default; controls would only win by chance."""


@dataclass(frozen=True)
class SelectionGoal:
    """The budget, and how plans are measured.

    Attributes:
        lose: share of tokens that may disagree; or else
        cost: share of dense visual FLOPs that the plan may take.
        holdout: share of the samples that confirm what the others chose.
        most: plans that are measured.
        selectors: entry selectors that are tried; none: all visual tokens enter.
        max_tokens: longest answer that is compared.
        depth: whether plans with fewer layers are tried.
        quant_config: of the precision that the plan is for; None: FP32.

    Raises:
        PlanError: both a loss and a cost, neither, or no share; an unknown selector; or stages are
            quantised apart.
    """

    lose: float | None = None
    cost: float | None = None
    holdout: float = 0.33
    most: int = 16
    selectors: tuple[str, ...] = SELECTORS
    max_tokens: int = EVALUATE_MAX_TOKENS
    quant_config: QuantConfig | None = None
    depth: bool = False

    def __post_init__(self) -> None:
        if (self.lose is None) == (self.cost is None):
            raise PlanError(
                f"budget: found lose={self.lose} and cost={self.cost}, expected one of the two. "
                "Type --lose 1% or --cost 50%."
            )
        if self.lose is not None and not 0 <= self.lose < 1:
            raise PlanError(f"lose: found {self.lose:g}, expected 0 % to below 100 %. Type 1%.")
        if self.cost is not None and not 0 < self.cost <= 1:
            raise PlanError(f"cost: found {self.cost:g}, expected above 0 % to 100 %. Type 50%.")
        for name in self.selectors:
            if name not in COUNTING_SELECTORS:
                known = ", ".join(COUNTING_SELECTORS)
                raise PlanError(
                    f"selectors: found {name!r}, expected names among {known}. Type "
                    f"--selectors {','.join(SELECTORS)}, or --no-entry."
                )
        if self.quant_config is not None and self.quant_config.stages:
            raise PlanError(
                f"precision {self.quant_config.name} names stage{min(self.quant_config.stages)}, "
                "but which stages the plan has is yet to be chosen. Leave stages out, or choose "
                "without --precision and name stages when you build: visistage build"
            )

    @property
    def budget(self) -> dict[str, float]:
        """Plain JSON form of the loss or the cost."""
        limits = {"lose": self.lose, "cost": self.cost}
        return {name: share for name, share in limits.items() if share is not None}

    @property
    def precision(self) -> str:
        """Precision of the bundles that are measured."""
        return "fp32" if self.quant_config is None else self.quant_config.name

    def within(self, config: ModelConfig) -> SelectionGoal:
        """Return the goal without those default selectors that a model has nothing for.

        Raises:
            PlanError: for others.
        """
        offered = []
        for name in self.selectors:
            alone = preset(name, config.text.layers, config.visual_tokens, keep=1)
            try:
                vision_spec(config, alone, "float32")
                offered.append(name)
            except PlanError:
                if self.selectors != SELECTORS:
                    raise
        return replace(self, selectors=tuple(offered))

    def keeps(self, cost: float, measured: Agreement) -> bool:
        """Return whether a plan is within the budget."""
        if self.lose is None:
            assert self.cost is not None
            return cost <= self.cost + 1e-9
        return measured.tokens.share >= 1 - self.lose - 1e-9


def goal_or_plan(plan: str | None, **options: Any) -> str | SelectionGoal:
    """Return the plan that was named, or how to choose one.

    options: ``lose``, ``cost``, ``holdout``, ``most``, ``selectors`` ("scope,cls"), ``no_entry``,
    ``depth`` and ``precision``, None where not typed.

    Raises:
        PlanError: a plan and a goal, or a budget that is not valid.
        TargetError: a precision that plans are not measured in.
    """
    typed = {name: value for name, value in options.items() if value is not None}
    if plan is not None:
        if typed:
            first = next(iter(typed))
            option = {"most": "candidates", "no_entry": "no-entry"}.get(first, first)
            raise PlanError(
                f"found --{option} beside --plan {plan}, expected one of the two: a plan that is "
                f"named is not chosen. Leave out --{option} or --plan."
            )
        return plan
    if typed.pop("no_entry", False):
        if "selectors" in typed:
            raise PlanError(
                f"found --no-entry beside --selectors {typed['selectors']}, expected one of the "
                "two. Leave out --no-entry or --selectors."
            )
        typed["selectors"] = ()
    elif "selectors" in typed:
        names = (name.strip() for name in typed["selectors"].split(","))
        typed["selectors"] = tuple(dict.fromkeys(names))
    if "precision" in typed:
        typed["quant_config"] = _quant_config(typed.pop("precision"))
    if not {"lose", "cost"} & typed.keys():
        typed["lose"] = DEFAULT_LOSE
    return SelectionGoal(**typed)


def _quant_config(precision: str) -> QuantConfig | None:
    """Parse a precision; None means FP32."""
    if precision == "fp32":
        return None
    if not is_quantised(precision):
        raise TargetError(
            f"--precision {precision}: plans are measured on this machine's CPU, in fp32, "
            f"{', '.join(QUANTISED)}, or one of them with options, such as int8:vision=float. For "
            "the FP16 graphs of a GPU choose in fp32: leave --precision out"
        )
    return parse_quant_config(precision)
