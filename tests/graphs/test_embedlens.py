"""EmbedLens: classes by cosine, removed and frozen rows, against layers called one by one."""

import dataclasses

import numpy as np
import pytest
import torch
from visistage.graphs.chain import chain as host
from visistage.graphs.chain import torch_classes
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.errors import PlanError
from visistage.graphs.modules.vision import NearestWords
from visistage.graphs.presets.presets import parse_request, preset
from visistage.graphs.selectors.embedlens import choose
from visistage.graphs.selectors.entry import PADDING, READINGS, EncoderReadings

from ..support.cases import Case
from ..support.plain import Plain, answer

LAYERS, STEPS = 6, 8

# Golden vectors: made with NumPy, by the rule in words.
TABLE_ROWS, WIDTH, IMAGE_ROWS = 7, 4, 5
TOP = [[1, 2, 6], [5, 0, 6], [3, 2, 4], [6, 0, 1], [4, 3, 5]]
BY_DOT_PRODUCT = [[1, 6, 0], [6, 0, 5], [3, 4, 2], [6, 1, 0], [3, 4, 5]]


def golden(shape, step, start, scales):
    waves = np.sin(step * (np.arange(np.prod(shape)) + 1.0) + start).reshape(shape)
    return torch.tensor(waves * np.array(scales)[:, None], dtype=torch.float32)


@pytest.fixture
def table():
    return golden((TABLE_ROWS, WIDTH), 1.3, 0.2, [1, 3, 0.2, 2, 1, 0.5, 4])


@pytest.fixture
def image():
    return golden((IMAGE_ROWS, WIDTH), 0.6, 0.5, [0.1, 1, 5, 2, 0.3])


@torch.no_grad()
def nearest(table, rows):
    words = NearestWords(*table.shape)
    words.load_state_dict({"weight": table})
    return words(rows[None])[0].numpy()


def test_words_are_those_of_the_golden_vectors(table, image):
    assert nearest(table, image).tolist() == TOP
    assert (image @ table.T).topk(3).indices.tolist() == BY_DOT_PRODUCT


def readings(vocabulary):
    blank = dict.fromkeys(READINGS)
    return EncoderReadings(**{**blank, "image": "00", "vocabulary": np.array(vocabulary)})


@pytest.mark.parametrize(
    ("removes", "keep", "index"),
    [
        ("matched", 5, [1, 3, 4, PADDING, PADDING]),
        ("unmatched", 5, [0, 2, PADDING, PADDING, PADDING]),
        ("none", 5, [0, 1, 2, 3, 4]),
        ("matched", 2, [1, 3]),  # thinned evenly
        ("matched", 1, [1]),
    ],
)
def test_rows_with_a_target_among_their_three_are_matched(removes, keep, index):
    found = choose(readings(TOP), keep, (2,), removes)
    assert found.index.tolist() == index
    assert found.matched.tolist() == [at in (0, 2) for at in index]
    assert (found.source >= 0).all()


def test_by_chance_as_many_go_as_are_matched():
    ids = [[0, 1, 2], [3, 4, 5], *([[6, 7, 8]] * 20)]
    found = choose(readings(ids), 22, (0, 4), "random")
    assert (found.index != PADDING).sum() == 20
    assert found.matched[:2].tolist() == [True, True]
    again = choose(readings(ids), 22, (0, 4), "random")
    assert found.index.tolist() == again.index.tolist()
    most = choose(readings(ids), 22, (6,), "random")  # at most as many as there are
    assert most.index[:20].tolist() == list(range(2, 22))


# --- against layers called one by one -------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("toy"), layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def prompt(case):
    ids, pixels = case.prompt(3)
    return case.embeds(ids, pixels)


def own_words(case, rows, span):
    """The three nearest ids of each visual row, by the rule in words."""
    table = case.weights["model.embed_tokens.weight"]
    table = table / table.norm(dim=1, keepdim=True)
    visual = rows[0, slice(*span)]
    return ((visual / visual.norm(dim=1, keepdim=True)) @ table.T).topk(3).indices


@pytest.fixture(scope="module")
def targets(case, prompt):
    """Ids that some rows have as their first, others as their third, and most not at all."""
    words = own_words(case, prompt[0], prompt[1][0][0])
    return tuple(sorted({int(words[0, 0]), int(words[5, 2]), int(words[9, 1])}))


def planned(case, targets, options=""):
    ids = "-".join(map(str, targets))
    name, given = parse_request(f"embedlens:{f'targets={ids},' if ids else ''}{options}".strip(","))
    return case.plan(name, **given)


@torch.no_grad()
def ours(case, plan, prompt, tokens):
    """Logits (1 + STEPS, V) of our chain for the judge's tokens, and the rows that entered."""
    rows, spans = prompt
    executor = chain.TorchExecutor(case.model.text, plan, case.weights, 1)
    runner = host.Chain(plan, executor)
    matched, places = None, None
    if plan.tells_apart:
        chosen = [chain.told_apart(plan, case.weights, rows[0], spans[0])]
        entered = torch_classes.entered_patches(chosen)
        matched = torch_classes.matched_rows(rows.shape[1], spans, chosen)
        places = [chain._places(plan, rows.shape[1], spans[0], entered[0])]
    segments = chain.segments(rows, spans, places, matched=matched)
    out = [runner.prefill(segments).logits[0]]
    for step, token in enumerate(tokens):
        at = np.full((1, 1), rows.shape[1] + step, np.int32)
        row = executor.embed(torch.tensor([[token]]))
        out.append(runner.decode(host.AppendedRows(False, row, at, at))[0])
    return torch.stack(out)


@dataclasses.dataclass(frozen=True)
class Rule:
    """The fate of an image's rows: which stay, and which are frozen where."""

    stays: torch.Tensor
    frozen: torch.Tensor
    freeze: tuple[float, ...] = ()
    exit: int = LAYERS
    entry: int = 0
    vt: bool = False
    frozen_keys: bool = False  # a mistake: keys and values of frozen rows as they entered
    decode_merges: bool = False  # a mistake: an answer's rows lose vision, too


@torch.no_grad()
def theirs(case, prompt, rule):
    rows, (start, stop) = prompt[0][0], prompt[1][0][0]
    plain, count = Plain(case.weights, case.text), len(rows)
    positions = torch.arange(count)
    present = torch.ones(count, dtype=torch.bool)
    present[start:stop] = rule.stays if rule.entry == 0 else False
    x, visual = rows.clone(), (positions >= start) & (positions < stop)
    frozen = visual.clone()
    frozen[start:stop] = rule.frozen
    for layer in range(LAYERS):
        if layer == rule.entry:
            present[start:stop] = rule.stays
        if layer == rule.exit:
            present &= ~visual
        at = positions[present]
        seen, first = visual[present], start

        def edit(probs, layer=layer, seen=seen, at=at, first=first):
            text = ~seen & (at >= stop)
            if layer in rule.freeze and layer == 0:
                removed = probs[:, :, seen].sum(-1)
                behind = at >= first
                probs[:, behind[:, None] & seen[None]] = 0
                probs[:, text, int(seen.nonzero()[0])] = removed[:, text]
            elif layer in rule.freeze and rule.vt:
                probs[:, text[:, None] & seen[None]] = 0
            return probs

        gains = [
            torch.where(frozen[present] & (half in rule.freeze), 0.0, 1.0)
            for half in (float(layer), layer + 0.5)
        ]
        plain_rows = plain.layer(layer, x[present], at, gains, edit)
        x[present] = plain_rows
        if rule.frozen_keys and layer in rule.freeze:
            _as_they_entered(plain, layer, rows, present, frozen)
    logits = plain.logits(x[present])
    return answer(plain, logits, count, STEPS)


def _as_they_entered(plain, layer, rows, present, frozen):
    """Let the cache of a layer hold what frozen rows were at the input of layer 0."""
    again = Plain(plain.weights, plain.config)
    again.layer(layer, rows[present], torch.arange(len(rows))[present])
    own = frozen[present]
    plain.keys[layer][:, own] = again.keys[layer][:, own]
    plain.values[layer][:, own] = again.values[layer][:, own]


def differ(found, wanted):
    return float((found - wanted).abs().max() / wanted.std())


def classes(case, prompt, targets):
    words = own_words(case, prompt[0], prompt[1][0][0])
    return torch.isin(words, torch.tensor(targets)).any(1)


ALL = torch.ones(16, dtype=torch.bool)


def test_all_rows_may_enter_late(case, prompt):
    """Raw rows come in before a layer; the text before it has seen the hole alone."""
    plan = planned(case, (), "entry=2,exit=5,freeze=3-3.5")
    assert [stage.visual_tokens for stage in plan.stages] == [0, 16, 0]
    assert [stage.gained_layers for stage in plan.stages] == [(), (3,), ()]
    rule = Rule(ALL, ALL, (3.0, 3.5), exit=5, entry=2)
    wanted, tokens = theirs(case, prompt, rule)
    assert differ(ours(case, plan, prompt, tokens), wanted) < 1e-4
    early, tokens = theirs(case, prompt, dataclasses.replace(rule, entry=0))
    assert differ(ours(case, plan, prompt, tokens), early) > 1e-2


CASES = {
    "": lambda hit: Rule(~hit, ~ALL),
    "which=unmatched": lambda hit: Rule(hit, ~ALL),
    "exit=4": lambda hit: Rule(~hit, ~ALL, exit=4),
    "freeze=1.5": lambda hit: Rule(ALL, hit, (1.5,)),
    "freeze=0.5-1": lambda hit: Rule(ALL, hit, (0.5, 1.0)),
    "freeze=0.5-1-1.5,exit=5": lambda hit: Rule(ALL, hit, (0.5, 1.0, 1.5), 5),
    "freeze=1.5,which=unmatched": lambda hit: Rule(ALL, ~hit, (1.5,)),
    "freeze=0-1": lambda hit: Rule(ALL, hit, (0.0, 1.0)),
    "freeze=0-1-2.5,method=vt": lambda hit: Rule(ALL, hit, (0.0, 1.0, 2.5), vt=True),
}


@pytest.mark.parametrize("options", CASES)
def test_rows_are_removed_and_frozen_by_their_class(case, prompt, targets, options):
    hit = classes(case, prompt, targets)
    assert 2 < hit.sum() < 14
    rule = CASES[options](hit)
    wanted, tokens = theirs(case, prompt, rule)
    plan = planned(case, targets, options)
    assert differ(ours(case, plan, prompt, tokens), wanted) < 1e-4
    dense = ours(case, case.plan("dense"), prompt, tokens)
    assert differ(dense, wanted) > 5e-3
    found = chain.run(case.weights, case.text, *prompt, plan, STEPS)
    assert differ(found.logits, wanted[:1]) < 1e-4
    assert found.tokens[0].tolist() == tokens
    start = prompt[1][0][0][0]
    assert found.kept == [[start + at for at in rule.stays.nonzero()[:, 0].tolist()]]


@pytest.mark.parametrize("options", ["freeze=0-1,method=vt", "freeze=0.5-1-1.5", ""])
def test_without_targets_all_rows_are_frozen(case, prompt, options):
    freeze = (0.0, 1.0) if "vt" in options else (0.5, 1.0, 1.5)
    wanted, tokens = theirs(case, prompt, Rule(ALL, ALL, freeze, vt="vt" in options))
    assert differ(ours(case, planned(case, (), options), prompt, tokens), wanted) < 1e-4


@pytest.mark.parametrize(
    "bug",
    {
        "by dot product": lambda words, rows: (rows @ words.weight.T).topk(3).indices,
        "the nearest alone": lambda words, rows: real(words, rows)[..., :1],
        "the four nearest": lambda words, rows: cosine(words, rows).topk(4).indices,
    }.items(),
    ids=lambda bug: bug[0],
)
def test_other_classes_are_noticed(case, prompt, targets, monkeypatch, bug):
    wanted, tokens = theirs(case, prompt, Rule(~classes(case, prompt, targets), ~ALL))
    monkeypatch.setattr(NearestWords, "forward", bug[1])
    assert differ(ours(case, planned(case, targets), prompt, tokens), wanted) > 1e-2


real = NearestWords.forward


def cosine(words, rows):
    table = words.weight / words.weight.norm(dim=1, keepdim=True)
    return (rows / rows.norm(dim=-1, keepdim=True)) @ table.T


def test_another_table_is_noticed(case, prompt, targets):
    wanted, tokens = theirs(case, prompt, Rule(~classes(case, prompt, targets), ~ALL))
    name = "model.embed_tokens.weight"
    original = torch_classes.TABLE
    torch_classes.TABLE = "lm_head.weight"
    try:
        found = ours(case, planned(case, targets), prompt, tokens)
    finally:
        torch_classes.TABLE = original
    assert original == name
    assert differ(found, wanted) > 1e-2


def test_keys_as_they_entered_are_noticed(case, prompt, targets):
    hit = classes(case, prompt, targets)
    rule = Rule(ALL, hit, (1.0, 2.0, 2.5))
    plan = planned(case, targets, "freeze=1-2-2.5")
    wanted, tokens = theirs(case, prompt, rule)
    assert differ(ours(case, plan, prompt, tokens), wanted) < 1e-4
    wrong, tokens = theirs(case, prompt, dataclasses.replace(rule, frozen_keys=True))
    assert differ(ours(case, plan, prompt, tokens), wrong) > 1e-3


def test_a_merge_in_decode_is_noticed(case, prompt):
    plan = planned(case, (), "freeze=0-1,method=vt")
    wanted, tokens = theirs(case, prompt, Rule(ALL, ALL, (0.0, 1.0), vt=True))
    assert plan.decode_sees_shallow_vision
    blind = dataclasses.replace(plan, decode_sees_shallow_vision=False)
    assert differ(ours(case, blind, prompt, tokens), wanted) > 1e-2
    assert differ(ours(case, blind, prompt, tokens)[:1], wanted[:1]) < 1e-4  # the prefill hides it


def test_holes_that_are_closed_are_noticed(case, prompt, targets, monkeypatch):
    hit = classes(case, prompt, targets)
    wanted, tokens = theirs(case, prompt, Rule(~hit, ~ALL))
    places = chain._places

    def closed(*given):
        own = places(*given)
        return np.where(own >= 0, np.cumsum(own >= 0) - 1, -1)

    monkeypatch.setattr(chain, "_places", closed)
    assert differ(ours(case, planned(case, targets), prompt, tokens), wanted) > 1e-2


def test_rows_that_only_fill_up_change_nothing(case, prompt, targets):
    """As a bundle runs it: padded to N behind the rows that are left."""
    rows, spans = prompt
    (start, stop), hit = spans[0][0], classes(case, prompt, targets)
    plan = planned(case, targets, "exit=4")
    (entered,) = chain.told_apart(plan, case.weights, rows[0], spans[0])
    assert (entered.index == PADDING).sum() == hit.sum()
    before, image, question = chain.segments(rows, spans)
    order = np.where(entered.index == PADDING, host.INVISIBLE, start + entered.index)
    padded = host.AppendedRows(
        True,
        image.rows[:, torch.from_numpy(entered.source)],
        (start + entered.source)[None].astype(np.int32),
        order[None].astype(np.int32),
        matched=entered.matched[None],
    )
    executor = chain.TorchExecutor(case.model.text, plan, case.weights, 1)
    with torch.no_grad():
        done = host.Chain(plan, executor).prefill([before, padded, question])
    wanted = chain.run(case.weights, case.text, rows, spans, plan).logits
    assert differ(done.logits, wanted) < 1e-5
    assert done.visual_tokens == [int((~hit).sum()), 0]
    assert stop - start == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embedlens:targets=3-2", "targets: found (3, 2), expected integers"),
        ("embedlens:targets=3,freeze=1,keep=9", "found keep=9 beside freeze"),
        ("embedlens:targets=3,freeze=1,which=random", "which: found 'random', expected matched or"),
        ("embedlens:which=random", "found which=random beside no targets"),
        ("embedlens:freeze=0.3", "freeze: found (0.3,), expected layers and halves"),
        ("embedlens:freeze=1-0", "freeze: found (1.0, 0.0), expected layers and halves"),
        ("embedlens:freeze=5,exit=5", "freeze: found (5.0,), expected layers and halves"),
        ("embedlens:targets=3,method=vt", "found method=vt beside no freeze"),
        ("embedlens:entry=2,freeze=1", "freeze: found (1.0,), expected layers and halves"),
        ("embedlens:entry=2,freeze=3,method=vt", "text-blind layers come first"),
        ("embedlens:entry=5,exit=5", "entry: found '5', expected a layer from 0 to 4"),
        ("embedlens:targets=3,entry=2", "entry: found '2'"),
        ("embedlens:exit=7", "exit: found 7, expected a layer from 1 to 6"),
        ("dense:entry=embedlens-9", "entry: found 'embedlens-9', expected a selector (scope"),
    ],
)
def test_what_makes_no_sense_is_refused(text, message):
    name, options = parse_request(text)
    with pytest.raises(PlanError) as error:
        preset(name, LAYERS, 16, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ()}, "entry.targets: found (), expected ids of the vocabulary"),
        ({"targets": (3, 1)}, "entry.targets: found (3, 1), expected ids"),
        ({"removes": "some"}, "entry.removes: found 'some', expected one of matched"),
        ({"selector": "scope"}, "entry.targets: found (1, 3), expected none, as scope knows no"),
        ({"positions": "renumbered"}, "entry.positions: found 'renumbered', expected original"),
    ],
)
def test_entries_by_class_are_checked(change, message):
    plan = preset("embedlens", LAYERS, 16, targets=(1, 3))
    with pytest.raises(PlanError) as error:
        dataclasses.replace(plan, entry=dataclasses.replace(plan.entry, **change))
    assert message in str(error.value)
