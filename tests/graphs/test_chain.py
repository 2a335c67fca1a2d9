"""torch stages == Hugging Face, and static VisiPruner == its independent reference."""

import dataclasses

import numpy as np
import pytest
import torch
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.chain.chain import Chain
from visistage.graphs.errors import PlanError, PromptError
from visistage.graphs.presets.presets import preset

from ..support import reference
from ..support.cases import ANSWER as NEW
from ..support.cases import Case

VARIANTS = {
    "plain": {},
    "gqa-tied": {"kv_heads": 2, "tied": True, "scale": 1.6},
    "new-layout": {"layout": "new"},
    "siglip": {"encoder": "siglip"},
    "two-features": {"feature_layer": [-3, -1]},
    "full-select": {"select": "full"},
    "linear-rope": {"rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "llama3-rope": {
        "rope": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "biases": {"attention_bias": True},
    "qwen3": {"model_type": "qwen3", "kv_heads": 2, "head_dim": 24, "scale": 1.6},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_equals_hugging_face(tmp_path, variant):
    case = Case(tmp_path, **VARIANTS[variant])
    ids, pixels = case.prompt(1)
    mine = case.run(ids, pixels, case.plan("dense"))
    theirs = case.logits(ids, pixels)
    assert (mine.logits - theirs).abs().max() < 1e-3 * theirs.std()
    assert mine.tokens.tolist() == case.generate(ids, pixels).tolist()
    assert mine.kept == [list(range(6, 6 + case.model.visual_tokens))]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Eight layers with grouped queries: room for every stage."""
    return Case(tmp_path_factory.mktemp("deep"), layers=8, kv_heads=2)


def test_planted_bugs_change_the_tokens(deep):
    """Another image, renumbered positions or one wrong layer must not go unnoticed."""
    ids, pixels = deep.prompt(2)
    right = deep.generate(ids, pixels)
    plan = deep.plan("dense")
    assert deep.run(ids, pixels, plan).tokens.tolist() == right.tolist()
    assert len(set(right[0].tolist())) >= 10
    assert deep.run(ids, pixels.flip(-1), plan).tokens.tolist() != right.tolist()

    rows, spans = deep.embeds(ids, pixels)
    segments = chain.segments(rows, spans)
    shifted = [dataclasses.replace(s, positions=s.positions + s.visual) for s in segments]
    executor = chain.TorchExecutor(deep.model.text, plan, deep.weights, 1)
    with torch.no_grad():
        moved = Chain(plan, executor).prefill(shifted).logits
    assert (moved - deep.logits(ids, pixels)).abs().max() > 0.1

    wrong = dict(deep.weights)
    name = "model.layers.5.mlp.down_proj.weight"
    wrong[name] = deep.weights["model.layers.4.mlp.down_proj.weight"]
    tokens = chain.run(wrong, deep.text, rows, spans, plan, NEW).tokens
    assert tokens.tolist() != right.tolist()


STATIC = [
    {"shallow": 1, "t": 4, "e": 6, "keep": 4},
    {"shallow": 2, "t": 4, "e": 6, "keep": 1},
    {"shallow": 3, "t": 3, "e": 5, "keep": 7},
    {"shallow": False, "t": 2, "e": 4, "keep": 5},
    {"shallow": 2, "t": 5, "e": 7, "keep": 3},
]


@pytest.mark.parametrize("options", STATIC, ids=str)
@pytest.mark.parametrize("seed", [3, 4])
def test_static_plan_equals_the_reference(deep, options, seed):
    ids, pixels = deep.prompt(seed)
    rows, spans = deep.embeds(ids, pixels)
    mine = chain.run(deep.weights, deep.text, rows, spans, deep.plan("visipruner", **options), NEW)
    visual = torch.zeros(ids.shape[1], dtype=torch.bool)
    visual[spans[0][0][0] : spans[0][0][1]] = True
    method = reference.Static(int(options["shallow"]), options["t"], options["e"], options["keep"])
    logits, kept, tokens = reference.generate(deep.weights, deep.text, rows[0], visual, method, NEW)
    assert (mine.logits[0] - logits).abs().max() < 1e-4 * max(1.0, float(logits.std()))
    assert mine.kept == [kept.tolist()]
    assert mine.tokens[0].tolist() == tokens
    assert (mine.trigger, mine.exit) == (options["t"], options["e"])


VARIATIONS = [
    ({"template": "13b"}, {"template": "13b"}),
    ({"norm": "renorm"}, {"renorm": True}),
    ({"norm": "renorm", "template": "13b"}, {"renorm": True, "template": "13b"}),
]


@pytest.mark.parametrize(("options", "expected"), VARIATIONS, ids=str)
def test_variations_of_the_shallow_layers_equal_the_reference(deep, options, expected):
    """The 13B rule of layer 0, and masks before the softmax (docs/methods.md, "VisiPruner: shallow
    layers" and "Gated and renormalised masks")."""
    base = {"shallow": 3, "t": 4, "e": 6, "keep": 4}
    ids, pixels = deep.prompt(10)
    rows, spans = deep.embeds(ids, pixels)
    mine = chain.run(
        deep.weights, deep.text, rows, spans, deep.plan("visipruner", **base, **options), 12
    )
    visual = torch.zeros(ids.shape[1], dtype=torch.bool)
    visual[spans[0][0][0] : spans[0][0][1]] = True
    plain = reference.Static(3, 4, 6, 4)
    method = dataclasses.replace(plain, **expected)
    logits, kept, tokens = reference.generate(deep.weights, deep.text, rows[0], visual, method, 12)
    assert (mine.logits[0] - logits).abs().max() < 1e-3
    assert mine.kept == [kept.tolist()]
    assert mine.tokens[0].tolist() == tokens
    other = reference.forward(deep.weights, deep.text, rows[0], visual, plain)[0]
    assert (other - logits).abs().max() > 1e-2  # the variation is one


def test_decoding_may_see_shallow_vision(deep):
    """Gates open in decode steps: the first token is the same, the later ones are the model's."""
    ids, pixels = deep.prompt(11)
    rows, spans = deep.embeds(ids, pixels)
    blind = deep.plan("visipruner", shallow=3, t=4, e=6, keep=4)
    seeing = dataclasses.replace(blind, decode_sees_shallow_vision=True)
    visual = torch.zeros(ids.shape[1], dtype=torch.bool)
    visual[spans[0][0][0] : spans[0][0][1]] = True
    results = {}
    for plan in (blind, seeing):
        mine = chain.run(deep.weights, deep.text, rows, spans, plan, 16)
        method = reference.Static(3, 4, 6, 4, decode_sees=plan is seeing)
        _, _, tokens = reference.generate(deep.weights, deep.text, rows[0], visual, method, 16)
        assert mine.tokens[0].tolist() == tokens
        results[plan is seeing] = tokens
    assert results[True][0] == results[False][0]
    assert results[True] != results[False]


def test_the_reference_notices_each_part_of_the_method(deep):
    """Mutations of the method change the reference's answer: it is a judge, not a rubber stamp."""
    ids, pixels = deep.prompt(5)
    rows, spans = deep.embeds(ids, pixels)
    visual = torch.zeros(ids.shape[1], dtype=torch.bool)
    visual[spans[0][0][0] : spans[0][0][1]] = True
    base = reference.Static(2, 4, 6, 4)

    def logits(method):
        return reference.forward(deep.weights, deep.text, rows[0], visual, method)[0]

    right = logits(base)
    assert (logits(None) - deep.logits(ids, pixels)[0]).abs().max() < 1e-3
    for change in ({"shallow": 1}, {"trigger": 3}, {"exit": 5}, {"keep": 3}):
        assert (logits(dataclasses.replace(base, **change)) - right).abs().max() > 1e-3, change


def test_keeping_every_token_equals_dense(deep):
    ids, pixels = deep.prompt(6)
    everything = deep.plan("visipruner", shallow=False, t=3, e=7, keep=deep.model.visual_tokens)
    dense = deep.run(ids, pixels, deep.plan("dense"))
    kept = deep.run(ids, pixels, everything)
    assert (kept.logits - dense.logits).abs().max() < 1e-4
    assert kept.tokens.tolist() == dense.tokens.tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dense", {}),
        ("visipruner", {"shallow": 2, "t": 4, "e": 6, "keep": 4}),
        ("fastv", {}),
        ("pyramiddrop", {}),
        ("v2drop", {}),
        ("sparsevlm", {}),
        ("exit-only", {"e": 4}),
    ],
)
def test_a_batch_equals_its_samples(deep, name, options):
    """Samples of one batch may have their image elsewhere, two of them, or none."""
    plan = deep.plan(name, **options)
    count = deep.model.visual_tokens
    length = 2 * count + 12
    rows = torch.randn(3, length, 64, generator=torch.Generator().manual_seed(7)) * 0.3
    spans = [[(4, 4 + count)], [(2, 2 + count), (5 + count, 5 + 2 * count)], []]
    together = chain.run(deep.weights, deep.text, rows, spans, plan, 12)
    for index in range(3):
        alone = chain.run(
            deep.weights, deep.text, rows[index : index + 1], spans[index : index + 1], plan, 12
        )
        assert (together.logits[index] - alone.logits[0]).abs().max() < 1e-3
        assert together.tokens[index].tolist() == alone.tokens[0].tolist()
        assert together.kept[index] == alone.kept[0]


def test_fastv_scores_by_mean_attention(deep):
    ids, pixels = deep.prompt(8)
    rows, spans = deep.embeds(ids, pixels)
    plan = deep.plan("fastv", k=3, r=0.75)
    mine = chain.run(deep.weights, deep.text, rows, spans, plan, 8)
    visual = torch.zeros(ids.shape[1], dtype=torch.bool)
    visual[spans[0][0][0] : spans[0][0][1]] = True
    method = reference.Static(0, 2, 7, plan.keep, score="attention")
    logits, kept, tokens = reference.generate(deep.weights, deep.text, rows[0], visual, method, 8)
    assert mine.kept == [kept.tolist()]
    assert (mine.logits[0] - logits).abs().max() < 1e-3
    assert mine.tokens[0].tolist() == tokens


def test_fewer_rows_than_a_selection_keeps_are_all_kept(deep):
    """In a batch a short image is filled up to the longest with rows that are chosen last."""
    ids, pixels = deep.prompt(2)
    rows, ((span,),) = deep.embeds(ids, pixels)
    short = (span[0], span[0] + 4)
    five, four, three = (
        deep.plan("visipruner", shallow=2, t=4, e=6, keep=keep) for keep in (5, 4, 3)
    )
    mine = chain.run(deep.weights, deep.text, rows, [[short]], five, 4)
    exact = chain.run(deep.weights, deep.text, rows, [[short]], four, 4)
    assert mine.kept == exact.kept == [list(range(*short))]
    assert (mine.step_logits - exact.step_logits).abs().max() < 1e-4
    fewer = chain.run(deep.weights, deep.text, rows, [[short]], three, 4)
    assert (mine.logits - fewer.logits).abs().max() > 1e-3
    both = chain.run(deep.weights, deep.text, rows.repeat(2, 1, 1), [[short], [span]], five, 4)
    assert both.kept[0] == mine.kept[0]
    assert (both.step_logits[0] - mine.step_logits[0]).abs().max() < 1e-4


def test_misfits_are_refused(deep):
    rows = torch.zeros(1, 40, 64)
    with pytest.raises(PlanError, match="is for 4 layers, the model has 8"):
        chain.run(deep.weights, deep.text, rows, [[(2, 18)]], preset("dense", 4, 16))
    for spans in ([[(2, 40)]], [[(5, 5)]], [[(2, 18), (10, 30)]], [[(-1, 3)]]):
        with pytest.raises(PromptError, match="spans"):
            chain.run(deep.weights, deep.text, rows, spans, deep.plan("dense"))


def test_spare_slots_change_nothing(deep):
    """Contents of slots that no row may see (here huge numbers) must not leak."""
    ids, pixels = deep.prompt(9)
    rows, spans = deep.embeds(ids, pixels)
    plan = deep.plan("visipruner", shallow=2, t=4, e=6, keep=4)
    right = chain.run(deep.weights, deep.text, rows, spans, plan).logits

    class Spare(chain.TorchExecutor):
        def ensure_slots(self, stage, slots):
            size = super().ensure_slots(stage, slots + 5)
            for pair in self.caches[stage]:
                for cache in pair:
                    cache[:, :, -5:] = 1e4
            return size

    executor = Spare(deep.model.text, plan, deep.weights, 1)
    with torch.no_grad():
        done = Chain(plan, executor).prefill(chain.segments(rows, spans))
    assert np.allclose(done.logits.numpy(), right.numpy(), atol=1e-4)
