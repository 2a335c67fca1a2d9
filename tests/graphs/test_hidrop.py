"""HiDrop: chain and preset against whole sequences in plain torch, and against known numbers."""

import numpy as np
import pytest
import torch
from visistage.graphs.caches import ahead_of, part_caches
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.contract import stage_spec
from visistage.graphs.errors import PlanError
from visistage.graphs.modules.layer import Ahead
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.rope import frequencies, turn
from visistage.graphs.modules.select import Selector
from visistage.graphs.parts import whole_stages
from visistage.graphs.plan.call_cost import COUNTS, GraphCall, decoder_work
from visistage.graphs.plan.cost import LLAVA_7B, Geometry, plan_cost
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.plan.stages import Edge
from visistage.graphs.presets.matching import matched_plan
from visistage.graphs.presets.presets import parse_request, preset
from visistage.graphs.text_config import TextConfig

from ..support import neighbours
from ..support.neighbours import LAYERS, NEW, VISUAL, Prompt

SCHEDULES = [
    (2, (4, 6), (5, 2), 7),
    (1, (2, 3, 5), (9, 4, 1), 6),
    (0, (3,), (6,), LAYERS),
]
VARIANTS = ["original", "separate", "renumbered"]


def planned(entry, edges, keep, exit_, positions="original"):
    options = {"entry": entry, "edges": edges, "keep": keep, "exit": exit_}
    return preset("hidrop", LAYERS, VISUAL, **options, positions=positions)


@pytest.mark.parametrize("positions", VARIANTS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_chain_is_hidrop(schedule, positions, seed):
    prompt = Prompt(seed)
    wanted = neighbours.generate(prompt, neighbours.hidrop(*schedule, positions))
    found = prompt.run(planned(*schedule, positions))
    neighbours.agree(found, wanted)
    assert [len(kept) for kept in found.kept_at_edges[0]] == list(schedule[2])


@pytest.mark.parametrize(
    "bug",
    [
        "the layer before",
        "softmax over vision",
        "edges one later",
        "conditioned rows",
        "no hole",
        "sorted by score",
        "exit one later",
        "decoded behind the text",
    ],
)
def test_mistakes_are_noticed(bug):
    """Mistakes that a developer would make: docs/methods.md, "HiDrop"."""
    schedule = SCHEDULES[0]
    found = [Prompt(seed).run(planned(*schedule)) for seed in range(4)]
    wrong = neighbours.hidrop(*schedule, bug=bug)
    errors = [
        neighbours.error(one, neighbours.generate(Prompt(seed), wrong))
        for seed, one in enumerate(found)
    ]
    assert max(errors) > 1e-2


@pytest.mark.parametrize("other", VARIANTS)
@pytest.mark.parametrize("positions", VARIANTS)
def test_variants_of_positions_are_told_apart(positions, other):
    found = Prompt(1).run(planned(*SCHEDULES[0], positions))
    judge = neighbours.generate(Prompt(1), neighbours.hidrop(*SCHEDULES[0], other))
    assert (neighbours.error(found, judge) < 1e-4) == (positions == other)


@pytest.mark.parametrize("positions", VARIANTS)
def test_a_batch_equals_its_samples(positions):
    """Images elsewhere, two of them, or none."""
    plan, text = planned(*SCHEDULES[0], positions), neighbours.TEXT
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 3 * VISUAL, text["hidden_size"], generator=generator)
    spans = [[(4, 4 + VISUAL)], [(2, 2 + VISUAL), (4 + VISUAL, 4 + 2 * VISUAL)], []]
    together = chain.run(neighbours.WEIGHTS, text, rows, spans, plan, NEW)
    for index, own in enumerate(spans):
        one = slice(index, index + 1)
        alone = chain.run(neighbours.WEIGHTS, text, rows[one], [own], plan, NEW)
        assert (alone.step_logits[0] - together.step_logits[index]).abs().max() < 1e-4
        assert alone.kept[0] == together.kept[index]


# --- known numbers --------------------------------------------------------------------------------


def wave(shape, rate, start):
    count = np.arange(np.prod(shape)) + 1.0
    return torch.tensor(np.sin(rate * count + start).reshape(shape), dtype=torch.float32)


def scored(positions):
    """Rows 0-1 prefix, 2-6 visual, 7-8 text, by the module that a stage ends in."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = TextConfig.from_hf({**neighbours.TEXT, **sizes})
    piece = Ahead(text, Eager())
    named = {
        "input_layernorm.weight": 1 + 0.1 * wave((8,), 0.9, 0.0),
        "self_attn.q_proj.weight": wave((8, 8), 0.77, 0.1),
        "self_attn.k_proj.weight": wave((8, 8), 0.23, 0.7),
    }
    piece.load_state_dict(named)
    rows, order = 2 * wave((9, 8), 0.31, 0.4)[None], torch.arange(9)[None]
    cos, sin = turn(*frequencies(text), torch.tensor([positions]), torch.float32)
    view = Eager().view(order, order, torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        query, key = piece(rows, cos, sin, *view, torch.zeros(1, 2, 9, 4))
    _, _, kept, scores = Selector(Edge("select", "next_attention", 2)).of(
        {
            "probe_query": query[:, :, -1],
            "key": key,
            "slot_order": order,
            "query_order": torch.tensor([8]),
            "visual_slots": torch.arange(2, 7)[None],
            "rows": rows[:, 2:7],
            "positions": order[:, 2:7],
            "order": order[:, 2:7],
        }
    )
    return kept[0].tolist(), scores[0].numpy()


def test_scores_are_the_known_ones():
    kept, scores = scored([0, 1, 2, 4, 5, 8, 9, 12, 13])
    assert np.abs(scores - [0, 0, 0.021097, 0.500084, 0.4567]).max() < 2e-6
    assert kept == [5, 6]
    _, closed = scored(list(range(9)))
    assert np.abs(closed - [0.000763, 0.943249, 0, 0.000001, 0.055979]).max() < 2e-6


@pytest.mark.parametrize(
    ("scores", "count", "published"),
    [
        ([0.2, 0.5, 0.5, 0.1, 0.9], 2, [1, 2, 4]),
        ([0.2, 0.2, 0.2, 0.1, 0.9], 3, [0, 1, 2, 4]),
        ([0.2, 0.2, 0.2, 0.2], 1, [0, 1, 2, 3]),
        ([0.2, 0.6, 0.5, 0.1, 0.9], 3, [1, 2, 4]),
    ],
)
def test_of_equal_scores_as_many_are_kept_as_asked_for(scores, count, published, monkeypatch):
    """The released operator keeps all that tie with the last one; where none does, the same."""
    selector = Selector(Edge("select", "next_attention", count))
    selector.score = lambda edge: torch.tensor([scores])
    order = torch.arange(len(scores))[None]
    given = {"query_order": torch.tensor([9]), "rows": order[..., None].float()}
    _, _, kept, _ = selector.of({**given, "positions": order, "order": order})
    assert kept.shape[1] == count
    assert set(kept[0].tolist()) <= set(published)


# --- plan and contract ----------------------------------------------------------------------------


def test_the_published_schedule_is_the_default():
    name, options = parse_request(
        "hidrop:entry=8,exit=24,edges=10-14-16-18,keep=87-10-5-1,positions=original"
    )
    plan, default = preset(name, 32, 576, **options), preset("hidrop", 32, 576)
    assert (plan.stages, plan.edges, plan.positions) == (default.stages, default.edges, "original")
    assert [(stage.layers, stage.visual_tokens) for stage in plan.stages] == [
        ((0, 8), 0),
        ((8, 10), 576),
        ((10, 14), 87),
        ((14, 16), 10),
        ((16, 18), 5),
        ((18, 24), 1),
        ((24, 32), 0),
    ]
    assert (plan.trigger, plan.keep, plan.exit) == (9, 87, 23)
    assert plan_cost(plan, LLAVA_7B).mean_visual_tokens == pytest.approx(48, abs=0.1)
    assert plan.blind_stages == 2
    apart = preset("hidrop", 32, 576, positions="separate")
    assert StagePlan.from_dict(apart.to_dict()) == apart
    assert apart.hash != default.hash
    assert "positions" not in default.to_dict()


def test_what_runs_ahead_of_an_edge_is_counted_as_the_graphs_run_it():
    plan = preset("hidrop", 32, 576)
    modes, graphs = (plan_cost(plan, LLAVA_7B, accounting=how) for how in ("modes", "graphs"))
    offered = 576 + 87 + 10 + 5
    assert graphs.visual_macs - modes.visual_macs == offered * 4096 * (4096 + 4096)
    assert graphs.visual_kv_bytes - modes.visual_kv_bytes == offered * 4096 * 2


def test_any_depth_has_a_schedule():
    for layers in range(3, 49):
        plan = preset("hidrop", layers, 16)
        assert sum(edge.op == "select" for edge in plan.edges) >= 1
    with pytest.raises(PlanError, match="expected 3 or more"):
        preset("hidrop", 2, 16)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.45, 0.6])
def test_comparisons_bring_it_to_a_cost(share):
    found = matched_plan("hidrop", share, LLAVA_7B, 576)
    assert found.share == pytest.approx(share, abs=0.02)
    name, options = parse_request(found.text)
    assert preset(name, 32, 576, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entry": 4, "edges": (4, 6), "keep": (5, 2)}, "entry: found 4, expected a layer from 0"),
        ({"exit": 6, "edges": (4, 6), "keep": (5, 2)}, "exit: found 6, expected 7 to 8"),
        ({"edges": (4, 6), "keep": (2, 5)}, "keep: found (2, 5), expected 2 counts from 12 to 1"),
        ({"positions": "closed"}, "hidrop: positions: found 'closed'"),
        ({"entry": "scope-4"}, "hidrop: entry: found 'scope-4'"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(PlanError) as error:
        preset("hidrop", LAYERS, VISUAL, **options)
    assert message in str(error.value)


def test_a_stage_hands_out_the_next_layers_query_and_keeps_its_keys():
    plan, text = planned(*SCHEDULES[0]), TextConfig.from_hf(neighbours.TEXT)
    assert [ahead_of(plan, stage) for stage in range(5)] == [None, 4, 6, None, None]
    part = whole_stages(plan)[1]
    caches = ["key.2", "value.2", "key.3", "value.3", "ahead.4"]
    assert part_caches(plan, part) == caches
    spec = stage_spec(text, plan, part, "float32", False)
    assert [tensor.name for tensor in spec.inputs[-5:]] == caches
    assert next(t for t in spec.outputs if t.name == "queries").shape[0] == 3
    back = stage_spec(text, plan, part, "float32", True)  # nothing in the graph reads them then
    assert [tensor.name for tensor in back.inputs[-4:]] == caches[:-1]
    assert [tensor.name for tensor in back.outputs[-5:]] == [f"{name}.out" for name in caches]
    geometry = Geometry.of(text)
    call, plain = GraphCall("stage1", 10, 20), preset("pyramiddrop", LAYERS, VISUAL)
    more = decoder_work(call, geometry, plan, COUNTS).flops
    more -= decoder_work(call, geometry, plain, COUNTS).flops
    assert more == 2 * 10 * 32 * (32 + 16)
