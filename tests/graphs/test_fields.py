"""The strict reader of JSON: what it takes, what it refuses, and how it says so."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from visistage.graphs.errors import DataError
from visistage.graphs.fields import (
    MAX_DEPTH,
    Words,
    check_format,
    from_json,
    parse_json,
    read_json,
    reject,
    show,
    to_json,
)


@dataclass(frozen=True)
class Point:
    x: float
    colour: Literal["red", "green"] = "red"


@dataclass(frozen=True)
class Squared:
    """A class that is stored in a form of its own."""

    root: int

    def to_dict(self) -> dict[str, int]:
        return {"square": self.root**2}

    @classmethod
    def from_dict(cls, data: dict[str, int]) -> "Squared":
        return cls(round(data["square"] ** 0.5))


@dataclass(frozen=True)
class Everything:
    name: str
    flag: bool
    points: tuple[Point, ...]
    pair: tuple[int, int]
    size: int | tuple[int, ...] | None
    by_layer: Mapping[int, float]
    free: dict[str, Any]
    squared: Squared
    renamed: int = field(default=3, metadata={"key": "old name"})
    seldom: tuple[str, ...] = field(default=(), metadata={"omit": True})


VALUE = Everything(
    "a", True, (Point(1.5), Point(2, "green")), (1, 2), None, {3: 0.5}, {"b": [1]}, Squared(5)
)
DATA = {
    "name": "a",
    "flag": True,
    "points": [{"x": 1.5, "colour": "red"}, {"x": 2, "colour": "green"}],
    "pair": [1, 2],
    "size": None,
    "by_layer": {"3": 0.5},
    "free": {"b": [1]},
    "squared": {"square": 25},
    "old name": 3,
}


def read(data: Any, cls: type = Everything, **options: Any) -> Any:
    return from_json(cls, data, DataError, "Do it again.", "a.json", **options)


def refusal(data: Any, cls: type = Everything, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(data, cls, **options)
    return str(caught.value)


def test_round_trip():
    assert to_json(VALUE) == DATA
    assert read(json.loads(json.dumps(DATA))) == VALUE
    assert type(read(DATA).points[1].x) is int  # nothing is converted
    assert read({**DATA, "size": [4, 5]}).size == (4, 5)
    assert read({**DATA, "seldom": ["c"]}).seldom == ("c",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "a.json: name: found 3, expected text. Do it again."),
        ({"flag": 1}, "a.json: flag: found 1, expected true or false."),
        ({"points": {}}, "points: found {}, expected a list."),
        ({"points": [7]}, "points[0]: found 7, expected a mapping."),
        ({"points": [{"x": "1"}]}, "points[0].x: found '1', expected a finite number."),
        ({"points": [{"x": float("inf")}]}, "points[0].x: found inf, expected a finite number."),
        ({"points": [{"colour": "red"}]}, "points[0].x: found nothing, expected a value."),
        ({"points": [{"x": 1}]}, "points[0].colour: found nothing, expected a value."),
        (
            {"points": [{"x": 1, "colour": "gren"}]},
            "points[0].colour: found 'gren', expected one of red, green. Did you mean 'green'?",
        ),
        (
            {"points": [{"x": 1, "color": "red"}]},
            "points[0].color: found an unknown key, expected one of x, colour. Did you mean 'col",
        ),
        ({"pair": [1]}, "pair: found [1], expected a list of 2."),
        ({"pair": [1, True]}, "pair[1]: found True, expected an integer."),
        ({"pair": [1, 2**63]}, "pair[1]: found 9223372036854775808, expected an integer."),
        ({"size": "7"}, "size: found '7', expected an integer or a list or null."),
        ({"size": [1.0]}, "size[0]: found 1.0, expected an integer."),
        ({"by_layer": {"x": 1}}, "by_layer.x: found a key, expected an integer for a key."),
        ({"by_layer": {"3": None}}, "by_layer.3: found None, expected a finite number."),
        ({"\x1b[2J": 1}, "'\\x1b[2J': found an unknown key"),
        ({"name": ["\x1b" * 100]}, "name: found ['\\x1b"),
    ],
)
def test_refusals_name_the_field(changes, message):
    found = refusal({**DATA, **changes})
    assert message in found
    assert found.isprintable()
    assert len(found) < 300


def test_every_key_is_required_unless_defaults_are_allowed():
    for key in DATA:
        missing = {name: value for name, value in DATA.items() if name != key}
        assert f"a.json: {key}: found nothing" in refusal(missing)
    few = {"x": 1}
    assert read(few, Point, defaults=True) == Point(1)
    assert "colour: found nothing" in refusal(few, Point)
    assert refusal(7, Point) == "a.json: found 7, expected a mapping. Do it again."


def test_hints_replace_the_remedy():
    data = {"x": 1, "colour": "blue"}
    assert refusal(data, Point, hints={"blue": "Blue is for later."}).endswith("Blue is for later.")


def test_values_are_shown_short():
    assert show("a" * 100) == "'" + "a" * 76 + "..."
    assert show(10**5000) == "a huge int"
    assert show(Words("two edges")) == "two edges"
    with pytest.raises(DataError, match=r"^found 1, expected 2\. Write it\.$"):
        reject("", 1, "2", DataError, "Write it.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        (b"\xff", "utf-8"),
        ('{"a": 1, "b": 2, "a": 3}', "a: found twice, expected once"),
        ("[NaN]", "NaN is no finite number"),
        ("[-Infinity]", "-Infinity is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        ("[" * 70 + "]" * 70, f"more than {MAX_DEPTH} levels"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "digits"),
    ],
)
def test_texts_are_refused(text, message):
    with pytest.raises(DataError, match=r"^the text is not JSON as it should be") as caught:
        parse_json(text, DataError, "Do it again.")
    assert message in str(caught.value)
    assert str(caught.value).endswith("Do it again.")


def test_files_are_bounded_and_named(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(DataError, match=r"a\.json cannot be read: No such file.*Do it again\."):
        read_json(file, DataError, "Do it again.")
    file.write_text("[1, 2]")
    assert read_json(file, DataError, "", most_bytes=6) == [1, 2]
    with pytest.raises(DataError, match=r"a\.json: found a larger file, expected at most 5 bytes"):
        read_json(file, DataError, "", most_bytes=5)
    file.write_text("[1")
    with pytest.raises(DataError, match=r"a\.json is not JSON"):
        read_json(file, DataError, "")


@pytest.mark.parametrize("found", [{"format": 3}, {"format": True}, {}, [], None])
def test_another_format_is_refused(found):
    with pytest.raises(DataError, match=r"^b has format .*, this version reads format 1\. Again"):
        check_format(found, 1, DataError, "Again", "b")
    assert check_format({"format": 1, "c": 2}, 1, DataError, "Again") == {"c": 2}


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([key for key in DATA if key != "squared"]), JUNK)
def test_junk_is_an_error_or_a_value_that_comes_back(key, value):
    data = {**DATA, key: value}
    message = ""
    try:
        found = read(data)
    except DataError as error:
        message = str(error)
    else:
        assert read(to_json(found)) == found
    assert message.isprintable()


def test_a_bare_number_is_no_format():
    with pytest.raises(DataError, match="has format 1"):
        check_format(1, 1, DataError, "")
