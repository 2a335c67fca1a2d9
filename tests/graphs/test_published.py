"""Plans that decide per prompt == the published method: triggers, selections and exits, in torch.

Thresholds are put half-way between numbers that the reference itself read, so that every event
happens somewhere and no comparison hangs on the last bit.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from visistage.graphs.chain import torch_reference as chain

from ..support import published
from ..support.cases import VARIANTS, Case, Prompt, agree, options, small

NEW = 32
GOLDEN = Path(__file__).parents[1] / "support" / "golden" / "published.json"

SETTINGS = {
    "grouped": {"layers": 9, "kv_heads": 2, "seed": 1},
    "sharp": {"layers": 9, "scale": 1.3, "seed": 2},
}


@pytest.fixture(scope="module", params=SETTINGS)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp(request.param), **SETTINGS[request.param])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_event_equals_the_reference(case, variant):
    """Triggers at several layers, K from 0 up, exits from the earliest to never: prefill."""
    triggers, exits, counts = set(), set(), set()
    for seed in (3, 4, 5):
        prompt = Prompt(case, seed)
        for note, method in prompt.events(small(variant)):
            logits, trace, _ = prompt.judge(method)
            agree(prompt.run(variant, method, 0), logits, trace, [], prompt, f"{seed}: {note}")
            triggers.add(trace.trigger)
            counts.add(None if trace.kept is None else len(trace.kept))
            if trace.kept is not None and len(trace.kept):
                exits.add(trace.exit - trace.trigger)
    assert {None, 3} < triggers, "never, at the first probed layer, and elsewhere"
    assert {None, 0, 1} < counts
    last = case.model.text.layers - 1
    assert 2 in exits, "the earliest exit"
    assert max(exits) == last - 3, "no exit at all"
    assert len(exits) >= 4


PARTS = list(itertools.product((True, False), repeat=3))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("shallow", "middle", "deep"), PARTS)
def test_all_combinations_generate_the_same(case, variant, shallow, middle, deep):
    """32 tokens, decode steps included; where there can be, with a selection and an exit."""
    prompt = Prompt(case, 6)
    method = small(variant, middle=middle, deep=deep)
    if not shallow:
        method = dataclasses.replace(method, shallow=0)
    chosen = method
    if middle:
        events = [one for _, one in prompt.events(method)]
        if deep:
            last = case.model.text.layers - 1
            leaving = [e for e in events if prompt.judge(e)[1].exit < last]
            chosen = next(e for e in leaving if len(prompt.judge(e)[1].kept) > 1)
        else:
            chosen = next(e for e in events if len(prompt.judge(e)[1].kept) > 1)
    logits, trace, tokens = prompt.judge(chosen, NEW)
    assert len(set(tokens)) >= 8
    agree(prompt.run(variant, chosen), logits, trace, tokens, prompt, str(chosen))
    assert (trace.trigger is not None) == middle


@pytest.mark.parametrize("layer0", ["merge", "half"])
def test_layer_0_rules_of_both_sizes(case, layer0):
    prompt = Prompt(case, 7)
    method = small("code", layer0=layer0, cosine=1.0, contribution=0.5, deep=False)
    logits, trace, tokens = prompt.judge(method, NEW)
    agree(prompt.run("code", method), logits, trace, tokens, prompt, layer0)


CHANGES = {
    "merge into another token": {"merge_into": 5},
    "13B rule of layer 0": {"layer0": "half"},
    "no visual self-attention": {"visual_self_attention": False},
    "no gap before the probe": {"probe": 2},
    "one shallow layer more": {"shallow": 3},
    "another trigger threshold": {"cosine": None},
    "another contribution": {"contribution": None},
    "another exit threshold": {"exit_cosine": None},
    "consecutive layers": {"cumulative": False},
    "one quiet layer": {"exit_layers": 1},
    "decoding is blind": {"decode_sees": False},
    "not strict": {"strict": False},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_reference_notices_every_difference(case, name):
    """Each place where paper and code differ, and each number, changes the result somewhere."""
    changed = 0
    for seed in (3, 4, 5, 6):
        prompt = Prompt(case, seed)
        methods = [method for _, method in prompt.events(small("code"))]
        for method in methods:
            change = dict(CHANGES[name])
            for key in ("cosine", "contribution", "exit_cosine"):
                if key in change:
                    other = [
                        other for other in methods if getattr(other, key) != getattr(method, key)
                    ]
                    change[key] = getattr(other[0], key)
            if name == "not strict":  # only where a token stands exactly on the threshold
                norms = prompt.judge(method)[1].norms
                if not norms or method.cosine == -1.0:
                    continue
                value = float(next(iter(norms.values())).max())
                method = dataclasses.replace(method, contribution=value, cosine=1.0)
            if name == "no gap before the probe":
                method = dataclasses.replace(method, cosine=1.0)
            new = 8 if name == "decoding is blind" else 0
            mutated = dataclasses.replace(method, **change)
            one, two = prompt.judge(method, new), prompt.judge(mutated, new)
            if new:
                changed += one[2] != two[2]
            else:
                changed += bool((one[0] - two[0]).abs().max() > 1e-3)
        if changed:
            return
    pytest.fail(f"{name} changes nothing on any prompt")


def golden(case):
    """What the reference says on a few prompts, in plain numbers."""
    found = {}
    for variant in VARIANTS:
        for seed in (3, 4):
            prompt = Prompt(case, seed)
            method = small(variant, cosine=0.95, contribution=0.5, exit_cosine=0.9)
            logits, trace, tokens = prompt.judge(method, 8)
            found[f"{variant} {seed}"] = {
                "trigger": trace.trigger,
                "exit": trace.exit,
                "kept": None if trace.kept is None else trace.kept.tolist(),
                "lowest cosine": {
                    str(k): round(float(v.min()), 4) for k, v in trace.cosines.items()
                },
                "largest norm": {
                    str(k): round(float(v.max()), 3) for k, v in trace.norms.items() if len(v)
                },
                "logits": [round(float(x), 2) for x in logits[:8]],
                "tokens": tokens,
            }
    return found


def test_golden_numbers(case, request):
    """The reference itself must not drift: its numbers on fixed weights are kept in a file."""
    name = request.node.callspec.id
    known = json.loads(GOLDEN.read_text())[name]
    found = golden(case)
    assert found.keys() == known.keys()
    for key, facts in known.items():
        for field, value in facts.items():
            if isinstance(value, dict):
                assert found[key][field] == pytest.approx(value, abs=2e-3), (key, field)
            elif field == "logits":
                assert found[key][field] == pytest.approx(value, abs=2e-2), (key, field)
            else:
                assert found[key][field] == value, (key, field)


@pytest.mark.parametrize(("variant", "leaves"), [("code", False), ("paper", True)])
def test_vision_that_was_kept_whole_leaves_in_the_paper_alone(case, variant, leaves):
    """Every layer is quiet, every token strong: the code gathers all rows, again and again."""
    method = small(variant, cosine=1.1, contribution=0.0, exit_cosine=-1.0)
    prompt, last = Prompt(case, 3), case.model.text.layers - 1
    logits, trace, tokens = prompt.judge(method, 8)
    plan = case.plan(f"visipruner-{variant}", **(options(method) | {"cosine": 1.0}))
    result = chain.run(case.weights, case.text, prompt.rows, prompt.spans, plan, 8)
    agree(result, logits, trace, tokens, prompt, variant)
    assert len(result.kept[0]) == case.model.visual_tokens
    assert (result.exit < last) == leaves


def test_a_batch_goes_prompt_by_prompt(case):
    """Prompts of one batch may trigger at different layers."""
    prompts = [Prompt(case, seed) for seed in (3, 4, 5)]
    plan = case.plan("visipruner-code", cosine=0.93, contribution=0.5, exit_cosine=0.9)
    rows = torch.cat([prompt.rows for prompt in prompts])
    spans = [prompt.spans[0] for prompt in prompts]
    together = chain.run(case.weights, case.text, rows, spans, plan, 8)
    for index, prompt in enumerate(prompts):
        alone = chain.run(case.weights, case.text, prompt.rows, prompt.spans, plan, 8)
        assert (together.trigger[index], together.exit[index]) == (alone.trigger, alone.exit)
        assert together.kept[index] == alone.kept[0]
        assert together.tokens[index].tolist() == alone.tokens[0].tolist()


# --- adaptive: the same decisions, acting at the next of a few edges ------------------------------

ADAPTIVE = dataclasses.replace(
    published.CODE, shallow=2, probe=3, decode_sees=False, whole_leaves=True
)
EDGES = {"every layer": (3, 4, 5, 6, 7), "some": (4, 6), "one": (5,)}


def adaptive_plan(case, method, edges, **more):
    given = options(method) | {"boundaries": edges, "buckets": (2, 5, 16)} | more
    return case.plan("visipruner-adaptive", **given)


@pytest.mark.parametrize("edges", EDGES.values(), ids=EDGES)
def test_adaptive_acts_at_the_next_edge(case, edges):
    """Against the reference with the same edges: padding to buckets must leave no trace."""
    ways, padded = set(), 0
    for seed in (3, 4, 5):
        prompt = Prompt(case, seed)
        for note, method in prompt.events(dataclasses.replace(ADAPTIVE, edges=edges)):
            logits, trace, _ = prompt.judge(method)
            plan = adaptive_plan(case, method, edges)
            result = chain.run(case.weights, case.text, prompt.rows, prompt.spans, plan)
            if trace.trigger is None:  # called for after the last edge, or never
                trace.kept = None
            agree(result, logits, trace, [], prompt, f"{seed}: {note}")
            ways.add((trace.called, trace.trigger, trace.left, trace.exit))
            padded += bool(len(result.kept[0]) not in (0, 2, 5, 16))
    assert padded >= 3
    assert len(ways) >= 5
    late = [way for way in ways if way[0] is not None and way[0] != way[1]]
    assert bool(late) == (edges != EDGES["every layer"])


def test_adaptive_generates_like_the_reference(case):
    prompt = Prompt(case, 6)
    edges = EDGES["some"]
    methods = [m for _, m in prompt.events(dataclasses.replace(ADAPTIVE, edges=edges))]
    method = next(m for m in methods if len(prompt.judge(m)[1].kept) > 2)
    logits, trace, tokens = prompt.judge(method, NEW)
    plan = adaptive_plan(case, method, edges)
    result = chain.run(case.weights, case.text, prompt.rows, prompt.spans, plan, NEW)
    agree(result, logits, trace, tokens, prompt, "adaptive")


def test_padding_is_masked_not_filled(case):
    """Rows that fill a bucket are padding; the next best tokens there are another model."""
    prompt = Prompt(case, 3)
    method = next(
        m
        for _, m in prompt.events(ADAPTIVE)
        if prompt.judge(m)[1].kept is not None and len(prompt.judge(m)[1].kept) > 2
    )
    count = len(prompt.judge(method)[1].kept)
    results = {}
    for buckets in ((count,), (count + 4,), (16,)):
        plan = adaptive_plan(case, method, EDGES["every layer"], buckets=buckets)
        results[buckets] = chain.run(case.weights, case.text, prompt.rows, prompt.spans, plan)
    exact = results[(count,)]
    for result in results.values():
        assert result.kept == exact.kept
        assert (result.logits - exact.logits).abs().max() < 1e-4
    norms = prompt.judge(method)[1].norms[exact.trigger].sort().values
    more = dataclasses.replace(method, contribution=float(norms[-count - 4 : -count - 2].mean()))
    filled = prompt.judge(more)[0]
    assert (filled - exact.logits[0]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """As many layers as LLaVA-1.5-7B, so that the presets' own numbers fit."""
    return Case(tmp_path_factory.mktemp("deep"), layers=32, kv_heads=2, seed=4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [3, 4])
def test_presets_without_options_are_the_published_methods(deep, variant, seed):
    """No number is handed over: presets and reference both know the published ones."""
    prompt = Prompt(deep, seed)
    plan = deep.plan(f"visipruner-{variant}")
    method = VARIANTS[variant]
    logits, trace, tokens = prompt.judge(method, 12)
    result = chain.run(deep.weights, deep.text, prompt.rows, prompt.spans, plan, 12)
    agree(result, logits, trace, tokens, prompt, variant)
    assert trace.trigger >= 7
    assert 0 < len(trace.kept) < 16
