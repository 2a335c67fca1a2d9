"""Static depth: against layers called one by one, and against layers whose updates are zero."""

from dataclasses import replace

import pytest
import torch
from visistage.compile.planfile import plan_from_yaml, plan_to_yaml
from visistage.graphs.chain import chain as host
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.contract import stage_spec
from visistage.graphs.errors import PlanError
from visistage.graphs.parts import stage_parts, whole_stages
from visistage.graphs.plan.call_cost import GraphCall, Sizes, decoder_work
from visistage.graphs.plan.cost import LLAVA_7B, Geometry, plan_cost
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.plan.stages import Frozen
from visistage.graphs.presets.presets import PRESETS, parse_request, preset

from ..support.cases import Case
from ..support.plain import Plain, answer

LAYERS, STEPS = 9, 8
DROPPED = {
    "drop=2-3": ({2, 3}, {2, 3}),
    "drop_attention=1-8": ({1, 8}, set()),
    "drop_mlp=0-8": (set(), {0, 8}),
    "drop=8,drop_attention=0,drop_mlp=4": ({0, 8}, {4, 8}),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("toy"), layers=LAYERS, kv_heads=2)


def planned(case, text):
    name, options = parse_request(text)
    return case.plan(name, **options)


@torch.no_grad()
def ours(case, plan, rows, spans, tokens):
    executor = chain.TorchExecutor(case.model.text, plan, case.weights, 1)
    runner = host.Chain(plan, executor)
    out, at = [runner.prefill(chain.segments(rows, spans)).logits[0]], rows.shape[1]
    for step, token in enumerate(tokens):
        place = torch.full((1, 1), at + step, dtype=torch.int32).numpy()
        row = executor.embed(torch.tensor([[token]]))
        out.append(runner.decode(host.AppendedRows(False, row, place, place))[0])
    return torch.stack(out)


@torch.no_grad()
def theirs(case, dropped, rows):
    """Layers without what is dropped, one after another; positions as ever."""
    plain, x, (attention, mlp) = Plain(case.weights, case.text), rows[0], dropped

    def gains(layer):
        return None if layer in attention else 1, None if layer in mlp else 1

    for layer in range(plain.depth):
        x = plain.layer(layer, x, torch.arange(len(x)), gains(layer))
    return answer(plain, plain.logits(x), rows.shape[1], STEPS, gains)


def differ(found, wanted):
    return float((found - wanted).abs().max() / wanted.std())


def prompt(case):
    ids, pixels = case.prompt(5)
    return case.embeds(ids, pixels)


@pytest.mark.parametrize("text", DROPPED)
def test_what_is_dropped_does_not_run(case, text):
    rows, spans = prompt(case)
    wanted, tokens = theirs(case, DROPPED[text], rows)
    plan = planned(case, f"depth:{text}")
    assert differ(ours(case, plan, rows, spans, tokens), wanted) < 1e-4
    assert plan == replace(planned(case, f"dense:{text}"), name=plan.name)


@pytest.mark.parametrize(
    "bug", ["drop=2-4", "drop=1-2", "drop=3-4", "drop_attention=2-3", "drop_mlp=2-3", "drop=3"]
)
def test_other_layers_or_halves_are_noticed(case, bug):
    rows, spans = prompt(case)
    wanted, tokens = theirs(case, DROPPED["drop=2-3"], rows)
    assert differ(ours(case, planned(case, f"depth:{bug}"), rows, spans, tokens), wanted) > 1e-2


PLANS = [
    *("fastv:k=3,r=0.5", "pyramiddrop", "exit-only:e=5", "visipruner:shallow=3,t=4,e=6,keep=4"),
    *("v2drop:before=3-5-6,keep=9-5-2", "visipruner-code:probe=3,cosine=0.999,contribution=0.01"),
    *("visipruner-adaptive:probe=3", "dense", "hidrop:entry=2,edges=4-6,keep=9-4,exit=9"),
]


@pytest.mark.parametrize("dropped", ["drop=0-7", "drop_attention=0-7,drop_mlp=5", "drop=8"])
@pytest.mark.parametrize("text", PLANS)
def test_every_plan_is_the_same_over_layers_that_add_nothing(case, text, dropped):
    """A half that is dropped is one whose update is zero."""
    rows, spans = prompt(case)
    joined = f"{text},{dropped}" if ":" in text else f"{text}:{dropped}"
    plan = planned(case, joined)
    silent = dict(case.weights)
    for part, layer in plan.dropped:
        name = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}[part]
        silent[f"model.layers.{layer}.{name}.weight"] = torch.zeros_like(
            case.weights[f"model.layers.{layer}.{name}.weight"]
        )
    whole = planned(case, text)
    if plan.kind == "static":  # modes of layers without attention say nothing
        first = replace(plan.stages[0], drop_attention=(), drop_mlp=())
        whole = replace(whole, stages=(first, *whole.stages[1:]))
    wanted = chain.run(silent, case.text, rows, spans, whole, STEPS)
    found = chain.run(case.weights, case.text, rows, spans, plan, STEPS)
    if plan.kind == "static":
        assert (found.kept, found.trigger, found.exit) == (wanted.kept, wanted.trigger, wanted.exit)
        assert differ(found.logits, wanted.logits) < 1e-4
        assert found.tokens.tolist() == wanted.tokens.tolist()
    assert found.logits.isfinite().all()


def test_layers_that_are_dropped_take_no_weights_and_no_cache(case):
    plan = planned(case, "exit-only:e=4,drop=2,drop_attention=3,drop_mlp=6")
    (first, last), text = whole_stages(plan), case.model.text
    names = [spec.name for spec in stage_spec(text, plan, first, "float32", False).inputs]
    assert [name for name in names if name.startswith("key.")] == ["key.0", "key.1", "key.4"]
    executor = chain.TorchExecutor(text, plan, case.weights, 1)
    weights = [name for stage in executor.stages for name in stage.state_dict()]
    assert not [name for name in weights if name.startswith("model.layers.2.")]
    assert [n for n in weights if n.startswith("model.layers.3.")] == [
        *(f"model.layers.3.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "model.layers.3.post_attention_layernorm.weight",
    ]
    assert "model.layers.6.mlp.up_proj.weight" not in weights
    assert len(executor.caches[0]) == 3
    spec = stage_spec(text, plan, last, "float32", False)
    assert next(out.shape[0] for out in spec.outputs if out.name == "queries") == 4


def test_parts_of_a_stage_begin_with_a_layer_that_attends(case):
    plan = planned(case, "dense:drop_attention=0-3-4")
    parts = stage_parts(plan, 0, [2, 3, 1])
    assert [part.layers for part in parts] == [(0, 5), (5, 8), (8, 9)]
    assert [len(part.attention_layers(plan)) for part in parts] == [2, 3, 1]


def test_the_cost_is_that_of_what_runs():
    whole, half = preset("dense", 32, 576), preset("dense", 32, 576, drop=tuple(range(16)))
    full, found = (plan_cost(plan, LLAVA_7B) for plan in (whole, half))
    head = LLAVA_7B.head_weights
    assert found.prefill_macs - head == pytest.approx((full.prefill_macs - head) / 2)
    assert (found.kv_bytes, found.visual_macs) == (full.kv_bytes / 2, full.visual_macs / 2)
    assert found.weight_bytes - 2 * head == (full.weight_bytes - 2 * head) / 2
    call = GraphCall("stage0", 7, 64)
    first, second = (
        decoder_work(call, LLAVA_7B, plan, Sizes.of("fp16")).nbytes for plan in (whole, half)
    )
    assert first - 2 * head == 2 * (second - 2 * head)


def test_the_cost_of_frozen_rows():
    """Frozen in both halves, visual rows cost keys and values alone."""
    geometry = Geometry(layers=2, hidden=64, intermediate=128, vocab=300)
    plan = preset("dense", 2, 16)
    frozen = tuple(Frozen("visual", part, (0, 1)) for part in ("attention", "mlp"))
    plan = replace(plan, stages=(replace(plan.stages[0], frozen=frozen),))
    cost = plan_cost(plan, geometry, 3, 5)
    assert cost.visual_macs == 2 * 2 * 64 * 16 * 64
    per_layer = 2 * 64 * 64 * (8 + 24) + 2 * 64 * 8 * 24 + 3 * 8 * 64 * 128
    assert cost.prefill_macs == 2 * per_layer + 64 * 300
    assert cost.kv_bytes == plan_cost(preset("dense", 2, 16), geometry, 3, 5).kv_bytes


UNROUTED = [name for name in sorted(PRESETS) if preset(name, 32, 576).routing is None]


@pytest.mark.parametrize("name", UNROUTED)
def test_every_preset_can_leave_layers_out(name):
    plan = preset(name, 32, 576, drop=(1, 20), drop_mlp=(5,))
    assert plan.dropped == (
        *(("attention", 1), ("mlp", 1), ("mlp", 5)),
        *(("attention", 20), ("mlp", 20)),
    )
    assert StagePlan.from_dict(plan.to_dict()) == plan
    assert plan_from_yaml(plan_to_yaml(plan)) == plan
    assert "drop" not in str(preset(name, 32, 576).to_dict()["stages"]) or name == "depth"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense:drop=9", "drop: found (9,), expected integers from 0 to 8, ascending"),
        ("dense:drop=3-2", "drop: found (3, 2), expected integers from 0 to 8, ascending"),
        ("fastv:k=3,drop_attention=2", "stages[0].drop_attention: found (2,), expected layer 2"),
        ("v2drop:before=3-5-6,keep=9-5-2,drop=2", "expected layer 2 with the attention"),
        (
            "hidrop:entry=1,edges=3-5,keep=9-4,exit=7,drop_attention=5",
            "stages[3].drop_attention: found (5,), expected layer 5 with the attention",
        ),
        ("exit-only:e=0,drop=0", "stages[0].drop_attention: found (0,), expected at most 0 of"),
    ],
)
def test_what_makes_no_sense_is_refused(case, text, message):
    with pytest.raises(PlanError) as error:
        planned(case, text)
    assert message in str(error.value)


def test_a_blind_mode_without_attention_is_refused(case):
    plan = planned(case, "visipruner:shallow=3,t=4,e=6,keep=4")
    first = replace(plan.stages[0], drop_attention=(1,))
    with pytest.raises(PlanError, match=r"stages\[0\].modes\[1\]: found 'text_blind'"):
        replace(plan, stages=(first, *plan.stages[1:]))
    frozen = replace(plan.stages[0], drop_mlp=(4,), frozen=(Frozen("visual", "mlp", (4,)),))
    with pytest.raises(PlanError, match=r"frozen\[0\].layers: found \(4,\), expected layers with"):
        replace(plan, stages=(frozen, *plan.stages[1:]))
