"""Published values of ``generation_config.json``: bundles carry them, answers follow them."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from visistage.cli.main import main
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.texts import text_facts
from visistage.graphs.bundle import Bundle
from visistage.runtime.session import load
from visistage.runtime.text.generation import GenerationRules
from visistage.runtime.text.sampling import Sampling
from visistage.tests.runtime.test_sampling import hf_distribution
from visistage.tests.support import qwen
from visistage.tests.support.asking import picture
from visistage.tests.support.served import data_uri, question, serving
from visistage.tests.support.verified import rewrite

ENDS = [qwen.SPECIALS["<|im_end|>"], qwen.SPECIALS["<|endoftext|>"]]
PUBLISHED = {
    "qwen2_vl": {"do_sample": True, "temperature": 0.01, "top_k": 1, "eos_token_id": ENDS},
    "qwen2_5_vl": {
        "do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05, "eos_token_id": ENDS,
    },
    "qwen3_vl": {
        "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "eos_token_id": ENDS,
    },
    "internvl": {"_from_model_config": True, "eos_token_id": ENDS[0]},
    "smolvlm": {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": ENDS[0]},
}  # fmt: skip
"""By family, over the ids of a toy."""

SHOWN = {
    "qwen2_vl": "drawn, temperature 0.01, top_k 1;",
    "qwen2_5_vl": "drawn, temperature 1e-06, top_k 50, repetition_penalty 1.05;",
    "qwen3_vl": "drawn, temperature 0.7, top_k 20, top_p 0.8;",
    "internvl": "greedy;",
    "smolvlm": "greedy;",
}
QUESTION, NEW = "What is this?", 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return qwen.make_checkpoint(tmp_path_factory.mktemp("published") / "toy")


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    """A bundle that carries what a family publishes; the graphs are those of one build."""
    built = make_bundle(str(checkpoint), plan="dense", out=tmp_path_factory.mktemp("built"))

    def bundle(family) -> Bundle:
        path = tmp_path_factory.mktemp(family) / "bundle"
        copy = Bundle.open(shutil.copytree(built.path, path))
        return rewrite(copy, generation=carried(checkpoint, family, path.parent / "toy"))

    return bundle


def carried(checkpoint, family, copy):
    """Facts that a build takes from a checkpoint whose file says what the family publishes."""
    shutil.copytree(checkpoint, copy)
    (copy / "generation_config.json").write_text(json.dumps(PUBLISHED[family]))
    return text_facts(open_checkpoint(str(copy))).generation


def asked(session, **settings):
    return session.infer(picture(1), QUESTION, max_tokens=NEW, **settings).tokens


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_build_takes_what_is_published(checkpoint, family, tmp_path):
    published = PUBLISHED[family]
    generation = carried(checkpoint, family, tmp_path / "toy")
    assert published.items() <= generation.items()
    rules = GenerationRules.read(generation, qwen.VOCAB)
    ends = published["eos_token_id"]
    assert rules.eos == set(ends if isinstance(ends, list) else [ends])
    drawn = published.get("do_sample", False)
    assert rules.sampling.greedy is not drawn
    random = np.random.default_rng(7)
    logits, history = random.normal(0, 4, qwen.VOCAB).astype(np.float32), [3, 5, 5, 250]
    found = rules.sampling.probabilities(logits, history)
    wanted = hf_distribution(published, logits, history) if drawn else np.eye(300)[logits.argmax()]
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_answers_are_those_of_transformers(checkpoint, bundles, family):
    """Drawn at a temperature of nearly nothing, so that one token is left; with the penalty."""
    judge = qwen.Judge(checkpoint)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    image = picture(1)
    inputs = judge.inputs(messages, [image])
    settings = {**PUBLISHED[family], "eos_token_id": None, "max_new_tokens": NEW}
    made = judge.model.generate(**inputs, **settings, min_new_tokens=NEW)
    wanted = made[0, inputs["input_ids"].shape[1] :].tolist()
    with load(bundles(family).path) as session:
        session.eos = frozenset()
        found = session.infer(image, messages, max_tokens=NEW).tokens
        plain = session.infer(image, messages, max_tokens=NEW, sampling=Sampling()).tokens
    assert list(found) == wanted
    assert found != plain, "the penalty does something"


def test_every_entry_point_draws_as_published(bundles, tmp_path):
    bundle = bundles("qwen3_vl")
    own = Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=5)
    Image.fromarray(picture(1)).save(tmp_path / "1.png")
    with load(bundle.path) as session:
        assert session.eos == set(ENDS)
        wanted = asked(session, seed=5)
        assert wanted == asked(session, sampling=own)
        assert session.chat(picture(1)).ask(QUESTION, max_tokens=NEW, seed=5).tokens == wanted
        greedy = asked(session, temperature=0)
        assert greedy == asked(session, sampling=Sampling()) != wanted
        text = session.infer(picture(1), QUESTION, max_tokens=NEW, seed=5).text
    words = ["infer", tmp_path / "1.png", QUESTION, "--bundle", bundle.path, "--max-tokens", NEW]
    for more, tokens in ((["--seed", 5], wanted), (["--temperature", 0], greedy)):
        done = CliRunner().invoke(main, [*map(str, [*words, *more]), "--json"])
        assert json.loads(done.stdout)["tokens"] == list(tokens)
    with serving({"toy": bundle}) as server:
        server.engine.eos = frozenset(ENDS)
        body = question(QUESTION, data_uri(1), max_tokens=NEW, seed=5)
        status, answer, _ = server.ask(body)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, text)


def test_any_of_several_tokens_ends_an_answer(bundles):
    bundle = bundles("internvl")
    with load(bundle.path) as session:
        session.eos = frozenset()
        whole = asked(session)
    at = next(at for at in range(2, NEW) if whole[at] not in whole[:at])
    ended = rewrite(bundle, generation={"eos_token_id": [ENDS[0], whole[at]]})
    with load(ended.path) as session:
        answer = session.infer(picture(1), QUESTION, max_tokens=NEW)
    assert (answer.finish, whole[: len(answer.tokens)]) == ("eos", answer.tokens)
    assert at <= len(answer.tokens) <= at + 1


@pytest.mark.parametrize("family", PUBLISHED)
def test_inspect_says_how_answers_are_made(bundles, family):
    done = CliRunner().invoke(main, ["inspect", str(bundles(family).path)], env={"COLUMNS": "150"})
    ends = ", ".join(map(str, sorted(ENDS))) if "qwen" in family else str(ENDS[0])
    assert f"{SHOWN[family]} end at {ends}:" in done.stdout
