"""Bias, log-probabilities and schemas of answers, and many questions from a file."""

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from PIL import Image
from visistage import runtime
from visistage.compile.build import make_bundle
from visistage.graphs.bundle import Bundle
from visistage.graphs.errors import CapacityError, DataError, PromptError
from visistage.runtime.batch import BatchFile, BatchQuestion, infer_batch
from visistage.runtime.engine import Engine
from visistage.runtime.settings import AnswerSettings
from visistage.runtime.text.grammar import MAX_SCHEMA_CHARS, Grammars
from visistage.runtime.writing import token_logprob
from visistage.tests.support.asking import picture

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "star"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["shape", "count", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_bundle("demo", plan="visipruner", out=tmp_path_factory.mktemp("demo")).path


@pytest.fixture(scope="module")
def session(path):
    with runtime.load(path, threads=1) as session:
        yield session


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "seed": 4}], ids=["greedy", "drawn"])
def test_answers_follow_a_schema(session, settings):
    texts = [
        session.infer(picture(at), "Why?", schema=SCHEMA, max_tokens=200, **settings)
        for at in range(4)
    ]
    for answer in texts:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
        assert answer.finish == "eos"


def test_a_schema_that_was_not_applied_would_be_noticed(session):
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        jsonschema.validate(json.loads(session.infer(picture(0), "Why?").text), SCHEMA)


def test_a_compiled_grammar_is_used_again_and_not_shared(session):
    first = session.grammars.answer(json.dumps(SCHEMA))
    kept = dict(session.grammars._kept)
    second = session.grammars.answer(json.dumps(SCHEMA))
    assert dict(session.grammars._kept) == kept
    logits = np.zeros(session.bundle.manifest.config.text.vocab, np.float32)
    token = int(np.argmax(first.allowed(logits)))
    first.take(token)
    assert not np.array_equal(first.allowed(logits), second.allowed(logits))
    for at in range(40):
        session.grammars.answer(json.dumps({"const": at}))
    assert len(session.grammars._kept) == 32


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("no JSON", "expected a JSON schema"),
        ("[1]", "expected a JSON schema"),
        (7, "expected a JSON schema"),
        ({"type": "cat"}, "cannot be used"),
        ({"pattern": "(", "type": "string"}, "cannot be used"),
        ({"enum": ["x" * MAX_SCHEMA_CHARS]}, "the limit is"),
    ],
)
def test_bad_schemas_are_refused(session, schema, message):
    with pytest.raises(PromptError, match=message):
        session.infer(None, "Why?", schema=schema)


def test_a_schema_that_explodes_is_bounded(session):
    """Both pass the compiler; the library's limits stop them at a token."""
    wide = [
        {"type": "object", "properties": {f"k{i}_{j}": {} for j in range(30)}} for i in range(40)
    ]
    for schema in ({"type": "string", "pattern": "(.{1,3000}){1,3000}"}, {"anyOf": wide}):
        with pytest.raises(PromptError, match="too much computing"):
            session.infer(None, "Why?", schema=schema, max_tokens=60)
    assert session.infer(None, "Why?", max_tokens=2).tokens, "the session goes on"


def test_logprobs_are_those_of_the_model(session):
    plain = session.infer(picture(1), "How many circles are there?", max_tokens=6)
    answer = session.infer(picture(1), "How many circles are there?", max_tokens=6, logprobs=3)
    assert plain.logprobs is None
    assert answer.tokens == plain.tokens == tuple(each.token for each in answer.logprobs)
    scores = session.score(picture(1), "How many circles are there?", answer.tokens[:-1])
    for row, found in zip(scores, answer.logprobs, strict=True):
        exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
        assert found.logprob == pytest.approx(exact[found.token], abs=1e-4)
        assert [each.token for each in found.likely] == np.argsort(-exact)[:3].tolist()
    assert "".join(each.text for each in answer.logprobs if each.token not in session.eos).strip()
    assert json.loads(json.dumps(answer.to_dict()))["logprobs"][0]["likely"][0]["logprob"] <= 0
    assert "logprobs" not in plain.to_dict()


def test_the_logprob_of_a_sure_token_is_zero():
    found = token_logprob(str, np.array([0.0, 900.0, -900.0], np.float32), 1, 2)
    assert (found.logprob, found.text) == (0.0, "1")
    assert [each.logprob for each in found.likely] == [0.0, -900.0]


def test_a_bias_changes_the_choice(session):
    plain = session.infer(picture(1), "Why?", max_tokens=1)
    best = plain.tokens[0]
    banned = session.infer(picture(1), "Why?", max_tokens=1, logit_bias={str(best): -100})
    forced = session.infer(picture(1), "Why?", max_tokens=1, logit_bias={7: 1000})
    assert banned.tokens[0] != best
    assert forced.tokens == (7,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {99999: 1}}, "ids end at"),
        ({"logit_bias": {"x": 1}}, "whole number"),
        ({"logit_bias": {1: float("nan")}}, "expected a number"),
        ({"logit_bias": {1: 10**400}}, "expected a number"),
        ({"logit_bias": {"9" * 5000: 1}}, "whole number"),
        ({"logit_bias": [1]}, "expected at most"),
        ({"logprobs": 21}, "at most 20"),
        ({"logprobs": -1}, "whole number"),
    ],
)
def test_bad_values_are_refused(session, options, message):
    with pytest.raises(PromptError, match=message):
        session.infer(None, "Why?", **options)


@pytest.fixture
def engine(path):
    with Engine(Bundle.open(path), threads=1, lanes=3) as engine:
        yield engine


def test_a_batch_answers_in_order_and_keeps_errors_in_place(engine, session):
    questions = [BatchQuestion(picture(at % 3), "Why?", {"max_tokens": 1 + at}) for at in range(9)]
    questions[4] = BatchQuestion(None, "")
    questions.insert(2, DataError("planted"))
    found = list(infer_batch(engine, iter(questions)))
    assert str(found[2]) == "planted"
    assert isinstance(found[5], PromptError)
    for question, answer in zip(questions, found, strict=True):
        if isinstance(question, BatchQuestion) and question.prompt:
            alone = session.infer(question.image, question.prompt, **question.settings)
            assert answer.tokens == alone.tokens


def test_a_batch_takes_questions_as_it_goes(engine):
    taken = []

    def endless():
        for at in range(10_000):
            taken.append(at)
            yield BatchQuestion(None, "Why?", {"max_tokens": 1})

    answers = infer_batch(engine, endless())
    for _ in range(5):
        next(answers)
    assert len(taken) < 20


@pytest.fixture
def lines(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    written = [
        '{"image": "a.png", "prompt": "Why?", "max_tokens": 3, "id": "first"}',
        "",
        '{"prompt": "Who?", "max_tokens": 2, "stop": ["x"], "logprobs": 1}',
        "{no JSON",
        '{"image": "absent.png", "prompt": "Why?"}',
        '{"prompt": "Why?", "colour": 3}',
        '{"prompt": [{"role": "user", "content": "Why?"}], "max_tokens": 2}',
        '{"prompt": "Why?", "max_tokens": 100000}',
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(written))
    return file


def test_a_file_of_questions_is_answered_line_by_line(engine, lines, tmp_path):
    out = tmp_path / "out.jsonl"
    results = list(BatchFile(lines, out).run(engine))
    assert [json.loads(line) for line in out.read_text().splitlines()] == json.loads(
        json.dumps(results)
    )
    assert [result["line"] for result in results] == [1, 3, 4, 5, 6, 7, 8]
    assert results[0]["id"] == "first"
    assert 1 <= len(results[0]["tokens"]) <= 3
    kinds = [result.get("kind") for result in results]
    errors = ["DataError", "ImageError", "DataError", None, CapacityError.__name__]
    assert kinds == [None, None, *errors]
    assert "colour" in results[4]["error"]


def test_an_interrupted_run_goes_on_where_it_ended(engine, lines, tmp_path):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    list(BatchFile(lines, whole).run(engine))
    run = BatchFile(lines, out).run(engine)
    for _ in range(3):
        next(run)
    run.close()
    with out.open("a") as stream:
        stream.write('{"line": 5, "inp')  # killed while it wrote
    again = BatchFile(lines, out)
    assert (again.total, again.done) == (7, 3)
    assert len(list(again.run(engine))) == 4
    assert not list(BatchFile(lines, out).run(engine))
    for one, two in zip(out.read_text().splitlines(), whole.read_text().splitlines(), strict=True):
        first, second = json.loads(one), json.loads(two)
        for result in (first, second):
            result.pop("timings", None)
        assert first == second


def test_results_of_other_questions_are_not_overwritten(engine, lines, tmp_path):
    out = tmp_path / "out.jsonl"
    list(BatchFile(lines, out).run(engine))
    before = out.read_bytes()
    lines.write_text(lines.read_text().replace("Who?", "Whom?"))
    with pytest.raises(DataError, match="results of other questions"):
        BatchFile(lines, out)
    out.write_text("not ours\n")
    with pytest.raises(DataError, match="results of other questions"):
        BatchFile(lines, out)
    assert before


def test_settings_say_one_thing_by_two_names():
    assert replace(AnswerSettings(), max_new_tokens=4).max_tokens == 4
    with pytest.raises(PromptError, match="two names of one thing"):
        AnswerSettings(max_tokens=3, max_new_tokens=4)


def test_grammars_name_what_to_install(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(Exception, match=r"\[schema\]"):
        Grammars(path / "tokenizer.json", 467, [2])
