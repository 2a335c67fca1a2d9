"""Agreement counts tokens along the dense answer, whole answers, and where they part."""

import json
import math

import numpy as np
import pytest
from visistage.calib.evaluate import Share
from visistage.calib.plan_search.agreement import (
    TOP_TOKENS,
    Agreement,
    agreement,
    dense_answers,
    divergence,
    log_softmax,
)
from visistage.calib.samples import Sample
from visistage.graphs.errors import ImageError
from visistage.runtime.answer import Answer, PlanFacts, Timings
from visistage.runtime.text.sampling import Sampling

EOS, VOCAB = 2, 40
SAMPLES = [Sample(name, f"{name}.png", name, "") for name in ("one", "long", "cut", "silent")]
SAID = {"one": [7, EOS], "long": [5, 6, 7, 8, EOS], "cut": [9, 9, 9, 9, 9, 9], "silent": [EOS]}
LONGEST = 6


class Scripted:
    """A session that says ``said``, and is surer of it the larger ``sure`` is."""

    sampling = Sampling(temperature=0.7, repetition_penalty=1.3)

    def __init__(self, said=SAID, sure=4.0):
        self.said, self.sure, self.seen = said, sure, []

    def infer(self, image, prompt, *, max_tokens, sampling):
        assert (sampling.temperature, sampling.repetition_penalty) == (0.0, 1.0)
        if "bad" in str(image):
            raise ImageError(f"{image}: damaged")
        tokens = tuple(self.said[prompt][:max_tokens])
        finish = "eos" if tokens[-1] == EOS else "length"
        return Answer(
            "", tokens, finish, Timings(1, {}, 1, None, 1), PlanFacts("p", 0, 0, 4, 9, None)
        )

    def score(self, image, prompt, tokens):
        self.seen.append((prompt, tuple(tokens)))
        rng = np.random.default_rng(len(prompt))
        logits = rng.normal(0, 0.1, (len(tokens) + 1, VOCAB)).astype(np.float32)
        for row, token in enumerate(self.said[prompt][: len(logits)]):
            logits[row, token] += self.sure
        return logits


def referred(session=None, samples=SAMPLES):
    return dense_answers(session or Scripted(), samples, LONGEST)


def test_the_dense_model_agrees_with_itself():
    found = agreement(Scripted(), referred())
    assert found.tokens == Share(1 + 4 + 6 + 1, 12)  # ends are left out, but for the silent one
    assert found.answers == Share(4, 4)
    assert found.divergences == (None,) * 4
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_a_model_is_forced_along_the_dense_answer():
    other = Scripted({**SAID, "long": [5, 1, 7, 1, EOS]})
    found = agreement(other, referred())
    assert other.seen[1] == ("long", (5, 6, 7, 8))  # not along its own
    assert found.tokens == Share(10, 12)
    assert found.answers == Share(3, 4)
    assert found.divergences == (None, 1, None, None)
    assert found.kl > 0.1


def test_an_answer_that_only_ends_elsewhere_is_another_answer():
    found = agreement(Scripted({**SAID, "one": [7, 8, 9]}), referred())
    assert found.tokens == Share(12, 12)
    assert found.answers == Share(3, 4)
    assert found.divergences[0] == 1
    speaks = agreement(Scripted({**SAID, "silent": [4]}), referred())
    assert speaks.tokens == Share(11, 12)


def test_every_answer_counts_and_an_image_that_cannot_be_read_is_an_error():
    ticks = []
    found = dense_answers(Scripted(), SAMPLES[:2], LONGEST, ticks.append)
    assert [dense.sample.name for dense in found] == ["one", "long"]
    assert ticks == [1, 1]
    with pytest.raises(ImageError, match=r"bad\.png: damaged"):
        dense_answers(Scripted(), [Sample("data:2", "bad.png", "one", "")], LONGEST)


def test_divergence_is_the_textbook_one_where_all_tokens_are_kept():
    (one,) = dense_answers(Scripted(sure=1.0), SAMPLES[1:2], LONGEST)
    assert one.ids.shape[1] == VOCAB < TOP_TOKENS
    p = np.exp(log_softmax(Scripted(sure=1.0).score("", "long", one.tokens[:-1])))
    q = np.exp(log_softmax(Scripted(sure=3.0).score("", "long", one.tokens[:-1])))
    expected = (p * np.log(p / q)).sum(1)
    assert divergence(one, np.log(q)) == pytest.approx(expected, rel=1e-4)


def test_divergence_with_few_tokens_kept_is_below_the_true_one(monkeypatch):
    monkeypatch.setattr("visistage.calib.plan_search.agreement.TOP_TOKENS", 3)
    (one,) = dense_answers(Scripted(sure=1.0), SAMPLES[1:2], LONGEST)
    assert one.ids.shape == (5, 3)
    p = log_softmax(Scripted(sure=1.0).score("", "long", one.tokens[:-1]))
    q = log_softmax(Scripted(sure=3.0).score("", "long", one.tokens[:-1]))
    true = (np.exp(p) * (p - q)).sum(1)
    coarse = divergence(one, q)
    assert (coarse <= true + 1e-6).all()
    assert (coarse > 0.5 * true).all()
    assert divergence(one, p) == pytest.approx(0, abs=1e-6)


def test_intervals_are_wilsons():
    def direct(p, n, z=1.959963984540054):
        # The roots of (p - x)^2 = z^2 x (1 - x) / n.
        a, b, c = 1 + z * z / n, -(2 * p + z * z / n), p * p
        half = math.sqrt(b * b - 4 * a * c)
        return (-b - half) / (2 * a), (-b + half) / (2 * a)

    for right, total in ((81, 263), (1, 29), (148, 149)):
        assert Share(right, total).interval == pytest.approx(direct(right / total, total))
    assert Share(40, 40).interval == (pytest.approx(0.9124, abs=1e-4), 1.0)
    assert Share(0, 40).interval == (0.0, pytest.approx(0.0876, abs=1e-4))
    assert Share(0, 0).interval == (0.0, 1.0)


def test_the_json_form():
    found = Agreement(Share(9, 10), Share(2, 4), 0.25, (None, 0, 3, None))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["prompts"] == 4
    assert data["divergences"] == {"0": 1, "3": 1}
    assert data["tokens"]["share"] == 0.9
    assert data["tokens"]["low"] < 0.9 < data["tokens"]["high"]
