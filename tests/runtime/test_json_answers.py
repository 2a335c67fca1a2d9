"""500 answers of the demo model in the form of 500 schemas, greedy and drawn: all of them valid."""

import json
import random

import jsonschema
import pytest
from visistage.compile.build import make_bundle
from visistage.runtime import Engine
from visistage.runtime.batch import BatchQuestion, infer_batch
from visistage.tests.support.asking import picture

ANSWERS = 500
TOKENS = 400
"""Room for the longest answer that a generated schema allows."""

WORDS = ("colour", "shape", "über", 'a "b"', "", "x y", "日本", "n")
PATTERNS = ("^[a-z]{1,6}$", "^(red|blue)-[0-9]{2}$", "^[A-Z][a-z]*s?[0-9]{0,3}$")
PARTS = {"colour": {"enum": ["red", "blue"]}, "place": {"type": "integer", "minimum": 0}}
PARTS["place"]["maximum"] = 63


def schema(draw, depth=2):
    """Return a random schema, all of whose values are short."""
    leaves = ("integer", "number", "string", "pattern", "enum", "const", "boolean", "null")
    nested = ("object", "array", "anyOf", "ref")
    kind = draw.choice(leaves if not depth else (*leaves, *nested, *nested))
    low = draw.randrange(-200, 200)
    if kind == "integer":
        return {"type": kind, "minimum": low, "maximum": low + draw.randrange(300)}
    if kind == "number":
        # Without a step a number may have digits without end, which greedy models write.
        most = low + draw.randrange(1, 9)
        return {"type": kind, "minimum": low, "exclusiveMaximum": most, "multipleOf": 0.25}
    if kind == "string":
        return {"type": kind, "minLength": draw.randrange(4), "maxLength": draw.randrange(4, 12)}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice(PATTERNS), "maxLength": 12}
    if kind == "enum":
        return {kind: draw.sample([*WORDS, 1, -2.5, None, True, [1, "x"], {"a": 1}], 3)}
    if kind == "const":
        return {kind: draw.choice(WORDS)}
    if kind == "array":
        least = draw.randrange(3)
        most = least + draw.randrange(3)
        return {"type": kind, "items": schema(draw, depth - 1), "minItems": least, "maxItems": most}
    if kind == "anyOf":
        return {kind: [schema(draw, depth - 1) for _ in range(draw.randrange(1, 4))]}
    if kind == "ref":
        first, second = ({"$ref": f"#/$defs/{draw.choice(list(PARTS))}"} for _ in range(2))
        least = draw.randrange(3)
        return {"type": "array", "prefixItems": [first, second], "items": False, "minItems": least}
    if kind != "object":
        return {"type": kind}
    names = draw.sample(WORDS, draw.randrange(1, 5))
    return {
        "type": kind,
        "properties": {name: schema(draw, depth - 1) for name in names},
        "required": names[: draw.randrange(len(names) + 1)],
        "additionalProperties": False,
    }


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    bundle = make_bundle("demo", plan="visipruner", out=tmp_path_factory.mktemp("json"))
    with Engine(bundle, lanes=8, threads=1) as engine:
        yield engine


def test_all_answers_validate(engine):
    draw = random.Random(5)
    wanted = [{"$defs": PARTS, **schema(draw)} for _ in range(ANSWERS)]
    asked = (
        BatchQuestion(
            picture(at % 7, 64, 64),
            draw.choice(("How many shapes?", "What is left of the circle?", "Describe it.")),
            {"schema": own, "max_tokens": TOKENS, "temperature": (0, 1.0, 2.5)[at % 3], "seed": at},
        )
        for at, own in enumerate(wanted)
    )
    said = list(infer_batch(engine, asked))
    assert {answer.finish for answer in said} == {"eos"}
    values = [json.loads(answer.text) for answer in said]
    assert all(map(valid, values, wanted))
    assert sum(map(valid, values, wanted[1:])) < ANSWERS / 2, "others would be noticed"
    assert len({answer.text for answer in said}) > ANSWERS / 2, "answers differ"


def valid(value, schema):
    """Return True for a value that its schema allows."""
    return jsonschema.Draft202012Validator(schema).is_valid(value)
