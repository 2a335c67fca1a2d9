"""What a dense model makes of its visual tokens, layer by layer: when, how many, how long.

A reading is the last prompt row's view of each visual token in every layer of a dense run:
how little its attention output turns without the token, and how large the token's part of it is.
Readings say when the published rules would fire at any threshold, so one run serves them all. The
model may be quantised or of any depth; the only thing that counts is who made the readings.

Two things differ from a pruned run, and every number here keeps that in mind: text still sees
vision in shallow layers, and after the trigger the other tokens are still there.

``to_dict`` is what a calibration keeps: bounded, whatever the number of prompts.

    prompts, layers, visual_tokens       how many; [fewest, most] of one prompt
    first                                the first layer that may trigger in the tables below
    quantiles                            Q shares, e.g. 0.5
    min_cosine        [L][Q]             over prompts, of each prompt's least cosine
    mass              {ranks: [R], median: [L][R], low: [L][R]}
                                         share of all contributions that the top K tokens hold
    triggers          [{cosine, t}]      t: a spread, see below
    kept              [{cosine, contribution, kept, mass}]
                                         kept, mass: a spread of K at t, and of the share it holds
    exits             [{cosine, contribution, exit_cosine, exit_layers, rule, e}]
    suggested         {plan, reason}     an adaptive plan with thresholds for this model, or {}
    text_blind        [{shallow, tokens, answers, kl, ...}]
                                         measured: an ``agreement.Agreement`` for each, or []

    spread            {of, reached, p10, p50, p90, max, text, histogram}
                      of prompts, and how many of them got that far; a quantile that lies among
                      those that never did is null, and ``text`` says so. histogram: [L] counts by
                      layer, where the values are layers.

Source: readings and rules: docs/methods.md, "VisiPruner: decision rules"; fixed numbers from
quantiles: "Dynamics and candidates".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...graphs.errors import DataError
from ...graphs.plan.probing import Decision
from ...graphs.plan.stages import Probe

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
COSINES = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.997, 0.999)
"""Thresholds that the tables show; 0.995 is the published one."""

PUBLISHED = Probe(first=0, cosine=0.995, contribution=0.2, exit_cosine=0.999)

NORM_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Contribution thresholds in parts of a strong token's norm: norms have another scale in each
model, so no fixed ladder would do."""


@dataclass(frozen=True)
class PromptReading:
    """One prompt. cosine, norm: (L, N) float32, N the visual tokens of all its pictures."""

    cosine: np.ndarray
    norm: np.ndarray


@dataclass(frozen=True)
class Dynamics:
    """The readings of some prompts, all of one model.

    first: the first layer that may trigger; text looks at vision in the layers before it, too, but
    not to any purpose (docs/methods.md, "VisiPruner: shallow layers").

    Raises:
        DataError: no reading with a visual token, or one that is not finite.
    """

    readings: tuple[PromptReading, ...]
    first: int

    def __post_init__(self) -> None:
        if not self.readings or not any(one.cosine.shape[1] for one in self.readings):
            raise DataError(
                "found no prompt with a picture, expected one or more: nothing is known about "
                "visual tokens without them. Add samples with readable pictures."
            )
        for index, one in enumerate(self.readings):
            assert one.cosine.shape == one.norm.shape, (one.cosine.shape, one.norm.shape)
            assert len(one.cosine) == self.layers, (index, one.cosine.shape)
            if not (np.isfinite(one.cosine).all() and np.isfinite(one.norm).all()):
                raise DataError(
                    f"prompt {index}: its readings are not finite, so the model overflows on it. "
                    "Take it out, or check the checkpoint: visistage verify."
                )
        assert 0 <= self.first < self.layers, (self.first, self.layers)

    @classmethod
    def of(cls, readings: Sequence[PromptReading], first: int | None = None) -> Dynamics:
        """Dynamics of prompts that have visual tokens; ``first``: as presets have it by default."""
        seen = tuple(one for one in readings if one.cosine.shape[1])
        layers = len(seen[0].cosine) if seen else 1
        return cls(seen, min(3 * layers // 16 + 1, layers - 1) if first is None else first)

    @property
    def layers(self) -> int:
        """L."""
        return len(self.readings[0].cosine)

    @property
    def visual_tokens(self) -> tuple[int, int]:
        """Fewest and most of one prompt."""
        counts = [one.cosine.shape[1] for one in self.readings]
        return min(counts), max(counts)

    @cached_property
    def lowest(self) -> np.ndarray:
        """(P, L) float32: each prompt's least cosine in each layer."""
        return np.stack([one.cosine.min(1) for one in self.readings])

    @cached_property
    def influence(self) -> list[np.ndarray]:
        """For each prompt (L, N) float32: how far each token turns the output, squared.

        Norms of different layers do not compare, angles do: 2 (1 - cos) is the squared angle where
        it is small. Squares, because contributions of many tokens add up like a random walk: the
        sum of angles would let hundreds of tokens that do nothing outweigh a few that do.
        """
        return [np.clip(2 * (1 - one.cosine), 0, None) for one in self.readings]

    def contribution_ladder(self) -> tuple[float, ...]:
        """Thresholds for K, ascending: parts of a strong token's norm, and the published one."""
        strong = float(np.median([one.norm[self.first :].max() for one in self.readings]))
        rounded = {float(f"{share * strong:.2g}") for share in NORM_SHARES if strong > 0}
        return tuple(sorted(rounded | {PUBLISHED.contribution}))

    def decide(self, probe: Probe) -> list[Decision]:
        """What the published rules make of each prompt, t, K and e, with the numbers of ``probe``.

        Kept tokens are followed through the dense run, where the others are still present.
        """
        return [_decide(one, probe) for one in self.readings]

    def mass_of(self, decisions: Sequence[Decision]) -> list[float | None]:
        """Share of all contributions in its trigger layer that each prompt's kept tokens hold."""
        return [
            None
            if one.norms is None
            else float(one.norms[one.kept].sum() / max(float(one.norms.sum()), 1e-30))
            for one in decisions
        ]

    def mass(self, ranks: Sequence[int]) -> np.ndarray:
        """(P, L, R): share of all contributions in a layer that its top ``ranks`` tokens hold."""
        out = np.empty((len(self.readings), self.layers, len(ranks)))
        for index, one in enumerate(self.readings):
            sums = np.cumsum(-np.sort(-one.norm.astype(np.float64), axis=1), axis=1)
            at = np.minimum(ranks, one.norm.shape[1]) - 1
            out[index] = sums[:, at] / np.maximum(sums[:, -1:], 1e-30)
        return out

    def to_dict(
        self,
        *,
        suggested: dict[str, str] | None = None,
        text_blind: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """Plain JSON form, described above; the two arguments are put into it as they are."""
        ranks = ranks_up_to(self.visual_tokens[1])
        mass = self.mass(ranks)
        return {
            "prompts": len(self.readings),
            "layers": self.layers,
            "visual_tokens": list(self.visual_tokens),
            "first": self.first,
            "quantiles": list(QUANTILES),
            "min_cosine": _rounded(np.quantile(self.lowest, QUANTILES, axis=0).T),
            "mass": {
                "ranks": list(ranks),
                "median": _rounded(np.quantile(mass, 0.5, axis=0)),
                "low": _rounded(np.quantile(mass, 0.1, axis=0)),
            },
            **self._tables(),
            "suggested": dict(suggested or {}),
            "text_blind": list(text_blind),
        }

    def _tables(self) -> dict[str, list[dict[str, Any]]]:
        """``triggers``, ``kept`` and ``exits``."""
        triggers, kept, exits = [], [], []
        ladder = self.contribution_ladder()
        for cosine in COSINES:
            for contribution in ladder:
                probe = Probe(self.first, cosine, contribution)
                decisions = self.decide(probe)
                if contribution == ladder[0]:
                    t = spread([one.trigger for one in decisions], self.layers)
                    triggers.append({"cosine": cosine, "t": t})
                counts = [None if one.kept is None else len(one.kept) for one in decisions]
                row = {"cosine": cosine, "contribution": contribution}
                kept.append(
                    {**row, "kept": spread(counts), "mass": spread(self.mass_of(decisions))}
                )
        for cosine in COSINES[1::2]:
            for exit_cosine in COSINES[1::2]:
                for consecutive in (False, True):
                    probe = Probe(self.first, cosine, ladder[0], True, exit_cosine, 2, consecutive)
                    found = [one.exit for one in self.decide(probe)]
                    exits.append(
                        {
                            "cosine": cosine,
                            "contribution": ladder[0],
                            "exit_cosine": exit_cosine,
                            "exit_layers": probe.exit_layers,
                            "rule": "consecutive" if consecutive else "cumulative",
                            "e": spread(found, self.layers),
                        }
                    )
        return {"triggers": triggers, "kept": kept, "exits": exits}


def ranks_up_to(tokens: int) -> tuple[int, ...]:
    """1, 2, 4, ... and ``tokens``."""
    return tuple(sorted({2**i for i in range(max(tokens, 1).bit_length())} | {tokens}))


def quantile(values: Sequence[float | None], share: float) -> float | None:
    """The least value that ``share`` of all have reached; None where fewer ever reached any.

    None among ``values`` is censored: larger than everything that was seen.
    """
    ordered = sorted(math.inf if value is None else value for value in values)
    found = ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
    return None if math.isinf(found) else found


def spread(values: Sequence[float | None], layers: int | None = None) -> dict[str, Any]:
    """Quantiles of values of which some are missing, as in the module's table.

    layers: where the values are layers, of so many.
    """
    of, known = len(values), [value for value in values if value is not None]
    points = {f"p{share}": quantile(values, share / 100) for share in (10, 50, 90)}
    out: dict[str, Any] = {
        "of": of,
        "reached": len(known),
        **points,
        "max": max(known, default=None),
    }
    beyond = "" if layers is None else f"> {layers - 1}"
    shown = [
        f"{name}: {(beyond or 'none') if at is None else f'{at:.4g}'}"
        for name, at in points.items()
    ]
    never = f" ({of - len(known)} of {of} never fired)" if len(known) < of else ""
    out["text"] = ", ".join(shown) + never
    if layers is not None:
        out["histogram"] = [known.count(layer) for layer in range(layers)]
    return out


def _decide(one: PromptReading, probe: Probe) -> Decision:
    decision = Decision(probe)
    for layer in range(probe.first, len(one.cosine)):
        if decision.settled:
            break
        cosine, norm = one.cosine[layer], one.norm[layer]
        if decision.kept is not None:
            cosine, norm = cosine[decision.kept], norm[decision.kept]
        decision.read(layer, cosine, norm)
    return decision


def _rounded(values: np.ndarray) -> list:
    """Nested lists with six digits, which is more than FP32 readings can tell apart."""
    return np.round(values.astype(np.float64), 6).tolist()
