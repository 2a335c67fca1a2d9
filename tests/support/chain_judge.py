"""Prompts of every shape, and what layer-wise runs and caches are compared with: the chain."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from visistage.calib.run.layerwise import LayerObserver, run_layerwise
from visistage.calib.sample_prompts import SampleImage, SamplePrompt
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.chain.chain import Chain
from visistage.graphs.chain.enter import positioned
from visistage.graphs.chain.rows import AppendedRows
from visistage.graphs.families.family import in_one_run
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.vision import Vision
from visistage.graphs.presets.presets import preset

from . import toy

LAYERS, N = 8, 16
INT8_LEVELS = 127
PREFIX = (1, 7, 9, 11)

VISIPRUNER = {"shallow": 3, "t": 4, "e": 6, "keep": 5}
PLANS = {
    "dense": preset("dense", LAYERS, N),
    "visipruner": preset("visipruner", LAYERS, N, **VISIPRUNER),
    "visipruner-13b": preset("visipruner", LAYERS, N, **VISIPRUNER, template="13b"),
    "visipruner-renorm": preset("visipruner", LAYERS, N, **VISIPRUNER, norm="renorm"),
    "decode-sees": replace(
        preset("visipruner", LAYERS, N, **VISIPRUNER), decode_sees_shallow_vision=True
    ),
    "fastv": preset("fastv", LAYERS, N),
    "pyramiddrop": preset("pyramiddrop", LAYERS, N),
    "v2drop": preset("v2drop", LAYERS, N),
    "sparsevlm": preset("sparsevlm", LAYERS, N),
    "exit-only": preset("exit-only", LAYERS, N),
    "frozen": preset("embedlens", LAYERS, N, freeze=(0.0, 1.0, 2.5), method="vt", exit=LAYERS - 2),
    "vica": preset("vica", LAYERS, N, layers=(0, 1, 5), prefix="updated"),
    "late": preset("embedlens", LAYERS, N, entry="2", exit=6, freeze=(3.0, 3.5)),
    **{
        f"hidrop-{positions}": preset(
            "hidrop", LAYERS, N, entry=2, edges=(3, 5), keep=(9, 4), exit=7, positions=positions
        )
        for positions in ("original", "separate", "renumbered")
    },
    "depth": preset("fastv", LAYERS, N, k=3, drop=(1, 6), drop_attention=(5,), drop_mlp=(0,)),
}


def ids(count, seed):
    return tuple(np.random.default_rng(seed).integers(5, toy.VOCAB, count).tolist())


def pixels(seed):
    shown = np.random.default_rng(seed).standard_normal((1, 3, 32, 32)).astype(np.float32)
    return SampleImage(shown, in_one_run(16))


def prompts():
    """One picture, two apart, two side by side, none, another prefix; with answers and without."""
    return [
        SamplePrompt("one", (PREFIX, pixels(1), ids(9, 1)), ids(4, 2)),
        SamplePrompt("between", (PREFIX, pixels(2), ids(3, 3), pixels(3), ids(12, 4)), ids(1, 5)),
        SamplePrompt("beside", (PREFIX + ids(2, 6), pixels(4), pixels(5), ids(7, 7))),
        SamplePrompt("blind", (PREFIX + ids(6, 8),), ids(3, 9)),
        SamplePrompt("other prefix", ((1, 8, *ids(5, 10)), pixels(6), ids(5, 11)), ids(2, 12)),
        SamplePrompt("picture first", (pixels(7), ids(6, 13))),
    ]


def vision(checkpoint, weights, image):
    module = chain.load_weights(Vision(checkpoint.config, Eager()), weights)
    with torch.no_grad():
        return module(torch.from_numpy(image.pixels))


class ChainJudge:
    """One prompt through the chain, whole prompts with no prefix computed beforehand."""

    def __init__(self, checkpoint, weights, plan):
        self.checkpoint, self.weights = checkpoint, weights
        self.executor = chain.TorchExecutor(checkpoint.config.text, plan, weights, 1)
        self.chain = Chain(plan, self.executor)

    def segments(self, prompt, begin=0):
        at, out = begin, []
        for index, part in enumerate(prompt.parts):
            visual = isinstance(part, SampleImage)
            if visual:
                rows = vision(self.checkpoint, self.weights, part)
            else:
                part = part[begin:] if index == 0 else part
                if not part:
                    continue
                rows = self.executor.embed(torch.tensor([part]))
            out.append(self.segment(rows, at, visual))
            at += rows.shape[1]
        return out

    @staticmethod
    def segment(rows, at, visual=False):
        order = np.arange(at, at + rows.shape[1], dtype=np.int32)[None]
        return AppendedRows(visual, rows, order, order)

    @torch.no_grad()
    def run(self, prompt, begin=0):
        """Logits (1 + A, V) and the kept orders; the first ``begin`` rows are in the caches."""
        plan = self.chain.plan
        segments, lag = positioned(plan, self.segments(prompt, begin))
        done = self.chain.prefill(segments)
        logits, at = [done.logits], int(segments[-1].order[0, -1]) + 1
        for step, token in enumerate(prompt.answer_ids):
            row = self.segment(self.executor.embed(torch.tensor([[token]])), at + step)
            row = replace(row, positions=row.order - lag)
            logits.append(self.chain.decode(row))
        return torch.cat(logits), [order[0] for order in done.kept]

    @torch.no_grad()
    def hold(self, prefix):
        """Run a prefix through every stage, as decode steps that come before everything else."""
        self.chain.decode(self.segment(self.executor.embed(torch.tensor([prefix])), 0))


class ResultObserver(LayerObserver):
    """Keeps, by prompt, the logits, and the tokens of every selection."""

    def __init__(self, prompts):
        self.logits, self.kept = [], [[] for _ in range(prompts)]

    def selected(self, prompt, order):
        self.kept[prompt].append(order)

    def predicted(self, prompt, logits):
        assert prompt == len(self.logits)
        self.logits.append(logits)


def layerwise(checkpoint, prompts, plan, prefix=(), **options):
    """Run prompts layer by layer; the results have ``logits`` and ``kept``, by prompt."""
    results = ResultObserver(len(prompts))
    run_layerwise(checkpoint, prompts, plan, prefix, observer=results, **options)
    return results


class RecordingObserver(LayerObserver):
    """Keeps everything that an observer is given; readings by (prompt, layer)."""

    def __init__(self, reads=False):
        self.rows, self.kinds, self.weights = defaultdict(list), defaultdict(list), {}
        self.reads, self.readings = reads, {}

    def enter(self, kinds):
        self.waiting = iter(kinds)

    def call(self):
        self.current = next(self.waiting)

    def given(self, linear, rows, out):
        assert len(rows) == len(self.current)
        self.rows[linear].append(rows.clone())
        self.kinds[linear].append(self.current)

    def leave(self, weights):
        self.weights |= {name: weight.clone() for name, weight in weights.items()}

    def read(self, prompt, layer, cosine, norm):
        self.readings[prompt, layer] = cosine, norm

    def by_prompt(self):
        """By place of the prompt: cosines and norms (2, L, N)."""
        found = defaultdict(list)
        for (prompt, _), both in self.readings.items():
            found[prompt].append(both)
        return {prompt: np.stack(both, 1) for prompt, both in found.items()}

    def of_kind(self, linear, kind):
        return torch.cat(self.rows[linear])[np.concatenate(self.kinds[linear]) == kind]


class FakeQuantCache(Eager):
    """Caches what is left of keys and values after INT8. scales: theirs; None: each row its own."""

    def __init__(self, scales: Sequence[Tensor] | None):
        self.scales = scales

    def cached_attention(self, q, k, v, cache, view, gate, scales=None):
        """As its base, over a rounded cache."""
        if self.scales is None:
            own = [x.abs().amax(-1, keepdim=True) / INT8_LEVELS for x in (k, v)]
        else:
            own = list(self.scales)
        k, v = (fake_quantised(x, scale) for x, scale in zip((k, v), own, strict=True))
        return super().cached_attention(q, k, v, cache, view, gate, scales)


def fake_quantised(x: Tensor, scale: Tensor) -> Tensor:
    """What INT8 makes of x (B, G, Q, d); scale: anything that broadcasts to it."""
    scale = scale.clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).round().clamp(-INT8_LEVELS, INT8_LEVELS) * scale
