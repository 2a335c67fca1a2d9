"""ViCA: chain and preset against whole sequences in plain torch, and against known numbers."""

import numpy as np
import pytest
import torch
from visistage.compile.planfile import plan_from_yaml, plan_to_yaml
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.chain.chain import Chain
from visistage.graphs.contract import serve_spec
from visistage.graphs.errors import PlanError
from visistage.graphs.modules.layer import ServingLayer
from visistage.graphs.parts import whole_stages
from visistage.graphs.plan.cost import LLAVA_7B, LLAVA_13B, dense_cost, plan_cost
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.plan.stages import Edge, Frozen, Stage
from visistage.graphs.presets.presets import parse_request, preset
from visistage.graphs.text_config import TextConfig

from ..support import neighbours
from ..support.neighbours import LAYERS, NEW, VISUAL, Prompt

SETS = [(0, 1, 4), (2, 3, 5), (0, 2, 7), (6,), tuple(range(LAYERS))]
RULES = ["frozen", "updated"]


def planned(layers, prefix, **options):
    return preset("vica", LAYERS, VISUAL, layers=layers, prefix=prefix, **options)


@pytest.mark.parametrize("prefix", RULES)
@pytest.mark.parametrize("layers", SETS, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_chain_is_vica(layers, prefix, seed):
    prompt = Prompt(seed)
    wanted = neighbours.generate(prompt, neighbours.vica(layers, prefix))
    neighbours.agree(prompt.run(planned(layers, prefix)), wanted)


@pytest.mark.parametrize(
    ("bug", "prefix"),
    [
        ("gated after the softmax", "frozen"),
        ("vision goes through MLPs", "frozen"),
        ("vision is updated by attention", "frozen"),
        ("the prefix's MLP is frozen", "frozen"),
        ("closed in text-only layers", "frozen"),
        ("gated after the softmax", "updated"),
        ("closed in text-only layers", "updated"),
    ],
)
def test_mistakes_are_noticed(bug, prefix):
    """Mistakes that a developer would make: docs/methods.md, "ViCA"."""
    layers = SETS[0]
    wrong = neighbours.vica(layers, prefix, bug)
    errors = [
        neighbours.error(
            Prompt(seed).run(planned(layers, prefix)), neighbours.generate(Prompt(seed), wrong)
        )
        for seed in range(3)
    ]
    assert max(errors) > 1e-2


@pytest.mark.parametrize("prefix", RULES)
def test_the_rules_for_the_prefix_are_told_apart(prefix):
    found = Prompt(1).run(planned(SETS[0], prefix))
    for other in RULES:
        judge = neighbours.generate(Prompt(1), neighbours.vica(SETS[0], other))
        assert (neighbours.error(found, judge) < 1e-4) == (prefix == other)


@pytest.mark.parametrize("layers", SETS[:3], ids=str)
def test_a_batch_equals_its_samples(layers):
    """Images elsewhere, two of them, or none."""
    plan, text = planned(layers, "frozen"), neighbours.TEXT
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 3 * VISUAL, text["hidden_size"], generator=generator)
    spans = [[(4, 4 + VISUAL)], [(2, 2 + VISUAL), (4 + VISUAL, 4 + 2 * VISUAL)], []]
    together = chain.run(neighbours.WEIGHTS, text, rows, spans, plan, NEW)
    for index, own in enumerate(spans):
        one = slice(index, index + 1)
        alone = chain.run(neighbours.WEIGHTS, text, rows[one], [own], plan, NEW)
        assert (alone.step_logits[0] - together.step_logits[index]).abs().max() < 1e-4


@pytest.mark.parametrize("prefix", RULES)
@pytest.mark.parametrize("layers", SETS[:3], ids=str)
def test_rows_that_serve_are_worth_rows_that_run(layers, prefix, monkeypatch):
    """The same plan, its visual rows taken through whole layers and frozen by gains."""
    prompt = Prompt(4)
    served = prompt.run(planned(layers, prefix))
    monkeypatch.setattr(Stage, "serves", False)
    masked = prompt.run(planned(layers, prefix))
    spread = served.step_logits.std()
    assert (served.step_logits - masked.step_logits).abs().max() < 1e-5 * spread
    monkeypatch.setattr(Stage, "masked", ())
    unfrozen = prompt.run(planned(layers, prefix))
    assert (served.step_logits - unfrozen.step_logits).abs().max() > 1e-2 * spread


@pytest.mark.parametrize("bug", ["where the text is", "one place on", "not normalised"])
def test_planted_mistakes_in_serving_are_noticed(bug, monkeypatch):
    serve = chain.TorchExecutor.serve

    def wrong(self, stage, rows, positions, write_index, inject):
        if bug == "where the text is":
            positions = positions - positions.min()
        rows = rows.roll(int(bug == "one place on"), 1)
        return serve(self, stage, rows, positions, write_index, inject)

    layers = SETS[0]
    wanted = neighbours.generate(Prompt(1), neighbours.vica(layers))
    monkeypatch.setattr(chain.TorchExecutor, "serve", wrong)
    if bug == "not normalised":
        raw = lambda self, rows, *turns: self.self_attn.cached(rows[0], *turns)  # noqa: E731
        monkeypatch.setattr(ServingLayer, "forward", raw)
    neighbours.differ(Prompt(1).run(planned(layers, "frozen")), wanted)


def test_rows_that_serve_are_chosen_by_what_text_sees_of_them():
    """A selection behind a stage that is served, and layers that run the rows again."""
    frozen = (Frozen("visual", "attention", (0, 1, 2)), Frozen("visual", "mlp", (0, 1, 2)))
    for score in ("attention", "value_norm", "next_attention"):
        first = Stage((0, 3), VISUAL, ("dense",) * 3, frozen=frozen)
        last = Stage((3, LAYERS), 4, ("dense",) * (LAYERS - 3))
        plan = StagePlan("made", LAYERS, VISUAL, (first, last), (Edge("select", score, 4),))
        served = Prompt(6).run(plan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stage, "serves", False)
            anew = StagePlan.from_dict(plan.to_dict())
            masked = Prompt(6).run(anew)
        assert served.kept == masked.kept
        spread = served.step_logits.std()
        assert (served.step_logits - masked.step_logits).abs().max() < 1e-5 * spread


def test_a_score_by_changes_of_rows_that_never_change_is_refused():
    frozen = (Frozen("visual", "attention", (0, 1)), Frozen("visual", "mlp", (0, 1)))
    first = Stage((0, 2), VISUAL, ("dense",) * 2, frozen=frozen)
    last = Stage((2, LAYERS), 4, ("dense",) * (LAYERS - 2))
    with pytest.raises(PlanError, match=r"stages\[0\].frozen: found all of them, expected visual"):
        StagePlan("made", LAYERS, VISUAL, (first, last), (Edge("select", "v2drop", 4),))


def test_without_an_image_it_is_the_model_itself():
    rows = Prompt(1).embeds[None]
    found, dense = (
        chain.run(neighbours.WEIGHTS, neighbours.TEXT, rows, [[]], plan, NEW)
        for plan in (planned(SETS[0], "frozen"), preset("dense", LAYERS, VISUAL))
    )
    assert (found.step_logits - dense.step_logits).abs().max() < 1e-4


# --- known numbers --------------------------------------------------------------------------------


def wave(shape, rate, start):
    count = np.arange(np.prod(shape)) + 1.0
    return torch.tensor(np.sin(rate * count + start).reshape(shape), dtype=torch.float32)


def after_attention(sees, prefix):
    """Rows 0-1 prefix, 2-6 visual, 7-8 text, behind the attention of layer 0 of two."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = TextConfig.from_hf({**neighbours.TEXT, **sizes, "num_hidden_layers": 2})
    plan = preset("vica", 2, 5, layers=(0,) if sees else (1,), prefix=prefix, drop_mlp=(0, 1))
    weights = {
        "model.embed_tokens.weight": torch.zeros(text.vocab, 8),
        "lm_head.weight": torch.zeros(text.vocab, 8),
        "model.norm.weight": torch.ones(8),
    }
    waves = {"q": (0.77, 0.1), "k": (0.23, 0.7), "v": (0.41, 0.3), "o": (0.19, 0.9)}
    for layer in range(2):
        own = f"model.layers.{layer}."
        weights[f"{own}input_layernorm.weight"] = 1 + 0.1 * wave((8,), 0.9, 0.0)
        for name, numbers in waves.items():
            weights[f"{own}self_attn.{name}_proj.weight"] = wave((8, 8), *numbers)
    rows = 2 * wave((9, 8), 0.31, 0.4)[None]
    runner = Chain(plan, chain.TorchExecutor(text, plan, weights, 1))
    with torch.no_grad():
        done = [runner.append(0, [part])[0] for part in chain.segments(rows, [[(2, 7)]])]
    return torch.cat([part.result.rows for part in done], 1)[0].numpy(), rows[0].numpy()


def test_rows_are_the_known_ones():
    seen, rows = after_attention(True, "frozen")
    known = [1.977805, 5.065635, 1.799894, -2.243349, -0.263607, 2.937087, 0.170096, -4.386512]
    assert np.abs(seen[8] - known).max() < 5e-6
    assert np.array_equal(seen[:7], rows[:7])  # prefix and vision are what they were
    alone, _ = after_attention(False, "frozen")
    known = [0.740354, -0.830408, 2.438608, 3.717555, -0.296998, -3.027207, -0.402181, 1.519668]
    assert np.abs(alone[8] - known).max() < 5e-6
    updated, _ = after_attention(True, "updated")
    known = [-1.340084, -0.913731, -0.017711, -1.322985, -3.108403, -2.456072, -0.74587, -1.02233]
    assert np.abs(updated[1] - known).max() < 5e-6


# --- plans ----------------------------------------------------------------------------------------


def test_published_sets_are_the_defaults():
    name, options = parse_request("vica:layers=0-1-7-8-9-10-11-14,prefix=frozen")
    plan, default = preset(name, 32, 576, **options), preset("vica", 32, 576)
    assert (plan.stages, plan.edges) == (default.stages, default.edges)
    runs = [(0, 2, 576), (2, 7, 0), (7, 12, 576), (12, 14, 0), (14, 15, 576), (15, 32, 0)]
    assert [(*stage.layers, stage.visual_tokens) for stage in plan.stages] == runs
    assert [edge.op for edge in plan.edges] == ["carry"] * 4 + ["drop"]
    assert plan.freezes("prefix")
    assert plan.blind_stages == 6
    larger = preset("vica", 40, 576)
    assert [stage.layers for stage in larger.stages if stage.visual_tokens] == [
        *((0, 1), (6, 7), (8, 11), (13, 15), (16, 17)),
    ]
    assert not larger.freezes("prefix")
    for made in (plan, larger, planned((2, 3), "updated", entry="scope-5", drop=(3,))):
        assert StagePlan.from_dict(made.to_dict()) == made
        assert plan_from_yaml(plan_to_yaml(made)) == made


def test_what_serves_has_a_graph_of_its_own():
    plan, text = planned((0, 1, 4), "frozen"), TextConfig.from_hf(neighbours.TEXT)
    assert [stage.serves for stage in plan.stages] == [True, False, True, False]
    assert [stage.gained_layers for stage in plan.stages] == [(0, 1), (2, 3), (4,), (5, 6, 7)]
    free = planned((0, 1, 4), "updated")
    assert not any(stage.gained_layers for stage in free.stages)
    first, _, third, _ = whole_stages(plan)
    assert (first.serves(plan), third.serves(plan)) == (True, True)
    spec = serve_spec(text, plan, first, "float16", cache="int8")
    assert [tensor.name for tensor in spec.inputs] == ["rows", "positions"]
    assert [tensor.name for tensor in spec.outputs] == [
        *("key.0.out", "value.0.out", "key.1.out", "value.1.out"),
    ]
    assert {tensor.dtype for tensor in spec.outputs} == {"int8"}
    assert not spec.follows_context
    dropped = planned((0, 1), "updated", drop_mlp=(1,))
    assert dropped.stages[0].serves
    assert not preset("embedlens", LAYERS, VISUAL, freeze=(0.0, 0.5)).stages[0].serves


def test_an_entry_comes_in_where_vision_is_first_seen():
    for text in ("scope-5", "scope-5-at2"):
        plan = planned((2, 3, 5), "frozen", entry=text)
        assert (plan.entry.keep, plan.entry.layer) == (5, 2)
        assert [stage.visual_tokens for stage in plan.stages] == [0, 5, 0, 5, 0]


def test_what_enters_serves():
    """Of an image some rows: those that do not enter are no keys of any layer."""
    prompt, chosen = Prompt(3), [1, 2, 5, 8, 11]
    plan = planned((2, 3, 5), "frozen", entry="scope-5")
    spans = [[(prompt.image.start, prompt.image.stop)]]
    rows = prompt.embeds[None]
    found = chain.run(neighbours.WEIGHTS, neighbours.TEXT, rows, spans, plan, NEW, [[chosen]])
    judge = neighbours.vica((2, 3, 5), "frozen")

    def few(rows, count, kept):
        enters = ~rows.visual
        enters[[prompt.image.start + at for at in chosen]] = True
        return judge(rows.only(enters), count, kept)

    neighbours.agree(found, neighbours.generate(prompt, few))


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (8, {}, "vica: found no layers and no prefix, expected what this model of 8 layers was"),
        (8, {"layers": (1, 2)}, "vica: found no prefix, expected what this model of 8 layers"),
        (8, {"prefix": "frozen"}, "found no layers, expected"),
        (8, {}, "for 32 layers: vica:layers=0-1-7-8-9-10-11-14,prefix=frozen; 40 layers: vica:la"),
        (32, {"layers": (0, 1, 14)}, "vica: found no prefix"),
        (32, {"layers": (3, 1), "prefix": "updated"}, "layers: found (3, 1), expected integers"),
        (32, {"layers": (32,), "prefix": "updated"}, "layers: found (32,), expected integers from"),
        (32, {"prefix": "cold"}, "prefix: found 'cold', expected one of frozen, updated"),
        (32, {"entry": "scope-9-at3"}, "entry: found 'scope-9-at3', expected no layer, or 0, the"),
    ],
)
def test_what_is_not_known_must_be_said(layers, options, message):
    with pytest.raises(PlanError) as error:
        preset("vica", layers, 576, **options)
    assert message in str(error.value)


def test_sizes_may_be_named():
    assert preset("dense", layers=32, visual_tokens=576) == preset("dense", 32, 576)


def test_nothing_but_keys_and_values_is_counted_of_vision():
    """Queries and MLPs of text rows, keys of all, and pairs of the two."""
    n, prefix, text = 576, 35, 40
    for geometry, frozen in ((LLAVA_7B, prefix), (LLAVA_13B, 0)):
        plan, d = preset("vica", geometry.layers, n), geometry.hidden
        cost = plan_cost(plan, geometry, prefix, text)
        assert cost.visual_macs == 8 * 2 * n * d * d
        x = prefix + text
        per_layer = 2 * d * d * (x - frozen + x) + 3 * x * d * geometry.intermediate
        wanted = geometry.layers * per_layer + 8 * 2 * d * d * n + d * geometry.vocab
        keys = geometry.layers * x + 8 * n
        wanted += 2 * d * (x - frozen) * keys
        assert cost.prefill_macs == pytest.approx(wanted)
        assert cost.prefill_macs < dense_cost(plan, geometry, prefix, text).prefill_macs / 5


def test_rows_may_be_frozen_by_hand():
    """The same plan without the preset, of stages and edges alone."""
    frozen = (Frozen("visual", "attention", (0, 1, 2)), Frozen("visual", "mlp", (0, 1, 2)))
    stages = (
        Stage((0, 3), VISUAL, ("dense",) * 3, frozen=frozen),
        Stage((3, LAYERS), 0, ("dense",) * (LAYERS - 3)),
    )
    plan = StagePlan("made", LAYERS, VISUAL, stages, (Edge("drop"),))
    judge = neighbours.vica((0, 1, 2), "updated")
    neighbours.agree(Prompt(5).run(plan), neighbours.generate(Prompt(5), judge))
