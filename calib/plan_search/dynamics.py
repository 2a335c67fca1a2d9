"""Dynamics of the visual tokens in a dense model: when, how many and how long they matter.

A reading is the last prompt row's view of each visual token in every layer of a dense run:
how little its attention output turns without the token, and how large the token's part of it is.
Readings say when the published rules would fire at any threshold, so one run serves them all. The
model may be quantised or of any depth.

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
    blocks            [L] how far each layer turns rows, where layers may be left out: 1 - the mean
                      cosine of its input and output over the prompts' rows
    text_blind        [{shallow, tokens, answers, kl, ...}]
                                         measured: an ``agreement.Agreement`` for each, or []

    spread            {of, reached, p10, p50, p90, max, text, histogram}
                      of prompts, and how many of them got that far; a quantile among those that
                      never did is null, and ``text`` says so. histogram: [L] counts by
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
model, so no fixed thresholds would do."""


@dataclass(frozen=True)
class PromptReading:
    """One prompt. cosine, norm: (L, N) float32, N the visual tokens of all its images."""

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
    blocks: tuple[float, ...] = ()  # by layer; none where they were not read

    def __post_init__(self) -> None:
        if not self.readings or not any(reading.cosine.shape[1] for reading in self.readings):
            raise DataError(
                "found no prompt with an image, expected one or more: nothing is known about "
                "visual tokens without them. Add samples with readable images."
            )
        for index, reading in enumerate(self.readings):
            assert reading.cosine.shape == reading.norm.shape, (
                reading.cosine.shape,
                reading.norm.shape,
            )
            assert len(reading.cosine) == self.layers, (index, reading.cosine.shape)
            if not (np.isfinite(reading.cosine).all() and np.isfinite(reading.norm).all()):
                raise DataError(
                    f"prompt {index}: its readings are not finite, so the model overflows on it. "
                    "Take it out, or check the checkpoint: visistage verify."
                )
        assert 0 <= self.first < self.layers, (self.first, self.layers)

    @classmethod
    def of(cls, readings: Sequence[PromptReading], first: int | None = None) -> Dynamics:
        """Keep the prompts with visual tokens; ``first``: by default that of presets."""
        seen = tuple(reading for reading in readings if reading.cosine.shape[1])
        layers = len(seen[0].cosine) if seen else 1
        return cls(seen, min(3 * layers // 16 + 1, layers - 1) if first is None else first)

    @property
    def layers(self) -> int:
        """L."""
        return len(self.readings[0].cosine)

    @property
    def visual_tokens(self) -> tuple[int, int]:
        """Fewest and most of one prompt."""
        counts = [reading.cosine.shape[1] for reading in self.readings]
        return min(counts), max(counts)

    @cached_property
    def lowest(self) -> np.ndarray:
        """(P, L) float32: each prompt's least cosine in each layer."""
        return np.stack([reading.cosine.min(1) for reading in self.readings])

    @cached_property
    def influence(self) -> list[np.ndarray]:
        """For each prompt (L, N) float32: how far each token turns the output, squared.

        Norms of different layers do not compare, angles do: 2 (1 - cos) is the squared angle where
        it is small. Squares, because contributions of many tokens add up like a random walk: the
        sum of angles would let hundreds of tokens that do nothing outweigh a few that do.
        """
        return [np.clip(2 * (1 - reading.cosine), 0, None) for reading in self.readings]

    def contribution_thresholds(self) -> tuple[float, ...]:
        """Return thresholds for K, ascending: parts of a strong norm, and the published one."""
        strong = float(np.median([reading.norm[self.first :].max() for reading in self.readings]))
        rounded = {float(f"{share * strong:.2g}") for share in NORM_SHARES if strong > 0}
        return tuple(sorted(rounded | {PUBLISHED.contribution}))

    def decide(self, probe: Probe) -> list[Decision]:
        """Apply the published rules, with the numbers of ``probe``, to each prompt: t, K and e.

        Kept tokens are followed through the dense run, where the others are still present.
        """
        return [_decide(reading, probe) for reading in self.readings]

    def mass_of(self, decisions: Sequence[Decision]) -> list[float | None]:
        """Return each prompt's share of contributions in its trigger layer that is kept."""
        return [
            None
            if decision.norms is None
            else float(
                decision.norms[decision.kept].sum() / max(float(decision.norms.sum()), 1e-30)
            )
            for decision in decisions
        ]

    def mass(self, ranks: Sequence[int]) -> np.ndarray:
        """Return (P, L, R): the share of contributions in a layer that its top ``ranks`` hold."""
        out = np.empty((len(self.readings), self.layers, len(ranks)))
        for index, reading in enumerate(self.readings):
            sums = np.cumsum(-np.sort(-reading.norm.astype(np.float64), axis=1), axis=1)
            at = np.minimum(ranks, reading.norm.shape[1]) - 1
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
            **({"blocks": _rounded(np.array(self.blocks))} if self.blocks else {}),
            "suggested": dict(suggested or {}),
            "text_blind": list(text_blind),
        }

    def _tables(self) -> dict[str, list[dict[str, Any]]]:
        """``triggers``, ``kept`` and ``exits``."""
        triggers, kept, exits = [], [], []
        thresholds = self.contribution_thresholds()
        for cosine in COSINES:
            for contribution in thresholds:
                probe = Probe(self.first, cosine, contribution)
                decisions = self.decide(probe)
                if contribution == thresholds[0]:
                    t = spread([decision.trigger for decision in decisions], self.layers)
                    triggers.append({"cosine": cosine, "t": t})
                counts = [
                    None if decision.kept is None else len(decision.kept) for decision in decisions
                ]
                row = {"cosine": cosine, "contribution": contribution}
                kept.append(
                    {**row, "kept": spread(counts), "mass": spread(self.mass_of(decisions))}
                )
        for cosine in COSINES[1::2]:
            for exit_cosine in COSINES[1::2]:
                for consecutive in (False, True):
                    probe = Probe(
                        self.first, cosine, thresholds[0], True, exit_cosine, 2, consecutive
                    )
                    found = [decision.exit for decision in self.decide(probe)]
                    exits.append(
                        {
                            "cosine": cosine,
                            "contribution": thresholds[0],
                            "exit_cosine": exit_cosine,
                            "exit_layers": probe.exit_layers,
                            "rule": "consecutive" if consecutive else "cumulative",
                            "e": spread(found, self.layers),
                        }
                    )
        return {"triggers": triggers, "kept": kept, "exits": exits}


def ranks_up_to(tokens: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... and ``tokens``."""
    return tuple(sorted({2**i for i in range(max(tokens, 1).bit_length())} | {tokens}))


def quantile(values: Sequence[float | None], share: float) -> float | None:
    """Return the least value that ``share`` of all have reached; None where fewer reached any.

    None among ``values`` is censored: larger than everything that was seen.
    """
    ordered = sorted(math.inf if value is None else value for value in values)
    found = ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
    return None if math.isinf(found) else found


def spread(values: Sequence[float | None], layers: int | None = None) -> dict[str, Any]:
    """Return quantiles of values of which some are missing, as in the module's table.

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


def _decide(reading: PromptReading, probe: Probe) -> Decision:
    decision = Decision(probe)
    for layer in range(probe.first, len(reading.cosine)):
        if decision.settled:
            break
        cosine, norm = reading.cosine[layer], reading.norm[layer]
        if decision.kept is not None:
            cosine, norm = cosine[decision.kept], norm[decision.kept]
        decision.read(layer, cosine, norm)
    return decision


def _rounded(values: np.ndarray) -> list:
    """Return nested lists with six digits, which is more than FP32 readings can tell apart."""
    return np.round(values.astype(np.float64), 6).tolist()
