"""Routed depth against a Llama that is written out row by row: logits, gates, planted mistakes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from visistage.compile.planfile import plan_from_yaml, plan_to_yaml
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.chain.chain import Chain
from visistage.graphs.chain.rows import AppendedRows
from visistage.graphs.errors import ModelError, PlanError
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.routers.router import Rivals, make_router
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.plan.routing import ROUTERS, Routing, is_router
from visistage.graphs.plan.stages import Frozen
from visistage.graphs.presets.presets import parse_request, preset
from visistage.graphs.text_config import TextConfig
from visistage.tests.support.routed_llama import RIGHT, RoutedLlama, Rules, weights_of

LAYERS, N, START, LENGTH, STEPS = 5, 9, 4, 21, 8
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
TOLERANCE, MISTAKE = 1e-4, 5e-2  # of the logits' spread
SPANS = ((START, START + N),)


def planned(text, layers=LAYERS, tokens=N):
    name, options = parse_request(text)
    return preset(name, layers, tokens, **options)


def embeds(seed=1, length=LENGTH):
    return 0.7 * torch.randn(1, length, 64, generator=torch.Generator().manual_seed(seed))


def reference(kind, rows, weights, rules=RIGHT, tokens=None):
    model = RoutedLlama(CONFIG, weights, kind, 0.25, rules)
    return model.answer(rows[0], STEPS, tokens), model


def staged(plan, rows, weights, tokens, spans=SPANS):
    """Logits of the prompt's last row and of steps along ``tokens``, and the executor."""
    executor = chain.TorchExecutor(TextConfig.from_hf(CONFIG), plan, weights, 1)
    run = Chain(plan, executor)
    with torch.no_grad():
        logits = [run.prefill(chain.segments(rows, [spans])).logits[0]]
        for step, token in enumerate(tokens):
            at = np.full((1, 1), rows.shape[1] + step, np.int32)
            row = executor.embed(torch.tensor([[token]]))
            logits.append(run.decode(AppendedRows(False, row, at, at))[0])
    return torch.stack(logits), executor


def apart(found, wanted):
    """The largest difference, in the spread of what was wanted."""
    return float((found - wanted).abs().max() / wanted.std())


# --- the rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_routed_plan_equals_its_rule(kind):
    weights, rows = weights_of(CONFIG, kind), embeds()
    wanted, model = reference(kind, rows, weights)
    found, executor = staged(planned(kind), rows, weights, wanted[:-1].argmax(-1).tolist())
    assert len({*wanted.argmax(-1).tolist()}) > 3
    assert apart(found, wanted) < TOLERANCE
    gates = executor.notes.placed(LENGTH + STEPS)
    assert gates.keys() == model.gates.keys()
    for name, calls in model.gates.items():
        theirs = torch.cat(calls)
        assert torch.allclose(gates[name][0], theirs, atol=1e-4), name
        assert torch.equal(gates[name][0] != 0, theirs != 0), name
    skipped = torch.cat([torch.cat(calls) == 0 for calls in model.gates.values()])
    assert 0.15 < skipped.float().mean() < 0.85


WRONG = [
    *((kind, Rules(raw=False)) for kind in ROUTERS),
    *((kind, Rules(mlp_on_input=False)) for kind in ("skipgpt", "skipgpt-lrm", "mod")),
    *((kind, Rules(skipped_cached=False)) for kind in ROUTERS),
    *((kind, Rules(execute=1)) for kind in ("skipgpt", "skipgpt-lrm", "dllm")),
    ("mod", Rules(strict=False)),
]


@pytest.mark.parametrize(("kind", "rules"), WRONG)
def test_a_mistake_in_a_rule_is_noticed(kind, rules):
    weights, rows = weights_of(CONFIG, kind), embeds()
    tokens = reference(kind, rows, weights)[0][:-1].argmax(-1).tolist()
    found, _ = staged(planned(kind), rows, weights, tokens)
    assert apart(found, reference(kind, rows, weights, rules, tokens)[0]) > MISTAKE


def test_the_entry_point_takes_routers_by_their_names_and_tells_the_gates():
    weights, rows = weights_of(CONFIG, "skipgpt"), embeds()
    wanted, model = reference("skipgpt", rows, weights)
    done = chain.run(weights, CONFIG, rows, [SPANS], planned("skipgpt"), STEPS + 1)
    assert done.tokens[0].tolist() == wanted.argmax(-1).tolist()
    name = "model.layers.2.router_mlp"
    assert torch.equal(done.gates[name][0], torch.cat(model.gates[name]))
    assert len(done.gates) == 2 * LAYERS
    assert chain.run(weights, CONFIG, rows, [SPANS], planned("dense"), 1).gates == {}
    bare = {name: tensor for name, tensor in weights.items() if not is_router(name)}
    with pytest.raises(ModelError, match=r"lack model.layers.0.router_attention.* \(40 tensors"):
        chain.run(bare, CONFIG, rows, [SPANS], planned("skipgpt"))


@pytest.mark.parametrize(
    "text", ["skipgpt", "skipgpt:share=0.5", "dllm", "mod", "mod:form=capacity"]
)
def test_a_batch_equals_its_prompts_one_by_one(text):
    """Padding has no say: not in MoD's threshold, nor in the share of a call."""
    plan, kind = planned(text), text.partition(":")[0]
    weights, rows = weights_of(CONFIG, kind), torch.cat([embeds(1), embeds(2)])
    spans = [((3, 12),), ((2, 7), (9, 19))]
    both = chain.run(weights, CONFIG, rows, spans, plan, 6)
    for sample in range(2):
        one = slice(sample, sample + 1)
        alone = chain.run(weights, CONFIG, rows[one], spans[one], plan, 6)
        assert apart(both.logits[one], alone.logits) < TOLERANCE
        assert both.tokens[one].tolist() == alone.tokens.tolist()
        for name, gates in alone.gates.items():
            assert torch.allclose(both.gates[name][one], gates, atol=1e-4)


def test_exact_routers_go_with_every_edge_and_entry():
    """A plan with a selection: what is behind it runs by its gates, over the rows that are left."""
    weights, rows = weights_of(CONFIG, "skipgpt"), embeds()
    plan = replace(planned("visipruner:t=1,e=3,keep=4,shallow=1"), routing=Routing("skipgpt"))
    done = chain.run(weights, CONFIG, rows, [SPANS], plan, 4)
    assert len(done.kept[0]) == 4
    last = done.gates["model.layers.4.router_mlp"][0]
    assert not last[START : START + N].any()
    assert last[START + N :].any()
    dense = chain.run(weights, CONFIG, rows, [SPANS], replace(plan, routing=None), 4)
    assert apart(done.logits, dense.logits) > MISTAKE


# --- golden vectors -------------------------------------------------------------------------------


def waves(shape, frequency, phase):
    count = np.arange(np.prod(shape)) + 1.0
    return torch.tensor(np.sin(frequency * count + phase).reshape(shape), dtype=torch.float32)


def test_skipgpt_gates_are_those_of_the_golden_vector():
    router = make_router(Eager(), 8, Routing("skipgpt"))
    weights = {
        "hidden_layer.weight": waves((2, 8), 0.5, 0.2),
        "hidden_layer.bias": torch.tensor([0.1, -0.2]),
        "weight_predictor.weight": waves((2, 2), 1.1, 0.3),
        "weight_predictor.bias": torch.tensor([-4.5, 0.0]),
    }
    router.load_state_dict(weights)
    rows = 3 * waves((1, 3, 8), 0.8, 0.1)
    wanted = [[0.644338, -2.310087], [-0.37634, -1.851747], [-1.451881, -1.368771]]
    with torch.no_grad():
        assert torch.allclose(router.numbers(rows[0]), torch.tensor(wanted), atol=1e-5)
        assert router(rows, None, None).scale.flatten().tolist() == [1, 1, 0]
        mean = rows.pow(2).mean(-1, keepdim=True)
        normalised = rows * (1 + 0.1 * waves((8,), 0.9, 0.0)) / (mean + 1e-5).sqrt()
        assert router(normalised, None, None).scale.flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize("form", ["exact", "capacity"])
def test_mod_selects_the_rows_of_the_golden_vector(form):
    routing = Routing("mod", form, sparsity=0.25)
    router = make_router(Eager(), 1, routing)
    router.load_state_dict(
        {"weight_predictor.weight": torch.ones(1, 1), "weight_predictor.bias": torch.zeros(1)}
    )
    w = torch.tensor([0.3, -0.1, 0.9, 0.4, 0.2, 0.8])
    real = torch.ones(1, 6, dtype=torch.bool)
    with torch.no_grad():
        route = router(w[None, :, None], real, Rivals(routing, 8)(real))
    places = torch.arange(6) if route.picked is None else route.picked[0]
    chosen = dict(zip(places.tolist(), route.scale.flatten().tolist(), strict=True))
    assert {place for place, gate in chosen.items() if gate} == {2, 3, 5}  # k is 4
    assert chosen[2] == pytest.approx(0.9)


def test_mod_counts_as_its_authors_do():
    """In floating point: 0.1 of ten rows is 0.999..., and the least is one row."""
    allowed = Routing("mod", sparsity=0.9).allowed
    assert [allowed(rows) for rows in (1, 10, 20, 30, 35)] == [1, 1, 1, 2, 3]
    assert [Routing("mod", sparsity=0.25).allowed(rows) for rows in (1, 6, 8)] == [1, 4, 6]


# --- the capacity form ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["skipgpt:share=1", "skipgpt-lrm:share=1", "dllm:share=1"])
def test_with_room_for_all_rows_the_capacity_form_is_exact(text):
    kind = text.partition(":")[0]
    weights, rows = weights_of(CONFIG, kind), embeds()
    exact = staged(planned(kind), rows, weights, range(STEPS))[0]
    assert apart(staged(planned(text), rows, weights, range(STEPS))[0], exact) < TOLERANCE


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.9])
def test_mods_capacity_is_what_its_sparsity_leaves_and_so_exact(sparsity):
    weights, rows = weights_of(CONFIG, "mod"), embeds()
    exact, capacity = (
        staged(planned(f"mod:sparsity={sparsity},form={form}"), rows, weights, range(STEPS))[0]
        for form in ("exact", "capacity")
    )
    assert apart(capacity, exact) < TOLERANCE


def test_a_share_keeps_the_best_rows_and_the_last_one():
    weights, rows = weights_of(CONFIG, "skipgpt-lrm"), embeds()
    (logits, few), (exact, every) = (
        staged(planned(text), rows, weights, range(STEPS), spans=())
        for text in ("skipgpt-lrm:share=0.2", "skipgpt-lrm")
    )
    for name in ("model.layers.0.router_attention", "model.layers.0.router_mlp"):
        w, b = (weights[f"{name}.weight_predictor.{kind}"] for kind in ("weight", "bias"))
        numbers = rows[0] @ w.T + b
        ahead = numbers[:, 0] - numbers[:, 1]
        best = {*ahead[:-1].topk(4).indices.tolist(), LENGTH - 1}  # five of 21 rows
        ran, gates = (run.notes.placed(LENGTH + STEPS)[name][0] for run in (few, every))
        kept = ran[:LENGTH].nonzero().flatten().tolist()
        assert kept == sorted(place for place in best if gates[place])
        assert gates[:LENGTH].sum() > len(kept)
        assert torch.equal(ran[LENGTH:], gates[LENGTH:])  # rows that come alone
        assert 0 < ran[LENGTH:].sum() < STEPS
    assert apart(logits, exact) > MISTAKE


def test_of_equal_scores_the_first_rows_run():
    """As rows of equal words are in layer 0: graphs would choose otherwise than torch."""
    weights, name = weights_of(CONFIG, "skipgpt-lrm"), "model.layers.0.router_mlp"
    weights[f"{name}.weight_predictor.bias"] = torch.tensor([9.0, 0.0])  # all want to run
    rows = embeds()[:, :1].expand(-1, LENGTH, -1)
    _, few = staged(planned("skipgpt-lrm:share=0.2"), rows, weights, (), spans=())
    assert few.notes.placed(LENGTH)[name][0].nonzero().flatten().tolist() == [0, 1, 2, 3, 20]


# --- plans ----------------------------------------------------------------------------------------


def test_plans_without_routers_are_as_before():
    plan = planned("dense")
    assert "routing" not in plan.to_dict()
    routed = planned("skipgpt")
    assert routed.to_dict()["routing"] == {"kind": "skipgpt", "form": "exact"}
    assert (plan.is_dense, routed.is_dense) == (True, False)
    assert not routed.whole_prompt
    assert not routed.fixed_calls
    assert planned("skipgpt:share=0.5").fixed_calls
    assert planned("mod").whole_prompt
    assert [planned("mod").routing_of(layer) is None for layer in range(LAYERS)] == [
        True, False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["skipgpt", "dllm:share=0.4", "mod:sparsity=0.5,form=capacity"])
def test_routed_plans_are_written_and_read(text):
    plan = planned(text)
    assert StagePlan.from_dict(plan.to_dict()) == plan
    assert plan_from_yaml(plan_to_yaml(plan)) == plan
    assert plan.name == text.replace(":", "-").replace(",", "-").replace("=", "")


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (Routing("skipgtp"), "routing.kind: found 'skipgtp', expected one of skipgpt"),
        (Routing("skipgpt", "half"), "routing.form: found 'half', expected one of exact, capacity"),
        (Routing("skipgpt", "capacity"), "routing.share: found None, expected one in the capacity"),
        (Routing("skipgpt", share=0.5), "routing.share: found 0.5, expected one in the capacity"),
        (Routing("skipgpt", sparsity=0.5), "routing.sparsity: found 0.5, expected one for routers"),
        (Routing("mod"), "routing.sparsity: found None, expected one for routers that compare"),
        (Routing("mod", sparsity=1.5), "routing.sparsity: found 1.5, expected a number from 0"),
        (Routing("dllm", "capacity", 0.0), "routing.share: found 0.0, expected a share of at"),
    ],
)
def test_contradictions_are_refused(routing, message):
    with pytest.raises(PlanError) as error:
        replace(planned("dense"), routing=routing)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "routing", "message"),
    [
        ("fastv", Routing("mod", sparsity=0.2), "edges: found 1, expected none"),
        ("exit-only:e=2", Routing("dllm", "capacity", 0.5), "edges: found 1, expected none"),
    ],
)
def test_rows_that_compete_want_a_call_as_it_is(text, routing, message):
    with pytest.raises(PlanError) as error:
        replace(planned(text), routing=routing)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["skipgpt", "skipgpt-lrm", "dllm", "mod:sparsity=0.2"])
def test_layers_with_routers_are_neither_dropped_nor_frozen(kind):
    plan = planned(kind)
    for text in ("drop=1", "drop_attention=1", "drop_mlp=1"):
        joined = f"{kind},{text}" if ":" in kind else f"{kind}:{text}"
        with pytest.raises(
            PlanError, match=r"stages\[0\].drop_\w+: found \(1,\), expected none in"
        ):
            planned(joined)
    frozen = replace(plan.stages[0], frozen=(Frozen("visual", "mlp", (1,)),))
    with pytest.raises(
        PlanError, match=r"stages\[0\].frozen: found .*, expected none in a plan with"
    ):
        replace(plan, stages=(frozen,))


def test_rows_that_compete_want_dense_layers_and_mod_three_of_them():
    plan = planned("dense")
    blind = replace(plan.stages[0], modes=("text_blind", *plan.stages[0].modes[1:]))
    with pytest.raises(PlanError, match=r"stages\[0\].modes: found text_blind and others"):
        replace(plan, stages=(blind,), routing=Routing("mod", sparsity=0.2))
    with pytest.raises(PlanError, match="routing: found 2 layers, expected one with three"):
        planned("mod", layers=2)
    with pytest.raises(PlanError, match=r"found share=0\.5 beside form=exact"):
        planned("skipgpt:form=exact,share=0.5")
