"""Frozen rows: against layers called one by one, prefill and answer, with planted mistakes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from visistage.compile.planfile import plan_from_yaml, plan_to_yaml
from visistage.graphs.chain import chain as host
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.errors import PlanError
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.plan.stages import Frozen

from ..support.cases import Case
from ..support.plain import Plain, answer

STEPS = 8
SETS = {
    "attention of vision": (Frozen("visual", "attention", (1, 2)),),
    "mlp of vision": (Frozen("visual", "mlp", (0, 3)),),
    "both, and the prefix": (
        Frozen("visual", "attention", (0, 1, 2)),
        Frozen("visual", "mlp", (0, 1, 2)),
        Frozen("prefix", "attention", (0, 1, 2, 3)),
    ),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("toy"), layers=5, kv_heads=2)


def plan_of(case, frozen, preset="dense", **options):
    plan = case.plan(preset, **options)
    first, *others = plan.stages
    return replace(plan, stages=(replace(first, frozen=frozen), *others))


def decode_logits(case, executor, runner, done, at, tokens):
    """Logits (1 + STEPS, V) of our chain, given the judge's tokens."""
    out = [done.logits[0]]
    for step, token in enumerate(tokens):
        row = executor.embed(torch.tensor([[token]]))
        place = np.full((1, 1), at + step, np.int32)
        out.append(runner.decode(host.AppendedRows(False, row, place, place))[0])
    return torch.stack(out)


@torch.no_grad()
def ours(case, plan, rows, spans, tokens):
    executor = chain.TorchExecutor(case.model.text, plan, case.weights, 1)
    runner = host.Chain(plan, executor)
    done = runner.prefill(chain.segments(rows, spans))
    return decode_logits(case, executor, runner, done, rows.shape[1], tokens)


@torch.no_grad()
def theirs(case, frozen, rows, spans):
    """The rule: what a layer adds to a frozen row is left out, in the prompt and nowhere else."""
    (start, stop), count = spans[0][0], rows.shape[1]
    kinds = {name: torch.zeros(count, dtype=torch.bool) for name in ("visual", "prefix")}
    kinds["visual"][start:stop] = True
    kinds["prefix"][:start] = True
    plain, x = Plain(case.weights, case.text), rows[0]
    for layer in range(plain.depth):
        gains = {"attention": torch.ones(count), "mlp": torch.ones(count)}
        for item in frozen:
            if layer in item.layers:
                gains[item.part][kinds[item.rows]] = 0
        x = plain.layer(layer, x, torch.arange(count), (gains["attention"], gains["mlp"]))
    return answer(plain, plain.logits(x), count, STEPS)


def prompt(case, seed=3):
    ids, pixels = case.prompt(seed)
    return case.embeds(ids, pixels)


def differ(found, wanted):
    """The largest difference of logits in any step, relative to their spread."""
    return float((found - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize("name", SETS)
def test_a_frozen_row_is_what_the_layer_was_given(case, name):
    rows, spans = prompt(case)
    wanted, tokens = theirs(case, SETS[name], rows, spans)
    assert differ(ours(case, plan_of(case, SETS[name]), rows, spans, tokens), wanted) < 1e-4
    assert differ(ours(case, case.plan("dense"), rows, spans, tokens), wanted) > 1e-2


def test_rows_of_several_kinds_share_a_call(case):
    """One call of everything: what each row is decides, not what the call is."""
    plan = plan_of(case, SETS["both, and the prefix"])
    rows, spans = prompt(case)
    wanted, _ = theirs(case, SETS["both, and the prefix"], rows, spans)
    executor = chain.TorchExecutor(case.model.text, plan, case.weights, 1)
    runner = host.Chain(plan, executor)
    before, image, question = chain.segments(rows, spans)
    with torch.no_grad():
        done = runner.finish(runner.append(0, [image, before, question]))
    assert differ(done.logits, wanted[:1]) < 1e-4


def test_samples_of_a_batch_have_gains_of_their_own(case):
    """Padding, a picture at another place, and a prompt without one, whose text is not frozen."""
    frozen = SETS["both, and the prefix"]
    rows, spans = prompt(case)
    later = torch.cat((rows[:, -3:], rows[:, :-3]), 1)
    (start, stop), none = spans[0][0], case.plan("dense")
    places = [*spans, [(start + 3, stop + 3)], []]
    found = chain.run(
        case.weights, case.text, torch.cat((rows, later, rows)), places, plan_of(case, frozen), 3
    )
    for sample, (own, place) in enumerate(zip((rows, later), places, strict=False)):
        wanted, tokens = theirs(case, frozen, own, [place])
        assert differ(found.logits[sample], wanted[0]) < 1e-4
        assert found.tokens[sample].tolist() == tokens[:3]
    text = chain.run(case.weights, case.text, rows, [[]], none)
    assert differ(found.logits[2:], text.logits) < 1e-4


MISTAKES = {
    "the answer is frozen, too": lambda stage, kinds: gains(
        stage, {**kinds, "visual": np.ones_like(kinds["visual"])}
    ),
    "the other half": lambda stage, kinds: gains(stage, kinds)[:, ::-1].copy(),
    "another layer": lambda stage, kinds: np.roll(gains(stage, kinds), 1, 0),
    "nothing": lambda stage, kinds: np.ones_like(gains(stage, kinds)),
}
gains = host.stage_gains


@pytest.mark.parametrize("bug", MISTAKES)
def test_planted_mistakes_are_noticed(case, monkeypatch, bug):
    frozen = (Frozen("visual", "attention", (0, 1)), Frozen("visual", "mlp", (1, 2)))
    rows, spans = prompt(case)
    wanted, tokens = theirs(case, frozen, rows, spans)
    assert differ(ours(case, plan_of(case, frozen), rows, spans, tokens), wanted) < 1e-4
    monkeypatch.setattr(host, "stage_gains", MISTAKES[bug])
    assert differ(ours(case, plan_of(case, frozen), rows, spans, tokens), wanted) > 1e-2


def test_frozen_rows_are_data_of_the_plan(case):
    plan = plan_of(case, SETS["both, and the prefix"])
    assert StagePlan.from_dict(plan.to_dict()) == plan
    assert plan_from_yaml(plan_to_yaml(plan)) == plan
    assert plan.freezes("prefix")
    assert not plan.freezes("matched", "unmatched")
    assert not plan.is_dense
    assert "frozen" not in case.plan("dense").to_dict()["stages"][0]  # plans of before


@pytest.mark.parametrize(
    ("stage", "frozen", "message"),
    [
        (0, Frozen("text", "mlp", (1,)), "stages[0].frozen[0].rows: found 'text', expected one of"),
        (0, Frozen("visual", "norm", (1,)), "frozen[0].part: found 'norm', expected one of"),
        (0, Frozen("visual", "mlp", (4,)), "frozen[0].layers: found (4,), expected layers of 0 to"),
        (0, Frozen("visual", "mlp", (1, 0)), "expected layers of 0 to 2, ascending"),
        (0, Frozen("visual", "mlp", ()), "expected layers of 0 to 2, ascending"),
        (1, Frozen("visual", "mlp", (3,)), "expected prefix where no visual token is"),
        (1, Frozen("matched", "mlp", (3,)), "expected visual or prefix in every stage after"),
    ],
)
def test_what_cannot_be_frozen_is_refused(case, stage, frozen, message):
    plan = case.plan("exit-only", e=2)
    stages = list(plan.stages)
    stages[stage] = replace(stages[stage], frozen=(frozen,))
    with pytest.raises(PlanError) as error:
        replace(plan, stages=tuple(stages))
    assert message in str(error.value)


def test_the_same_rows_twice_are_refused(case):
    twice = (Frozen("visual", "mlp", (1, 2)), Frozen("visual", "mlp", (2,)))
    with pytest.raises(PlanError, match="each half of a layer once"):
        plan_of(case, twice)
