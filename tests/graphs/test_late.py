"""Late entry: visual rows that pass stages by, against whole sequences in plain torch."""

from dataclasses import replace

import pytest
import torch
from visistage.compile.planfile import plan_from_yaml, plan_to_yaml
from visistage.graphs.chain import chain as host
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.chain.enter import positioned
from visistage.graphs.errors import PlanError
from visistage.graphs.plan.cost import LLAVA_7B, plan_cost
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.plan.stages import Edge, Stage
from visistage.graphs.presets.presets import parse_request, preset

from ..support import neighbours
from ..support.neighbours import LAYERS, NEW, VISUAL, Prompt


def planned(text, layers=LAYERS, tokens=VISUAL):
    name, options = parse_request(text)
    return preset(name, layers, tokens, **options)


def stage(start, stop, count):
    return Stage((start, stop), count, ("dense",) * (stop - start))


def carried(*stages, edges=None):
    """A plan of (start, stop, visual tokens), the edges between them all ``carry``."""
    edges = edges or [Edge("carry")] * (len(stages) - 1)
    return StagePlan("made", LAYERS, VISUAL, tuple(stage(*s) for s in stages), tuple(edges))


LATE = carried((0, 3, 0), (3, LAYERS, VISUAL))
LEAVES = carried((0, 2, 0), (2, 5, VISUAL), (5, LAYERS, 0), edges=[Edge("carry"), Edge("drop")])
RESTS = carried((0, 2, VISUAL), (2, 5, 0), (5, LAYERS, VISUAL))


@pytest.mark.parametrize("plan", [LATE, LEAVES, RESTS], ids=["late", "leaves", "rests"])
@pytest.mark.parametrize("seed", [1, 2])
def test_rows_that_pass_stages_by_are_those_of_whole_sequences(plan, seed):
    prompt = Prompt(seed)
    sees = [plan.visual_tokens_in(layer) > 0 for layer in range(LAYERS)]
    wanted = neighbours.generate(prompt, neighbours.late(sees))
    neighbours.agree(prompt.run(plan), wanted)
    neighbours.differ(prompt.run(planned("dense")), wanted)


@pytest.mark.parametrize("bug", ["rows of stage 0", "closed", "not carried"])
def test_planted_mistakes_in_a_late_entry_are_noticed(bug, monkeypatch):
    prompt = Prompt(1)
    wanted = neighbours.generate(prompt, neighbours.late([layer >= 3 for layer in range(LAYERS)]))
    plan = LATE
    if bug == "rows of stage 0":  # the text's stage runs them, too
        monkeypatch.setattr(host.Chain, "_unchanged", lambda self, stage, part: None)
    elif bug == "closed":
        monkeypatch.setattr(chain, "positioned", closed)
    else:
        plan = carried((0, LAYERS, VISUAL))
    neighbours.differ(prompt.run(plan), wanted)


def closed(plan, segments, lags):
    """The question right behind the text before the image, as if no image came."""
    placed, lag = positioned(plan, segments, lags)
    last = replace(placed[-1], positions=placed[-1].positions - VISUAL)
    return [*placed[:-1], last], lag


def test_a_batch_equals_its_samples():
    length, text = 3 * VISUAL, neighbours.TEXT
    rows = torch.randn(3, length, text["hidden_size"], generator=torch.Generator().manual_seed(1))
    spans = [[(4, 4 + VISUAL)], [(2, 2 + VISUAL), (4 + VISUAL, 4 + 2 * VISUAL)], []]
    for plan in (LEAVES, RESTS):
        together = chain.run(neighbours.WEIGHTS, text, rows, spans, plan, NEW)
        for index, own in enumerate(spans):
            one = slice(index, index + 1)
            alone = chain.run(neighbours.WEIGHTS, text, rows[one], [own], plan, NEW)
            assert alone.tokens[0].tolist() == together.tokens[index].tolist()
            assert (alone.step_logits[0] - together.step_logits[index]).abs().max() < 1e-4


def test_the_logits_of_every_step_are_returned():
    prompt = Prompt(3)
    found = prompt.run(planned("pyramiddrop"))
    assert found.step_logits.shape == (1, NEW, neighbours.TEXT["vocab_size"])
    assert torch.equal(found.step_logits[:, 0], found.logits)
    assert torch.equal(found.step_logits.argmax(-1), found.tokens)
    (edges,) = found.kept_at_edges
    assert [len(kept) for kept in edges] == [stage.visual_tokens for stage in found_stages()]
    assert edges[-1] == found.kept[0]
    assert set(edges[2]) < set(edges[1]) < set(edges[0])


def found_stages():
    return planned("pyramiddrop").stages[1:]


# --- plans ----------------------------------------------------------------------------------------


def test_what_follows_from_a_late_entry():
    assert (LATE.entry_stage, LATE.trigger, LATE.exit) == (1, LAYERS - 1, LAYERS - 1)
    assert (LEAVES.trigger, LEAVES.exit, LEAVES.arriving) == (4, 4, (VISUAL, VISUAL, 0))
    assert RESTS.arriving == (VISUAL,) * 3
    assert [LATE.blind_stages, LEAVES.blind_stages, RESTS.blind_stages] == [2, 3, 3]
    assert [LATE.blind_stages_of(2), RESTS.blind_stages_of(2)] == [1, 1]
    assert not LATE.is_dense


@pytest.mark.parametrize("plan", [LATE, LEAVES, RESTS], ids=["late", "leaves", "rests"])
def test_such_plans_are_written_and_read(plan):
    assert StagePlan.from_dict(plan.to_dict()) == plan
    assert plan_from_yaml(plan_to_yaml(plan)) == plan


def test_an_entry_names_the_layer_before_which_it_comes_in():
    plan = planned("exit-only:entry=scope-4-at3,e=5")
    assert [(s.layers, s.visual_tokens) for s in plan.stages] == [
        ((0, 3), 0),
        ((3, 6), 4),
        ((6, 8), 0),
    ]
    assert [edge.op for edge in plan.edges] == ["carry", "drop"]
    assert (plan.entry.layer, plan.entry.text) == (3, "scope-4-at3")
    assert "before layer 3" in plan.entry.summary(VISUAL)
    renumbered = planned("dense:entry=visionzip-4-renumbered-at2").entry
    assert (renumbered.layer, renumbered.positions) == (2, "renumbered")
    assert planned(f"dense:entry={renumbered.text}").entry == renumbered
    cuts = planned("visipruner:entry=scope-6-at2,shallow=false,t=4,e=6,keep=2")
    assert [s.visual_tokens for s in cuts.stages] == [0, 6, 2, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense:entry=scope-4-at", "perhaps the first layer that sees them, from 1 to 7"),
        ("dense:entry=scope-4-at8", "perhaps the first layer that sees them, from 1 to 7"),
        ("dense:entry=scope-4-atx", "perhaps the first layer that sees them, from 1 to 7"),
        ("exit-only:entry=scope-4-at5,e=3", "a layer before 4, from which on"),
        ("visipruner:entry=scope-4-at2", "shallow=false leaves them out"),
        ("visipruner-code:entry=scope-4-at2", "no layer where the plan decides per prompt"),
    ],
)
def test_an_entry_that_comes_too_late_says_what_would_do(text, message):
    with pytest.raises(PlanError) as error:
        planned(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("stages", "edges", "message"),
    [
        ([(0, 4, 0), (4, 8, VISUAL)], ["drop"], "stages[0].visual_tokens: found 0, expected all"),
        ([(0, 4, 0), (4, 8, 0)], ["carry"], "edges[0].op: found 'carry', expected a stage with"),
        ([(0, 4, VISUAL), (4, 8, 0)], ["carry"], "edges[0].op: found 'carry', expected drop"),
        ([(0, 4, 0), (4, 8, 3)], ["carry"], f"expected {VISUAL} after the carry"),
        (
            [(0, 3, 0), (3, 5, VISUAL), (5, 7, 0), (7, 8, 0)],
            ["carry", "carry", "drop"],
            "edges[2].op: found 'drop', expected carry",
        ),
        ([(0, 8, 0)], [], "stages[0].visual_tokens: found 0, expected all"),
    ],
)
def test_contradictions_are_refused(stages, edges, message):
    with pytest.raises(PlanError) as error:
        carried(*stages, edges=[Edge(op) for op in edges])
    assert message in str(error.value)


def test_text_blind_layers_need_vision_to_be_blind_to():
    blind = replace(LATE.stages[0], modes=("text_blind",) * 3)
    with pytest.raises(PlanError, match=r"stages\[0\].modes\[0\]: found 'text_blind'"):
        replace(LATE, stages=(blind, *LATE.stages[1:]))


def test_layers_that_vision_passes_by_cost_its_rows_nothing():
    late = preset("dense", 32, 576, entry="uniform-576-at8")
    dense = preset("dense", 32, 576)
    costs = [plan_cost(plan, LLAVA_7B) for plan in (late, dense)]
    assert costs[0].visual_macs / costs[1].visual_macs == pytest.approx(24 / 32)
    assert costs[0].visual_kv_bytes / costs[1].visual_kv_bytes == pytest.approx(24 / 32)
    assert costs[0].mean_visual_tokens == 432
