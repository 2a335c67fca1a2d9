"""Plans by classes of rows, and plans without some layers, in the runtime: every back end."""

import pytest
import torch
from visistage.calib.samples import Sample
from visistage.calib.words import frequent_words
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.graphs.errors import ImageError
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.staged import Staged

pytest.importorskip("onnxruntime")

NEW, LAYERS = 10, 6
PLANS = {
    "removed": "embedlens:targets={ids},exit=5",
    "capped": "embedlens:targets={ids},which=unmatched,keep=5",
    "frozen": "embedlens:targets={ids},freeze=0-0.5-1",
    "shallow": "fastv:k=3,r=0.5,drop=1,drop_attention=4,drop_mlp=0",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("toy"), layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def words(checkpoint):
    samples = [Sample(str(seed), picture(seed), "What?", "") for seed in (1, 2, 3)]
    return frequent_words(open_checkpoint(str(checkpoint)), samples, 400)


@pytest.fixture(scope="module")
def bundles(checkpoint, words, tmp_path_factory):
    built = {}

    def get(name, target="cpu"):
        if (name, target) not in built:
            ids = "-".join(str(id_) for id_ in sorted(word.id for word in words[:2]))
            plan, out = PLANS[name].format(ids=ids), tmp_path_factory.mktemp("engines")
            built[name, target] = make_bundle(str(checkpoint), plan=plan, target=target, out=out)
        return built[name, target]

    return get


def ask(session, image, question="What is it?"):
    session.eos = frozenset()
    return list(session.infer(image, question, max_tokens=NEW).tokens)


def test_words_are_counted_over_images(words):
    shares = [word.share for word in words]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(3, abs=1e-6)  # every row has three
    assert {word.images for word in words} <= {1 / 3, 2 / 3, 1.0}
    assert sum(word.share * word.norm for word in words) == pytest.approx(3, abs=1e-3)
    assert all(word.attention > 0 for word in words)


@pytest.mark.parametrize("target", ["cpu", "cpu-portable"])
@pytest.mark.parametrize("name", PLANS)
def test_every_lowering_answers_as_torch_does(checkpoint, bundles, name, target):
    judge = Staged(checkpoint, bundles(name, target).manifest.plan, torch.float32)
    wanted = [judge.answer(picture(seed), "What is it?", NEW)[0] for seed in (1, 2)]
    assert wanted[0] != wanted[1]
    with load(bundles(name, target).path) as session:
        assert [ask(session, picture(seed)) for seed in (1, 2)] == wanted


@pytest.mark.parametrize("name", PLANS)
def test_an_image_that_was_seen_answers_as_a_new_one(bundles, name, tmp_path):
    with load(bundles(name).path) as session:
        ask(session, picture(1), "And how many?")
        ask(session, picture(2))
        warm = ask(session, picture(1))
        both = ask(session, [picture(2), picture(1)])
        session.save_image(picture(1), tmp_path / "image.safetensors")
    with load(bundles(name).path) as session:
        assert ask(session, [picture(2), picture(1)]) == both
        assert ask(session, tmp_path / "image.safetensors") == warm
    with load(bundles(name).path) as session:
        assert ask(session, picture(1)) == warm


def test_an_image_of_other_classes_is_refused(bundles, tmp_path):
    file = tmp_path / "image.safetensors"
    with load(bundles("removed").path) as session:
        session.save_image(picture(1), file)
    with load(bundles("frozen").path) as session, pytest.raises(ImageError, match="another plan"):
        ask(session, file)


def test_an_answer_tells_what_entered(bundles, words):
    with load(bundles("removed").path) as session:
        session.eos = frozenset()
        answer = session.infer(picture(1), "What is it?", max_tokens=2)
        image = session.encode_image(session.open(picture(1)))
    real = image.patches[0][image.patches[0] >= 0]
    assert 0 < len(real) < 16
    assert answer.shown[0].patches.tolist() == real.tolist()
    assert answer.plan.visual_tokens_per_layer == (*[len(real)] * 5, 0)
    assert not image.matched[0].any()
