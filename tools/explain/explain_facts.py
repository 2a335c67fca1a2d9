"""The numbers of a page as plain data: what ``--json`` prints and the template draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import __version__
from ...graphs.plan.cost import Geometry, Load, cost_of, loads_as_run
from ..findings import AnswerPair, answer_words, changed_answers, slower
from .trace import LayerTrace, Trace

if TYPE_CHECKING:
    from ...graphs.bundle import Manifest
    from ...graphs.plan.stages import Stage

NEAR_PEAK = 0.8
"""Share of the largest part that counts as near it."""


@dataclass(frozen=True)
class Run:
    """A bundle and what it did with the question. ``name``: of the bundle's folder."""

    name: str
    manifest: Manifest
    trace: Trace


def explain_facts(question: str, run: Run, dense: Run | None, hint: str | None) -> dict[str, Any]:
    """Return everything that a page says.

    Args:
        question: as asked.
        run: of the bundle that is explained.
        dense: of the unpruned model; None where there is no bundle of it.
        hint: how to get one, where it is missing.
    """
    manifest, plan = run.manifest, run.manifest.plan
    kept, facts = run.trace.kept, run.trace.answer.plan
    phases = _phases(run)
    pair = dense and AnswerPair(question, run.trace.answer, dense.trace.answer)
    layers = [
        _layer(index, phases[index], run, dense) for index in range(manifest.config.text.layers)
    ]
    return {
        "question": question,
        "model": manifest.model,
        "bundle": run.name,
        "precision": manifest.precision,
        "target": manifest.target,
        "plan": {
            "name": plan.name,
            "kind": plan.kind,
            "note": plan.note,
            "calibrated": plan.calibrated,
            "is_dense": plan.is_dense,
            "trigger": facts.trigger,
            "exit": facts.exit,
            "called": asdict(facts.called) if facts.called else None,
            "deviations": list(facts.deviations),
        },
        "images": len(run.trace.answer.shown),
        "visual_tokens": facts.visual_tokens,
        "kept": None if kept is None else list(kept),
        "answer": _answer(run),
        "dense": dense and {"bundle": dense.name, **_answer(dense)},
        "dense_hint": hint,
        "same_answer": pair and pair.same,
        "findings": dense and pair and [*changed_answers([pair]), *_slower(run, dense)],
        "layers": layers,
        "stages": [_stage(index, stage, layers) for index, stage in enumerate(plan.stages)],
        "fusion": _fusion(run, dense),
        "given_up": dense and _given_up(dense.trace, run.trace, phases),
        "savings": _savings(run),
        "versions": {"visistage": __version__, **manifest.versions},
    }


def _slower(run: Run, dense: Run) -> list[str]:
    ours, theirs = run.trace.timing, dense.trace.timing
    return slower({"first token": (ours.first_token_ms, theirs.first_token_ms)})


def _answer(run: Run) -> dict[str, Any]:
    return {**answer_words(run.trace.answer), "timing": asdict(run.trace.timing)}


def _phases(run: Run) -> list[str]:
    """Name what each layer does with vision.

    ``blind``: text rows ignore it; ``all``: every token is there; ``kept``: some; ``none``.
    """
    modes = [mode for stage in run.manifest.plan.stages for mode in stage.modes]
    phases = []
    for mode, layer in zip(modes, run.trace.layers, strict=True):
        if not layer.present.any():
            phases.append("none")
        elif not layer.present.all():
            phases.append("kept")
        else:
            phases.append("all" if mode in ("dense", "sink_half") else "blind")
    return phases


def _layer(index: int, phase: str, run: Run, dense: Run | None) -> dict[str, Any]:
    plan, layer = run.manifest.plan, run.trace.layers[index]
    number = next(i for i, s in enumerate(plan.stages) if index < s.layers[1])
    stage = plan.stages[number]
    reference = (dense or run).trace.layers[index]
    return {
        "layer": index,
        "stage": number,
        "mode": stage.modes[index - stage.layers[0]],
        "phase": phase,
        "dropped": list(stage.dropped_of(index)),
        "visual_tokens": int(layer.present.sum()),
        "part": layer.part,
        "attention": layer.attention,
        "lowest_cosine": float(layer.cosines.min()),
        "dense_part": reference.part if dense else None,
        "dense_lowest_cosine": float(reference.cosines.min()) if dense else None,
        "kept_of_top": _kept_of_top(reference, run.trace.kept),
        "kept_mass": _kept_mass(reference, run.trace.kept) if dense else None,
    }


def _kept_of_top(layer: LayerTrace, kept: tuple[int, ...] | None) -> int | None:
    """Count the layer's strongest K tokens among the K kept; None where it is pruned."""
    if not kept or not layer.present.all():
        return None
    strongest = np.argsort(-layer.norms, kind="stable")[: len(kept)]
    return len(set(strongest.tolist()) & set(kept))


def _kept_mass(layer: LayerTrace, kept: tuple[int, ...] | None) -> float | None:
    """Return the kept tokens' share of the layer's contributions."""
    if kept is None or not layer.norms.sum():
        return None
    return float(layer.norms[list(kept)].sum() / layer.norms.sum())


def _stage(index: int, stage: Stage, layers: list[dict[str, Any]]) -> dict[str, Any]:
    own = layers[slice(*stage.layers)]
    return {
        "stage": index,
        "layers": list(stage.layers),
        "phases": list(dict.fromkeys(layer["phase"] for layer in own)),
        "blind_layers": sum(layer["phase"] == "blind" for layer in own),
        "visual_tokens": own[0]["visual_tokens"],
    }


def _fusion(run: Run, dense: Run | None) -> dict[str, Any]:
    """Find where vision weighs most, in the unpruned run where there is one.

    peak: the layer where its part is largest; near: others that come near it (``NEAR_PEAK``).
    """
    parts = [layer.part for layer in (dense or run).trace.layers]
    peak = int(np.argmax(parts))
    near = [i for i, part in enumerate(parts) if i != peak and part >= NEAR_PEAK * parts[peak]]
    return {"peak": peak, "part": parts[peak], "near": near}


def _given_up(dense: Trace, pruned: Trace, phases: list[str]) -> dict[str, float]:
    """Sort the unpruned model's visual contributions by what becomes of them under the plan.

    A layer's are counted relative to its output, so that layers compare. Shares that sum to 1:
    ``all`` and ``kept``: the plan has them too; ``discarded``: of tokens that the selection left
    out, while others stayed; ``blind``: in layers whose text ignores vision; ``none``: in layers
    without vision.
    """
    shares = dict.fromkeys(("all", "kept", "discarded", "blind", "none"), 0.0)
    for phase, full, own in zip(phases, dense.layers, pruned.layers, strict=True):
        relative = full.norms / max(full.output, 1e-12)
        if phase == "kept":
            shares["kept"] += float(relative[own.present].sum())
            shares["discarded"] += float(relative[~own.present].sum())
        else:
            shares[phase] += float(relative.sum())
    total = sum(shares.values())
    return {name: share / total if total else 0.0 for name, share in shares.items()}


def _savings(run: Run) -> dict[str, Any]:
    """Return FLOPs of visual rows and cache bytes of the prompt, as graphs run, beside dense."""
    manifest, facts = run.manifest, run.trace.answer.plan
    prefix = len(manifest.prefix.ids) if manifest.prefix else 0
    text = facts.prompt_rows - facts.visual_tokens - prefix
    geometry = Geometry.of(manifest.config.text)

    def kv_bytes(loads: Sequence[Load]) -> int:
        size = manifest.cache_element_bytes
        return round(cost_of(loads, geometry, prefix, text, kv_element_bytes=size).kv_bytes)

    return {
        "visual_flops": facts.visual_flops,
        "dense_visual_flops": facts.dense_visual_flops,
        "kv_bytes": kv_bytes(loads_as_run(manifest.plan, facts.visual_tokens_per_layer)),
        "dense_kv_bytes": kv_bytes([Load("dense", facts.visual_tokens)] * geometry.layers),
    }
