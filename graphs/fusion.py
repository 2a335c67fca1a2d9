"""Fusion of several layers of a vision encoder, as a checkpoint's ``config.json`` asks for it.

    E_D   external: states, or means of states, side by side in front of the projector
    I_D   internal: each state through a projector of its own, added to the visual rows at the
          input of a decoder layer

Sets are named for the 24 layers of CLIP ViT-L. In deeper encoders the same states are read, as the
released code does; in shallower ones states keep their place in proportion.

Source: docs/methods.md, "Layer fusion".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config_fields import count, reject_value, word
from .errors import PlanError
from .plan.plan import StagePlan
from .selectors.registry import ENTRY_SELECTORS

STRATEGY, SET = "layer_fusing_strategy", "layer_using_strategy"
"""Fields of ``config.json``, as released."""

SETS = {"18": (18,), "3-18": (3, 18), "3-18-23": (3, 18, 23)}
RANGES = ("former", "latter", "all")

PLAIN = (None, "plain")
"""Strategies that fuse nothing."""

NAMED_DEPTH = 24
"""Layers of the encoder that the sets are named for."""


@dataclass(frozen=True)
class Fusion:
    """Hidden states of the vision encoder that are read beside ``vision_feature_layer``.

    Attributes:
        means: (first, last) states whose mean stands before all others at the projector.
        injected: states that are added to the visual rows within the decoder
            (``TextConfig.inject`` says where), each through a projector of its own.
    """

    means: tuple[tuple[int, int], ...] = ()
    injected: tuple[int, ...] = ()

    def check(self, depth: int) -> None:
        """Refuse states that an encoder of ``depth`` layers has not."""
        for first, last in self.means:
            count("fusion.means", last, depth, least=count("fusion.means", first, depth))
        for state in self.injected:
            count("fusion.injected", state, depth)

    @property
    def states(self) -> tuple[int, ...]:
        """All of them, each once, in ascending order."""
        averaged = {state for first, last in self.means for state in range(first, last + 1)}
        return tuple(sorted({*averaged, *self.injected}))


NO_FUSION = Fusion()


@dataclass(frozen=True)
class ReadFusion:
    """Contents of a config: states before ``vision_feature_layer`` at the projector, the rest of
    ``Fusion``, and the decoder layers that its injected states go to.
    """

    features: tuple[int, ...] = ()
    fusion: Fusion = NO_FUSION
    layers: tuple[int, ...] = ()


def read_fusion(given: Mapping[str, Any], depth: int, layers: int) -> ReadFusion:
    """Return what ``config.json`` asks for, of an encoder of ``depth`` and a decoder of ``layers``.

    Raises:
        ModelError: a strategy or set that is not known, or that no code runs.
    """
    strategy, chosen = given.get(STRATEGY), str(given.get(SET))
    if strategy in PLAIN:
        return ReadFusion()
    if strategy in ("E_M", "I_M"):
        reject_value(STRATEGY, strategy, "E_D or I_D: modules of attention are not supported")
    word(STRATEGY, strategy, ("E_D", "I_D"))
    word(SET, chosen, (*SETS, *RANGES))
    shallow = min(depth, NAMED_DEPTH)
    half = shallow // 2
    former, latter = range(1, half + 1), range(half + 1, 2 * half + 1)
    ranges = {"former": (former,), "latter": (latter,), "all": (former, latter)}.get(chosen, ())
    states = [state for own in ranges for state in own]
    states += [max(1, state * shallow // NAMED_DEPTH) for state in SETS.get(chosen, ())]
    if strategy == "E_D":
        if chosen == "3-18":
            reject_value(SET, chosen, "3-18-23: its authors' E_D does not build 3-18")
        means = tuple((own[0], own[-1]) for own in ranges)
        # The last of 3-18-23 is the base, which vision_feature_layer names.
        return ReadFusion(tuple(() if ranges else states[:2]), Fusion(means=means))
    into = [state * layers // NAMED_DEPTH - 1 for state in SETS.get(chosen, ())]
    for own in ranges:
        into += range(half) if own is former else range(layers - half, layers)
    if len(set(into)) < len(into) or min(into) < 0:
        reject_value(
            SET, chosen, f"layers that a decoder of {layers} has once: it is added at {into}"
        )
    return ReadFusion(fusion=Fusion(injected=tuple(states)), layers=tuple(into))


def check_injected(layers: Sequence[int], plan: StagePlan) -> None:
    """Refuse a plan under which features would be lost that are added at the input of ``layers``.

    Raises:
        PlanError: visual rows come in behind one of them, or are merged before they come; or rows
            of a call come in the order of the prompt.
    """
    if not layers:
        return
    advice = "whose features are added within the decoder. Use another entry"
    if plan.entry and "features" in ENTRY_SELECTORS[plan.entry.selector].reads:
        raise PlanError(f"entry {plan.entry.text} merges rows of a model {advice}, such as scope")
    if plan.whole_prompt:
        raise PlanError(
            f"plan '{plan.name}' takes all rows of a prompt in one call, and this model adds "
            "features to visual rows, which come first in a call. Use another routing than mod"
        )
    seen = [stage.visual_tokens for stage in plan.stages for _ in range(stage.depth)]
    for layer in layers:
        if not seen[layer] and any(seen[layer:]):
            raise PlanError(
                f"plan '{plan.name}' has no visual rows in layer {layer}, and later again, of a "
                f"model {advice}, or layers without vision behind {max(layers)} only"
            )
