"""A walk over INT8 caches reads what the model that ships would read of itself.

The judge is whole sequences in plain torch, one prompt at a time, without a cache: keys and values
are rounded where they arise, every token's contribution is formed, and taken away.
"""

import numpy as np
import pytest
import torch
from visistage.calib.run.layerwise import run_layerwise
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.quantize.fake_quantized import FakeQuantised
from visistage.compile.quantize.quantize import calibrated_cache_scales, quantised_rows
from visistage.graphs.chain.chain import Chain
from visistage.graphs.chain.torch_reference import TorchExecutor
from visistage.graphs.modules.quantized import cache_scale_names, round_caches
from visistage.graphs.quantization import parse_quant_config
from visistage.tests.support import calibrated, reference, toy
from visistage.tests.support.chain_judge import (
    LAYERS,
    PLANS,
    PREFIX,
    ChainJudge,
    RecordingObserver,
    layerwise,
    prompts,
)

HEADS, GROUPS, WIDTH = 4, 2, 16
SEEING = [place for place, one in enumerate(prompts()) if one.name != "blind"]


NEAR = 0.01
"""Of what rounding changes: here and there a number falls on the other side of a half."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint, its weights, the model with nothing but its caches rounded, and their scales.

    Scales are from other prompts, so some keys and values are beyond them.
    """
    folder = tmp_path_factory.mktemp("model") / "toy"
    toy.make_checkpoint(folder, layers=LAYERS, kv_heads=GROUPS, max_positions=256)
    checkpoint = open_checkpoint(str(folder))
    weights = {name: tensor.float() for name, tensor in checkpoint.state_dict().items()}
    ranges = calibrated.calibrate(folder, "dense", folder.parent / "ranges")
    fake_quantised = FakeQuantised(checkpoint, parse_quant_config("fp32:cache=int8"), ranges)
    return checkpoint, weights, fake_quantised, calibrated_cache_scales(ranges, half=False)


@pytest.fixture(scope="module")
def truth(model):
    """What ``by_hand`` reads over INT8 caches, and over those of floats."""
    *_, scales = model
    return judged(model, scales), judged(model, None)


def readings(checkpoint, rounded):
    """By place of the prompt: cosines and norms (2, L, N) of a dense walk."""
    seen = RecordingObserver(reads=True)
    run_layerwise(
        *(checkpoint, prompts(), PLANS["dense"], PREFIX),
        observer=seen,
        fake_quantised=rounded,
    )
    return seen.by_prompt()


def by_hand(weights, rows, visual, begin, scales):
    """Of one prompt (S, D): cosines and norms (2, L, N). scales: (2, L, G); None: float caches.

    The first ``begin`` rows are prefix: they see one another unrounded.
    """
    positions, found = torch.arange(len(rows)), []
    hidden = torch.ones(len(rows), len(rows)).triu(1).bool()
    for layer in range(LAYERS):
        w = {
            name.rsplit(".", 2)[1]: weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        x = reference.norm(rows, w["input_layernorm"], 1e-5)
        q, k, v = (
            (x @ w[name].T).view(len(x), -1, WIDTH).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (reference.rope(one, positions, 10000.0) for one in (q, k))
        kept = k, v
        if scales is not None:
            kept = [
                (one / scale[:, None, None]).round().clamp(-128, 127) * scale[:, None, None]
                for one, scale in zip((k, v), torch.from_numpy(scales[:, layer]), strict=True)
            ]
        out = []
        for keys, values in ((k, v), kept):
            keys, values = (one.repeat_interleave(HEADS // GROUPS, 0) for one in (keys, values))
            scores = (q @ keys.transpose(1, 2) / WIDTH**0.5).masked_fill(hidden, -torch.inf)
            attention = scores.softmax(-1)
            out.append((attention @ values).transpose(0, 1).reshape(len(rows), -1))
        parts = (attention[:, -1, :, None] * values).transpose(0, 1).reshape(len(rows), -1)
        seen = parts[visual]
        without = torch.cosine_similarity(out[1][-1:] - seen, out[1][-1:])
        found.append((without.numpy(), seen.norm(dim=1).numpy()))
        rows = rows + torch.cat((out[0][:begin], out[1][begin:])) @ w["o_proj"].T
        x = reference.norm(rows, w["post_attention_layernorm"], 1e-5)
        gate = x @ w["gate_proj"].T
        rows = rows + (gate * gate.sigmoid() * (x @ w["up_proj"].T)) @ w["down_proj"].T
    return np.stack(found).swapaxes(0, 1)


def judged(model, scales, prefix=PREFIX):
    """By place of the prompt, what ``by_hand`` reads; ``prefix``: what comes computed in float."""
    checkpoint, weights, *_ = model
    found = {}
    for place in SEEING:
        one = prompts()[place]
        segments = ChainJudge(checkpoint, weights, PLANS["dense"]).segments(one)
        begins = isinstance(one.parts[0], tuple) and one.parts[0][: len(prefix)] == prefix
        visual = torch.cat([torch.full((part.count,), part.visual) for part in segments])
        rows = torch.cat([part.rows[0] for part in segments])
        found[place] = by_hand(weights, rows, visual, len(prefix) if begins else 0, scales)
    return found


def apart(some, others):
    """(2,) mean distance of cosines, and of norms, over all prompts, layers and tokens."""
    assert some.keys() == others.keys()
    gaps = [np.abs(one - others[place]).reshape(2, -1) for place, one in some.items()]
    return np.concatenate(gaps, 1).mean(1)


def test_readings_over_int8_caches_are_those_of_plain_torch(model, truth):
    checkpoint, _, fake_quantised, _ = model
    want, floats = truth
    noise = apart(want, floats)
    assert (noise > 1e-3).all()
    assert (apart(readings(checkpoint, fake_quantised), want) < NEAR * noise).all()
    assert (apart(readings(checkpoint, None), floats) < NEAR * noise).all()


def test_a_prefix_is_computed_in_float_and_cached_rounded(model, truth):
    """One that is rounded as it runs reads otherwise, or the judge could not tell."""
    *_, scales = model
    want, floats = truth
    assert (apart(judged(model, scales, prefix=()), want) > 10 * NEAR * apart(want, floats)).all()


BUGS = {
    "the prefix under other layers' scales": (
        "prefix",
        lambda self, cache: quantised_rows(cache, self._cache_scales[:, ::-1].copy()),
    ),
    "keys read under the scales of values": (
        "scales_of",
        lambda self, layer, right=FakeQuantised.scales_of: right(self, layer)[::-1],
    ),
    "every layer under the scales of the first": (
        "load",
        lambda self, name, right=FakeQuantised.load: right(
            self, name.replace(name.split(".")[2], "0", 1) if "_scale" in name else name
        ),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_noticed(model, truth, monkeypatch, bug):
    checkpoint, _, fake_quantised, _ = model
    want, floats = truth
    monkeypatch.setattr(FakeQuantised, *BUGS[bug])
    assert (
        apart(readings(checkpoint, fake_quantised), want) > 10 * NEAR * apart(want, floats)
    ).all()


@pytest.mark.parametrize(
    "name", ["dense", "visipruner", "fastv", "v2drop", "sparsevlm", "hidrop-original", "depth"]
)
def test_logits_and_selections_are_those_of_a_chain_over_int8_caches(model, name):
    checkpoint, weights, fake_quantised, scales = model
    known = {
        of: torch.from_numpy(scale)
        for layer in range(LAYERS)
        for of, scale in zip(cache_scale_names(layer), scales[:, layer], strict=True)
    }
    plan, given = PLANS[name], prompts()
    over_integers, over_floats = (
        layerwise(checkpoint, given, plan, fake_quantised=one) for one in (fake_quantised, None)
    )
    for place, prompt in enumerate(given):
        judge = ChainJudge(checkpoint, weights, plan)
        judge.executor = TorchExecutor(
            *(checkpoint.config.text, plan, weights | known, 1),
            prepare=lambda stage: round_caches(stage, "int8"),
        )
        judge.chain = Chain(plan, judge.executor)
        expected, chosen = judge.run(prompt)
        logits = over_integers.logits[place]
        noise = (over_floats.logits[place] - expected).abs().mean()
        assert noise > 1e-3
        assert (logits - expected).abs().mean() < NEAR * noise, prompt.name
        kept = over_integers.kept[place]
        assert [one.tolist() for one in kept] == [one.tolist() for one in chosen]
