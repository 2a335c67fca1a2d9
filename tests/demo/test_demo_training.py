"""The training's parts, each against an obvious slow computation, or against what it claims."""

import math
import random
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from visistage.demo.questions import KINDS, ask
from visistage.demo.scenes import COLOURS, LETTERS, SHAPES, make_scene
from visistage.demo.training import packed
from visistage.demo.training.architecture import build_model, save, start_from
from visistage.demo.training.batches import Batches, BatchMix
from visistage.demo.training.muon import Optimizer, orthogonalise
from visistage.demo.training.recipe import RECIPES, draw_entering, schedule
from visistage.demo.training.state import TrainState
from visistage.demo.training.supervision import (
    PLACES,
    FactHead,
    fact_classes,
    look_loss,
    patch_classes,
    patch_loss,
    patch_owners,
    patch_targets,
    phrase_look_loss,
    phrase_loss,
    tell_loss,
    thing_facts,
)
from visistage.demo.training.tokenizer import build_tokenizer
from visistage.demo.training.train import main
from visistage.demo.worlds import CROWDED, DEMO, PATCH, WORLDS

WIDTH = 24
worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=list(WORLDS))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def drawn(tokenizer):
    """A batch of each world: two scenes, twelve questions each."""
    batches = {}
    for world in WORLDS.values():
        mix = BatchMix(2, 12, weights=RECIPES["demo"].kinds, world=world)
        batches[world.name] = Batches(mix, "test", tokenizer)._drawn(random.Random(3))
    return batches


@pytest.fixture(scope="module")
def model():
    return build_model().eval()


def slow_facts(scene, thing):
    """The facts of a thing, in words."""
    facts = {
        "colour": list(COLOURS).index(thing.colour),
        "shape": SHAPES.index(thing.shape),
        "size": list(scene.world.radii).index(thing.size),
        "same colour": sum(t.colour == thing.colour for t in scene.things),
        "same shape": sum(t.shape == thing.shape for t in scene.things),
        "same size": sum(t.size == thing.size for t in scene.things),
        "alike": sum((t.colour, t.shape) == (thing.colour, thing.shape) for t in scene.things),
        "all": len(scene.things),
    }
    for place in range(scene.world.letters):
        word = thing.word or ""
        letter = LETTERS.index(word[place]) if place < len(word) else len(LETTERS)
        facts[f"letter {place + 1}"] = letter
    return facts


@worlds
def test_facts_of_things_and_patches(world):
    rng = random.Random(1)
    for _ in range(6):
        scene = make_scene(rng, world=world)
        facts, targets, owners = thing_facts(scene), patch_targets(scene), patch_owners(scene)
        names, grid = list(fact_classes(world)), world.side // PATCH
        for thing, row in zip(scene.things, facts, strict=True):
            assert dict(zip(names, row, strict=False)) == slow_facts(scene, thing)
            assert row[-2:].tolist() == pytest.approx([thing.x, thing.y])
        assert len(set(owners) - {0}) == len(scene.things)
        centres = {(int(t.y * grid), int(t.x * grid)) for t in scene.things}
        for patch, (owner, row) in enumerate(zip(owners, targets, strict=True)):
            x, y = (patch % grid + 0.5) / grid, (patch // grid + 0.5) / grid
            assert row[1] == ((patch // grid, patch % grid) in centres)
            if not owner:
                assert row[0] == 0
                assert (row[2:] == -1).all()
                continue
            thing = scene.things[owner - 1]
            assert row[0] == 1
            assert row[2:-PLACES].tolist() == facts[owner - 1, :-2].tolist()
            assert row[-PLACES:].tolist() == pytest.approx(
                [thing.x - x, thing.y - y, thing.x, thing.y], abs=1e-6
            )
            assert math.hypot(thing.x - x, thing.y - y) < thing.radius + 1.5 / grid


@worlds
def test_phrases_end_where_they_are_marked_and_name_what_is_meant(world, tokenizer):
    rng, seen = random.Random(2), set()
    source = Batches(BatchMix(1, 1, world=world), "x", tokenizer)
    for index in range(280):
        scene = make_scene(rng, world=world)
        question = ask(scene, KINDS[index % 7], rng)
        if question is None:
            continue
        row = (f"\n{question.text} ASSISTANT: {question.answer}</s>", scene, question)
        band = source._bands([row] * 4, 1)[-1]
        ids, marks = band.ids[0, 0].tolist(), band.marks[0, 0]
        assert len(question.names) == (2 if question.kind == "relation" else 1)
        for place, mark in enumerate(marks):
            if place >= len(question.names):
                assert (mark == -1).all()
                continue
            end = int(mark[0])
            text = tokenizer.decode(ids[: end + 1])
            assert text.endswith(question.names[place]), (question, text)
            words = re.sub(r"(?<=cross)es$|(?<!cros)s$", "", question.names[place]).split()
            values = [set(words) & set(kind) for kind in (COLOURS, SHAPES, world.radii)]
            fitting = [
                t
                for t in scene.things
                if all(
                    not v or {have} == v
                    for v, have in zip(values, (t.colour, t.shape, t.size), strict=True)
                )
            ]
            assert mark[-2] == len(fitting)
            seen.add((question.kind, len(fitting) == 1))
            if len(fitting) == 1:
                assert scene.things[int(mark[-1])] == fitting[0]
                facts = dict(zip(fact_classes(world), mark[1:].tolist(), strict=False))
                assert facts == slow_facts(scene, fitting[0])
            else:
                assert (mark[1:-2] == -1).all()
                assert mark[-1] == -1
    assert {("count", False), ("yes/no", True), ("relation", True)} <= seen


def test_only_the_second_phrase_is_sought_from_the_end(tokenizer):
    """In "the red object ... the object": the first name's words occur in the second one, too."""
    rng, found = random.Random(4), 0
    source = Batches(BatchMix(1, 1), "x", tokenizer)
    while found < 20:
        scene = make_scene(rng)
        question = ask(scene, "relation", rng)
        if question is None or question.names[0].split()[-1] != question.names[1].split()[-1]:
            continue
        found += 1
        row = (f"\n{question.text} ASSISTANT: {question.answer}</s>", scene, question)
        first, second = source._bands([row] * 4, 1)[-1].marks[0, 0, :, 0].tolist()
        assert first < second


def random_rows(bands, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(band.ids.shape[0], band.ids[0].numel(), WIDTH) for band in bands]


def random_masses(bands, visual, front=3, heads=5, seed=0):
    torch.manual_seed(seed)
    masses = []
    for band in bands:
        images, count, length = band.ids.shape
        mass = torch.randn(images, heads, count * length, front + visual + length)
        masses.append(mass.softmax(-1))
    return masses


def random_head(outputs, seed=0):
    torch.manual_seed(seed)
    head = FactHead(WIDTH, outputs)
    torch.nn.init.normal_(head.linear.weight)
    return head


def normalised(row):
    return row / (row.square().mean() + 1e-6).sqrt()


@worlds
def test_phrase_loss_is_the_sum_of_what_is_asked_of_each_phrase(world, drawn):
    bands, classes = drawn[world.name].bands, fact_classes(world)
    head = random_head(sum(classes.values()) + world.most + 3)
    states = random_rows(bands)
    losses = {name: [] for name in (*classes, "fitting", "place")}
    for hidden, band in zip(states, bands, strict=True):
        images, count, length = band.ids.shape
        for image in range(images):
            for asked in range(count):
                for mark in band.marks[image, asked]:
                    if mark[0] < 0:
                        continue
                    row = hidden[image, asked * length + int(mark[0])]
                    out, start = head.linear(normalised(row)), 0
                    sizes = {**classes, "fitting": world.most + 1}
                    for place, (name, size) in enumerate(sizes.items()):
                        value = mark[-2] if name == "fitting" else mark[1 + place]
                        part = out[start : start + size]
                        start += size
                        if value >= 0:
                            weight = 3 if name.startswith("letter") else 1
                            losses[name].append(-weight * part.log_softmax(-1)[int(value)])
                    if mark[-1] >= 0:
                        losses["place"].append(10 * smooth(out[-2:] - mark[-4:-2]))
    wanted = sum(torch.stack(found).mean() for found in losses.values())
    assert phrase_loss(states, bands, head, world)[0].item() == pytest.approx(wanted.item(), 1e-4)


def smooth(difference, beta=0.03):
    size = difference.abs()
    return torch.where(size < beta, size**2 / (2 * beta), size - beta / 2).mean()


@worlds
def test_tell_loss_is_of_the_row_that_answers(world, drawn):
    bands, head, losses = drawn[world.name].bands, random_head(4), []
    states = random_rows(bands)
    for hidden, band in zip(states, bands, strict=True):
        images, count, length = band.ids.shape
        for image in range(images):
            for asked in range(count):
                (answer,) = (band.targets[image, asked] >= 0).nonzero()[:1]
                out = head.linear(normalised(hidden[image, asked * length + int(answer)]))
                for place, mark in enumerate(band.marks[image, asked]):
                    if mark[-1] >= 0:
                        losses.append(10 * smooth(out[2 * place : 2 * place + 2] - mark[-4:-2]))
    wanted = torch.stack(losses).mean().item()
    assert tell_loss(states, bands, head).item() == pytest.approx(wanted, 1e-4)


@worlds
@pytest.mark.parametrize("half", [False, True], ids=["all", "half of the patches"])
def test_looks_are_shares_of_attention(world, half, drawn):
    batch, looks, named = drawn[world.name], [], []
    owners = batch.owners[:, ::2] if half else batch.owners
    visual = owners.shape[1]
    masses = random_masses(batch.bands, visual)
    for mass, band in zip(masses, batch.bands, strict=True):
        images, count, length = band.ids.shape
        for image in range(images):
            for asked in range(count):
                (answer,) = (band.targets[image, asked] >= 0).nonzero()[:1]
                for thing in band.wanted[image, asked].nonzero().flatten().tolist():
                    own = owners[image] == thing + 1
                    row = mass[image, :3, asked * length + int(answer), 3 : 3 + visual]
                    if own.any():
                        looks.append(-(row[:, own].sum(-1).mean() + 1e-4).log())
                for mark in band.marks[image, asked]:
                    own = owners[image] == mark[-1] + 1
                    row = mass[image, -2:, asked * length + int(mark[0]), 3 : 3 + visual]
                    if mark[-1] >= 0 and own.any():
                        named.append(-(row[:, own].sum(-1).mean() + 1e-4).log())
    wanted = torch.stack(looks).mean().item(), torch.stack(named).mean().item()
    assert look_loss(masses, owners, batch.bands).item() == pytest.approx(wanted[0], 1e-4)
    assert phrase_look_loss(masses, owners, batch.bands).item() == pytest.approx(wanted[1], 1e-4)


def test_patch_loss_leaves_out_what_is_not_there():
    targets = torch.from_numpy(patch_targets(make_scene(random.Random(6))))
    sizes = patch_classes(DEMO)
    torch.manual_seed(0)
    outputs = torch.randn(len(targets), sum(sizes.values()) + PLACES)
    wanted, start = 0.0, 0
    for column, (name, size) in enumerate(sizes.items()):
        known = targets[:, column] >= 0
        part = outputs[known, start : start + size]
        weight = 3 if name.startswith("letter") else 1
        wanted += weight * F.cross_entropy(part, targets[known, column].long())
        start += size
    seen = targets[:, 0] > 0
    wanted += 10 * smooth(outputs[seen, -PLACES:] - targets[seen, -PLACES:])
    assert patch_loss(outputs, targets, DEMO)[0].item() == pytest.approx(wanted.item(), 1e-4)


@pytest.mark.parametrize("close_up", [False, True])
@pytest.mark.parametrize("kept", [None, 37])
def test_dropped_tokens_leave_gaps_in_the_positions_or_none(model, kept, close_up):
    """Against transformers' decoder, asked row by row with the positions written down."""
    torch.manual_seed(0)
    features, prefix = torch.randn(2, 144, 160), torch.tensor([1, 60, 61])
    ids = torch.randint(5, 400, (2, 3, 7))
    entering = None if kept is None else torch.rand(2, 144).topk(kept, -1).indices.sort(-1).values
    with torch.no_grad():
        found = packed.forward(
            model, features, prefix, [ids], entering=entering, close_up=close_up
        )[0]
    lm = model.model.language_model
    for image in range(2):
        chosen = range(144) if entering is None else entering[image].tolist()
        at = [3 + place for place in chosen]
        after = 147
        if close_up:
            at = [3 + place for place in range(len(chosen))]
            after = 3 + len(chosen)
        places = torch.tensor([[0, 1, 2, *at, *range(after, after + 7)]])
        for asked in range(3):
            parts = (
                lm.embed_tokens(prefix),
                features[image][list(chosen)],
                lm.embed_tokens(ids[image, asked]),
            )
            with torch.no_grad():
                theirs = lm(inputs_embeds=torch.cat(parts)[None], position_ids=places)
            rows = theirs.last_hidden_state[0, -7:]
            torch.testing.assert_close(found[image, asked], rows, atol=2e-4, rtol=1e-3)


def test_what_comes_in_is_in_order_and_things_come_first_in_most_images():
    torch.manual_seed(1)
    owners = torch.zeros(40, 144, dtype=torch.long)
    owners[:, 50:60] = 1
    counts, whole = [], []
    for _ in range(30):
        entering = draw_entering(owners)
        assert (entering.diff(dim=1) > 0).all()
        assert entering.max() < 144
        counts.append(entering.shape[1])
        whole += (owners.gather(1, entering).sum(1) == 10).tolist()
    assert min(counts) >= 36
    assert max(counts) <= 120
    assert np.mean(counts) < 78
    assert 0.5 < np.mean(whole) < 0.8


def test_the_rate_follows_the_images():
    rates = [schedule(images / 1000) for images in range(1001)]
    assert rates[0] == 0
    assert rates[20:401] == [1.0] * 381
    assert all(a > b for a, b in pairwise(rates[400:]))
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert schedule(0.44, flat=0.45) == 1


def test_bf16_newton_schulz_gives_nearly_orthogonal_matrices():
    torch.manual_seed(0)
    batch = torch.randn(3, 40, 24)
    for dtype, slack in ((torch.float32, 0.35), (torch.bfloat16, 0.37)):
        found = orthogonalise(batch, dtype)
        assert found.dtype == torch.float32
        sizes = torch.linalg.svdvals(found)
        assert (sizes - 1).abs().max() < slack


def test_a_head_says_nothing_at_first_and_ignores_the_length_of_a_row():
    head = FactHead(WIDTH, 5)
    rows = torch.randn(3, WIDTH)
    assert (head(rows) == 0).all()
    head = random_head(5)
    torch.testing.assert_close(head(rows), head(7 * rows), atol=1e-4, rtol=1e-4)


def test_a_resumed_state_is_the_saved_one(tmp_path):
    def fresh(seed):
        torch.manual_seed(seed)
        body, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        one = Optimizer([body.weight], [body.bias, *head.parameters()])
        return body, head, one, TrainState(body, tmp_path / "state.pt")

    def step(body, head, one, rows):
        head(body(rows)).square().sum().backward()
        one.step(1.0)

    rows = torch.randn(3, 4)
    body, head, one, state = fresh(0)
    assert not state.begin("decoder", {"head": head}, {"model": one})
    step(body, head, one, rows)
    state.advance(16)
    state.save()
    again = fresh(1)
    again[3].read()
    assert (again[3].phase, again[3].images, again[3].step) == ("decoder", 16, 1)
    assert again[3].begin("decoder", {"head": again[1]}, {"model": again[2]})
    for each in ((body, head, one), again[:3]):
        step(*each, rows)
    assert torch.equal(body.weight, again[0].weight)
    assert torch.equal(head.weight, again[1].weight)
    later = fresh(2)
    later[3].read()
    assert not later[3].begin("another", {}, {})
    assert (later[3].images, later[3].step) == (0, 0)


def test_a_start_stretches_the_positions_and_copies_the_rest(model, tokenizer, tmp_path):
    save(model, tokenizer, tmp_path)
    same, wide = build_model(seed=1), build_model(CROWDED, seed=1)
    name = "model.vision_tower.embeddings.position_embedding.weight"
    start_from(same, tmp_path)
    start_from(wide, tmp_path)
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(same.state_dict()[key], weight, atol=1e-3, rtol=1e-3)
        if key != name:
            torch.testing.assert_close(wide.state_dict()[key], weight, atol=1e-3, rtol=1e-3)
    small, large = same.get_parameter(name), wide.get_parameter(name)
    assert large.shape == (577, 128)
    assert torch.equal(small[0], large[0])
    blocks = large[1:].view(12, 2, 12, 2, 128).mean((1, 3)).flatten(0, 1)
    near = F.cosine_similarity(blocks, small[1:], dim=-1)
    assert near.min() > 0.9
    assert F.cosine_similarity(blocks, small[1:].roll(1, 0), dim=-1).mean() < 0.5


def test_resuming_what_was_never_begun_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--resume", "--state", str(tmp_path / "none.pt")])
    assert "no state in" in capsys.readouterr().err
