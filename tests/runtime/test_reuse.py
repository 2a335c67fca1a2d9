"""An image is computed once: every later question about it answers like a fresh session.

Every preset, over bundles of a toy; and a plan with one selection, which is blind to the question.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from visistage.graphs.chain.executor import Kept, observed
from visistage.graphs.contract import INVISIBLE
from visistage.graphs.families.family import in_one_run
from visistage.graphs.plan.routing import ROUTERS
from visistage.graphs.presets.presets import PRESETS
from visistage.runtime.image_cache import LEAST_CACHE_BYTES, default_cache_bytes
from visistage.runtime.prompt_parts import PromptImage
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.built import built_once
from visistage.tests.support.routed_checkpoint import add_routers
from visistage.tests.support.staged import Staged
from visistage.tests.support.stand_ins import stand_in, write_engines

LAYOUT = in_one_run(16)
Q1 = "What is this?"
Q2 = "Describe the picture in detail, with every object in it, and say where it is. " * 3
SEVERAL = "v2drop:before=2,keep=4"
NEW = 8
TOLERANCE = 2e-4
"""Of logits, relative to their spread, where the same rows go through calls of other sizes."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("toy"), layers=8, kv_heads=2)


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    return built_once(checkpoint, tmp_path_factory)


def fresh(session):
    """Make a session forget all it computed."""
    session.context.clear()
    session.visual_rows.clear()
    return session


def assert_close(found, wanted):
    assert np.abs(found - wanted).max() <= TOLERANCE * wanted.std()


def rows_by_stage(session, ask):
    """What ``ask`` returns, and the rows of each call that it makes, by stage."""
    counts = {}

    def note(method, given, *_):
        if method == "append":
            counts.setdefault(given[0], []).append(given[3].shape[1])

    with observed(session.executor, note):
        result = ask()
    return result, counts


LATE = "dense:entry=uniform-9-at3"
MORE = (
    *("exit-only:entry=divprune-6", "fastv:entry=scope-8", LATE),
    *("skipgpt:share=0.6", "mod:form=capacity,entry=scope-9", "dllm:entry=scope-9"),
    *("vica:layers=0-1-4,prefix=frozen", "vica:layers=2-3-5,prefix=updated,entry=scope-9"),
)


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """Builder of plans with routers over a checkpoint that has them; and that checkpoint."""
    known = {}

    def get(name):
        kind = name.partition(":")[0]
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            own = add_routers(toy.make_checkpoint(folder, layers=8, kv_heads=2), kind)
            known[kind] = built_once(own, tmp_path_factory), own
        build, own = known[kind]
        return build(name), own

    return get


@pytest.mark.parametrize("name", [*(name for name in PRESETS if name != "vica"), *MORE])
def test_questions_about_a_cached_image_are_answered_like_fresh_ones(
    name, bundles, checkpoint, routed
):
    """Q1, long Q2, Q1; another image in between; two in one prompt: torch, fresh, and cached.

    Every preset, and some with an entry.
    """
    one, other = picture(1), picture(2)
    if name.partition(":")[0] in ROUTERS:
        bundle, checkpoint = routed(name)
    else:
        bundle = bundles(name)
    plan = bundle.manifest.plan
    assert (bundle.manifest.prefix is None) == plan.whole_prompt
    judge = Staged(checkpoint, bundle.manifest.plan, torch.float32)
    with load(bundle.path) as session, load(bundle.path, cache_bytes=0) as anew:
        session.eos = anew.eos = frozenset()
        opened = session.open(one)
        for images, question in (
            (opened, Q1),
            (opened, Q2),
            (opened, Q1),
            (other, Q1),
            (opened, Q2),
            ([other, one], Q1),
            (opened, Q1),
        ):
            answer = session.infer(images, question, max_tokens=NEW)
            wanted = anew.infer(one if images is opened else images, question, max_tokens=NEW)
            assert answer.tokens == wanted.tokens
            assert answer.plan == wanted.plan
            # Where rows compete, the stored prefix is a call of its own; the judge has it in one.
            if images is opened and (plan.whole_prompt or not plan.fixed_calls):
                assert list(answer.tokens) == judge.answer(one, question, NEW)[0]
        assert_close(session.score(opened, Q2, answer.tokens), anew.score(one, Q2, answer.tokens))


def test_the_stages_behind_a_drop_hold_what_comes_before_an_image(bundles):
    """Text before the image is not run again, nor a row of the image."""
    bundle = bundles("exit-only")
    with load(bundle.path) as session:
        context, ids = session.context, bundle.manifest.prefix.ids
        image = PromptImage(
            "one", lambda: session.encode_image(session.decode_image(picture(1))), LAYOUT
        )
        first, second = ([*ids, 7, 8, 9], image, [11, 12]), ([*ids, 7, 8, 9], image, [13] * 5)
        wanted = context.prefill(list(second)).logits
        context.clear()
        context.prefill(list(first))
        done, rows = rows_by_stage(session, lambda: context.prefill(list(second)))
        assert rows == {0: [5], 1: [5]}
        assert_close(done.logits, wanted)
        context.keep()
        other = replace(
            image,
            key="other",
            encoded=lambda: session.executor.encode(session.decode_image(picture(2)).pixels),
        )
        context.prefill([[*ids, 7, 8, 9], other, [11]])
        done, rows = rows_by_stage(session, lambda: context.prefill(list(second)))
        assert rows == {0: [5], 1: [5]}
        assert_close(done.logits, wanted)


def test_stages_that_an_image_passes_by_run_nothing_for_it(bundles):
    with load(bundles(LATE).path) as session:
        _, rows = rows_by_stage(session, lambda: session.infer(picture(1), Q1, max_tokens=1))
        count = rows[0][0]
        assert rows == {0: [count], 1: [9 + count]}
        _, rows = rows_by_stage(session, lambda: session.infer(picture(1), Q1, max_tokens=1))
        assert rows == {0: [count], 1: [count]}


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize(("plan", "copies"), [("exit-only", 5), (LATE, 6)])
def test_prompts_with_text_between_images_go_on_where_they_part(
    bundles, monkeypatch, device, plan, copies
):
    """From nothing, from the first image, from both, and from images that others pushed out."""
    bundle = bundles(plan)
    if device:  # small engines: padding may not pile up in front of what is kept
        stand_in(monkeypatch)
        bundle = write_engines(bundles(plan, target="rtx", contexts=(128,)))
    head = [*bundle.manifest.prefix.ids, 7, 8, 9]
    with load(bundle.path) as session, load(bundle.path, cache_bytes=0) as anew:

        def image(number, of):
            opened = of.decode_image(picture(number))
            return PromptImage(opened.key, lambda: of.encode_image(opened), opened.layout)

        def prompts(of):
            one, two = image(1, of), image(2, of)
            yield [head, one, [11] * 40]
            yield [head, one, [21, 22], two, [30, 31]]
            yield [head, one, [21, 22], two, [33] * 30]
            yield [head, one, [12] * 50]
            yield [head, two, one, [13, 14]]
            yield [head, one, [21, 22], two, [34] * 20]
            yield [[21, 22], two, [35]]
            yield [head, two, one, [36] * 9]
            yield [[15] * 60]
            yield [head, one, [37] * 33]

        kept, put = [], session.context.cached.put
        session.context.cached.put = lambda *given: kept.append(given[1]) or put(*given)
        for mine, other in zip(prompts(session), prompts(anew), strict=True):
            found, wanted = [], []
            for context, parts, logits in (
                (session.context, mine, found),
                (anew.context, other, wanted),
            ):
                context.ensure_capacity(parts, 3)
                logits.append(context.prefill(parts).logits[0])
                logits.extend(context.decode(token) for token in (5, 6))
                context.keep()
            limit = 1e-2 if device else TOLERANCE
            error = np.abs(np.stack(found) - np.stack(wanted)).max()
            assert error <= limit * np.std(wanted)
        assert len(kept) == copies
        for cached in kept:
            assert all((held.order != INVISIBLE).all() for held in cached.stages)


@pytest.mark.parametrize("device", [False, True])
def test_a_selection_that_is_blind_to_questions_is_made_once(bundles, monkeypatch, device):
    bundle, one, two = bundles(SEVERAL), picture(1), picture(2)
    if device:
        stand_in(monkeypatch)
        bundle = write_engines(bundles(SEVERAL, target="rtx", contexts=(1024,)))
    asked = [(one, Q1), (one, Q2), (one, Q1), (two, Q1), (one, Q2), ([one, two], Q1), (one, Q1)]
    with load(bundle.path, cache_bytes=0) as session:
        session.eos = frozenset()
        wanted = [session.infer(*both, max_tokens=NEW) for both in asked]
    assert len({answer.tokens for answer in wanted}) == 4
    with load(bundle.path) as session:
        session.eos = frozenset()
        for both, anew in zip(asked, wanted, strict=True):
            answer = session.infer(*both, max_tokens=NEW)
            assert (answer.tokens, answer.plan) == (anew.tokens, anew.plan)
            assert len(answer.plan.kept) == bundle.manifest.plan.keep
        _, rows = rows_by_stage(session, lambda: session.infer(one, Q1, max_tokens=1))
    assert len(rows[0]) == 1
    assert rows[0] == rows[1]
    assert rows[0][0] < 35


def test_a_blind_selection_is_that_of_torch(bundles, checkpoint):
    """Over calls of other sizes: torch takes the whole prompt, the session a question alone."""
    bundle = bundles(SEVERAL)
    plan = bundle.manifest.plan
    judge = Staged(checkpoint, plan, torch.float32)
    with load(bundle.path) as session:
        session.eos = frozenset()
        opened = session.open(picture(1))
        for question in (Q1, Q2, Q1):
            tokens, wanted, _ = judge.answer(picture(1), question, NEW)
            assert list(session.infer(opened, question, max_tokens=NEW).tokens) == tokens
            assert_close(session.score(opened, question, tokens[:-1]), wanted.numpy())


def spoilt(cached, **changes):
    """What is kept of an image, with changes of its last stage."""
    *rest, last = cached.stages
    return replace(cached, stages=(*rest, replace(last, **changes)))


@pytest.mark.parametrize("bug", ["nothing", "image", "plan", "slot", "rows"])
def test_what_is_kept_wrongly_shows_in_the_answer(bundles, bug):
    """Another image's slots, another plan's, and one slot fewer: the comparison notices each."""
    bundle = bundles(SEVERAL)
    with load(bundle.path, cache_bytes=0) as session:
        wanted = session.score(picture(1), Q2, [5, 6])
    with load(bundle.path) as session:
        session.open(picture(1))
        context = session.context
        key = context.current_key
        cached = context.cached.get(key)
        session.open(picture(2))
        other = context.cached.get(context.current_key)
        assert context.current_key != key
        last = cached.stages[-1]
        planted = {
            "nothing": cached,
            "image": other,
            "slot": spoilt(
                cached,
                order=last.order[:-1],
                visual=last.visual[:-1],
                caches={name: cache[:, :, :-1] for name, cache in last.caches.items()},
            ),
            "rows": replace(cached, stages=(other.stages[0], cached.stages[1])),
        }
        if bug == "plan":  # one that keeps other rows of the same image
            best = session.executor.select
            session.executor.select = lambda edge, feeds: worst(best(edge, feeds), feeds)
            session.context.clear()
            session.open(picture(1))
            planted["plan"] = context.cached.get(key)
            session.open(picture(2))
        context.cached.put(key, planted[bug], planted[bug].nbytes)
        found = session.score(picture(1), Q2, [5, 6])
    error = np.abs(found - wanted).max() / wanted.std()
    assert (error > 100 * TOLERANCE) == (bug != "nothing")


def worst(kept, feeds):
    """Keep rows beside the best ones."""
    rows, positions, order = (feeds[name] for name in ("rows", "positions", "order"))
    index = np.setdiff1d(np.arange(order.shape[1]), np.searchsorted(order[0], kept.order[0]))
    index = index[: kept.order.shape[1]]
    return Kept(rows[:, index], positions[:, index], order[:, index], kept.scores)


def test_plans_of_one_image_have_caches_of_their_own(bundles):
    """The key says how far an image went, so that a stage's slots never pass for another's."""
    keys = set()
    for name in ("dense", "exit-only"):
        with load(bundles(name).path) as session:
            session.open(picture(1))
            keys.add(session.context.current_key)
    assert len(keys) == 2


def test_an_image_that_was_pushed_out_is_computed_again(bundles):
    bundle = bundles(SEVERAL)
    with load(bundle.path) as session:
        session.open(picture(1))
        nbytes = session.context.cached.nbytes
    with load(bundle.path, cache_bytes=3 * nbytes) as session:  # room for two
        session.eos = frozenset()
        wanted = [session.infer(picture(n), Q1, max_tokens=NEW).tokens for n in range(3)]
        assert len(session.context.cached) == 2
        assert session.context.cached.nbytes == 2 * nbytes <= session.context.cached.limit
        again = [session.infer(picture(n), Q1, max_tokens=NEW).tokens for n in range(3)]
        assert again == wanted


def test_what_no_later_stage_needs_is_not_kept(bundles):
    """All bytes are counted, and the rows that stage 0 returned kept only for a selection."""
    for name in ("dense", "exit-only", "visipruner"):
        with load(bundles(name).path) as session:
            session.open(picture(1))
            cached = session.context.cached.get(session.context.current_key)
            config, plan = session.bundle.manifest.config, session.bundle.manifest.plan
            kv = 2 * config.text.kv_heads * config.text.head_dim * plan.stages[0].depth * 4
            slots = config.visual_tokens * (kv + 4 + 1)
            rows = config.visual_tokens * (config.text.hidden * 4 + 4 + 4 + 1)
            assert (cached.rows is None) == (name != "visipruner")
            assert cached.nbytes == slots + rows * (name == "visipruner")
            assert session.context.cached.nbytes == cached.nbytes


def test_images_take_as_much_as_the_weights_and_never_much_of_what_is_free():
    assert default_cache_bytes(1 << 40, 1 << 20) == LEAST_CACHE_BYTES
    assert default_cache_bytes(1 << 40, 1 << 30) == 1 << 30
    assert default_cache_bytes(1 << 30, 1 << 30) == 1 << 26
    assert default_cache_bytes(1 << 20, 1) == 1 << 16
