"""What an INT8 cache of keys and values costs the demo model, and what it saves.

    python -m visistage.bench.kv_cache [--samples 1000]

Keys (after the rotary turn, as they are cached) and values are rounded to INT8 as they are written;
everything that reads the cache, selections included, reads what was rounded. All else is FP32. All
rows are rounded, the prefix's too: a cache is one tensor of one type. Static scales are the largest
value over other questions, under the same plan. Teacher-forced along the float cache's own answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor

from ..calib.samples import Sample, evaluation_samples, normalise_answer
from ..compile.checkpoint.checkpoint import open_checkpoint
from ..compile.export.texts import text_facts
from ..compile.planfile import resolve_plan
from ..graphs.chain.torch_reference import TorchExecutor
from ..graphs.modules.ops import Eager
from ..graphs.plan.plan import StagePlan
from ..runtime.text.sampling import eos_ids
from .fp16 import Staged
from .record import save

LEVELS = 127
"""Symmetric INT8: -127 to 127."""

SCALE_BYTES = 2
"""A scale that is stored with its row would be FP16."""

PLANS = ("dense", "visipruner")
FORMS = {
    "float": "",
    "layer": "one static scale per layer, for keys and for values",
    "head": "one static scale per layer and head, for keys and for values",
    "row": "one scale per layer, head and slot, taken from the row itself",
}


class ObservedCache(Eager):
    """Notes the largest key and value of each head, in all rows that are ever cached."""

    def __init__(self):
        self.largest: list[Tensor] = []  # of keys and of values: (G, 1, 1)

    def cached_attention(self, q, k, v, cache, view, gate, scales=None):
        """As its base."""
        found = [x.abs().amax((0, 2, 3))[:, None, None] for x in (k, v)]
        before = self.largest or found
        self.largest = [torch.maximum(a, b) for a, b in zip(before, found, strict=True)]
        return super().cached_attention(q, k, v, cache, view, gate, scales)


class FakeQuantCache(Eager):
    """Caches what is left of keys and values after INT8. scales: theirs; None: each row its own."""

    def __init__(self, scales: Sequence[Tensor] | None):
        self.scales = scales

    def cached_attention(self, q, k, v, cache, view, gate, scales=None):
        """As its base, over a rounded cache."""
        if self.scales is None:
            own = [x.abs().amax(-1, keepdim=True) / LEVELS for x in (k, v)]
        else:
            own = list(self.scales)
        k, v = (fake_quantised(x, scale) for x, scale in zip((k, v), own, strict=True))
        return super().cached_attention(q, k, v, cache, view, gate, scales)


def fake_quantised(x: Tensor, scale: Tensor) -> Tensor:
    """What INT8 makes of x (B, G, Q, d); scale: anything that broadcasts to it."""
    scale = scale.clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).round().clamp(-LEVELS, LEVELS) * scale


@dataclass(frozen=True)
class GreedyAnswer:
    """A greedy answer: its tokens up to the end, and the logits (T, V) they were chosen from."""

    tokens: tuple[int, ...]
    logits: Tensor


class Cached(Staged):
    """The model in FP32 torch, its cache as ``operators(layer)`` keep it."""

    def __init__(self, plan: StagePlan, operators: Callable[[int], Eager]):
        super().__init__("demo", plan, torch.float32)
        self.operators = {layer: operators(layer) for layer in range(plan.layers)}
        self.ends = frozenset(eos_ids(text_facts(self.checkpoint).generation))
        self.last: TorchExecutor | None = None

    def executor(self) -> TorchExecutor:
        """One whose layers cache as they are told."""
        self.last = super().executor()
        for stage in self.last.stages:
            for layer, block in stage.model.layers.items():
                block.self_attn.ops = self.operators[int(layer)]
        return self.last

    def hear(self, sample: Sample, new: int) -> GreedyAnswer:
        """Its own answer to ``sample``, of at most ``new`` tokens."""
        tokens, logits, _ = self.answer(sample.image, sample.prompt, new)
        count = next((i for i, token in enumerate(tokens, 1) if token in self.ends), new)
        return GreedyAnswer(tuple(tokens[:count]), logits[:count])

    def follow(self, sample: Sample, tokens: Sequence[int]) -> Tensor:
        """The logits (T, V) along given tokens."""
        return self.answer(sample.image, sample.prompt, len(tokens), tokens)[1]

    def cache_bytes(self, element_bytes: float, row_scale_bytes: int = 0) -> float:
        """What the last question's slots take, all stages; scales are stored per head and slot."""
        assert self.last is not None
        caches = [cache for stage in self.last.caches for pair in stage for cache in pair]
        return sum(
            cache.numel() * (element_bytes + row_scale_bytes / cache.shape[-1]) for cache in caches
        )


def compared(
    model: Cached, asked: Sequence[Sample], plain: Sequence[GreedyAnswer], new: int
) -> dict:
    """One form of the cache against the float one, ``plain``, over ``asked``."""
    decode = model.encoder.tokenizer.decode
    right = equal = agreed = 0
    apart: list[float] = []
    for sample, want in zip(asked, plain, strict=True):
        logits, tokens = model.follow(sample, want.tokens), want.tokens
        said = tuple(logits.argmax(-1).tolist())
        agreed += sum(a == b for a, b in zip(said, tokens, strict=True))
        if said != tokens:  # left to itself, it goes another way from there
            tokens = model.hear(sample, new).tokens
        equal += tokens == want.tokens
        text = decode(list(tokens), skip_special_tokens=True)
        right += normalise_answer(text) == normalise_answer(sample.answer)
        expected = want.logits.double().log_softmax(-1)
        log_ratio = expected - logits.double().log_softmax(-1)
        apart += (expected.exp() * log_ratio).sum(-1).tolist()
    return {
        "questions": len(asked),
        "tokens": len(apart),
        "accuracy": right / len(asked),
        "answer_agreement": equal / len(asked),
        "token_agreement": agreed / len(apart),
        "mean_kl_nats": sum(apart) / len(apart),
        "largest_kl_nats": max(apart),
    }


def largest(plan: StagePlan, asked: Sequence[Sample], new: int) -> Mapping[int, list[Tensor]]:
    """By layer, the largest key and value of each head (G, 1, 1) over ``asked``."""
    watched = {layer: ObservedCache() for layer in range(plan.layers)}
    plain, model = Cached(plan, lambda layer: Eager()), Cached(plan, watched.__getitem__)
    for sample in asked:  # along the answer, but not beyond its end
        model.follow(sample, plain.hear(sample, new).tokens)
    return {layer: one.largest for layer, one in watched.items()}


def operators(form: str, reach: Mapping[int, list[Tensor]]) -> Callable[[int], Eager]:
    """Who keeps each layer's cache, for one of ``FORMS``."""
    if form == "float":
        return lambda layer: Eager()
    if form == "row":
        return lambda layer: FakeQuantCache(None)
    if form == "layer":
        return lambda layer: FakeQuantCache([each.max() / LEVELS for each in reach[layer]])
    return lambda layer: FakeQuantCache([each / LEVELS for each in reach[layer]])


def measured(
    plan: StagePlan, asked: Sequence[Sample], other: Sequence[Sample], new: int
) -> list[dict[str, Any]]:
    """One row for each of ``FORMS``; static scales are from ``other``."""
    reach = largest(plan, other, new)
    reference = Cached(plan, operators("float", reach))
    plain = [reference.hear(sample, new) for sample in asked]
    rows: list[dict[str, Any]] = []
    for form, words in FORMS.items():
        model = Cached(plan, operators(form, reach))
        row = {"plan": plan.name, "cache": form, "scales": words}
        row |= compared(model, asked, plain, new)
        # The last question's: they differ by a few rows.
        if form == "float":
            row |= {"bytes_fp32": model.cache_bytes(4), "bytes_fp16": model.cache_bytes(2)}
        else:
            row["bytes"] = model.cache_bytes(1, SCALE_BYTES if form == "row" else 0)
        click.echo(row, err=True)
        rows.append(row)
    return rows


@click.command()
@click.option("--samples", default=1000, show_default=True)
@click.option("--calibration", default=64, show_default=True, help="Other questions, for scales.")
@click.option("--tokens", default=8, show_default=True, help="At most, of every answer.")
def main(samples: int, calibration: int, tokens: int) -> None:
    """Measure both plans with every form of the cache, and record it."""
    torch.set_num_threads(1)  # a model this small gains nothing from more
    config = open_checkpoint("demo").config
    every = evaluation_samples("demo", None, samples + calibration)
    rows = []
    for name in PLANS:
        plan = resolve_plan(name, config.text.layers, config.visual_tokens)
        rows += measured(plan, every[:samples], every[samples:], tokens)
    save("kv-cache-demo", f"python -m visistage.bench.kv_cache --samples {samples}", rows)


if __name__ == "__main__":
    main()
