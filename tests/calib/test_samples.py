"""Samples come from JSONL whole and in order, or not at all; answers compare as documented."""

import json

import pytest
from visistage.calib.samples import Sample, normalise_answer, read_samples
from visistage.graphs.errors import DataError

GOOD = {"image": "a.png", "prompt": "How many?", "answer": "2"}


def write(tmp_path, *lines, name="data.jsonl"):
    file = tmp_path / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts), encoding="utf-8")
    return file


def test_samples_keep_order_and_are_relative_to_the_file(tmp_path):
    file = write(tmp_path, GOOD, "", {**GOOD, "image": "/b.png", "type": "count"}, "  ")
    first, second = read_samples(file)
    assert first == Sample(f"{file}:1", tmp_path / "a.png", "How many?", "2", None)
    assert (second.name, str(second.image), second.type) == (f"{file}:3", "/b.png", "count")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert len(read_samples(file)) == 1


def test_separators_inside_a_text_do_not_end_a_line(tmp_path):
    line = json.dumps({**GOOD, "prompt": "one\u2028two\x85three"}, ensure_ascii=False)
    assert read_samples(write(tmp_path, line))[0].prompt == "one\u2028two\x85three"


def test_a_limit_takes_the_first_but_checks_all(tmp_path):
    assert len(read_samples(write(tmp_path, GOOD, GOOD, GOOD), 2)) == 2
    with pytest.raises(DataError, match=r"data\.jsonl:2"):
        read_samples(write(tmp_path, GOOD, "{"), 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([1], "found [1], expected a mapping"),
        (
            {**GOOD, "anwser": "2"},
            "anwser: found an unknown key, expected one of image, prompt, answer, type.",
        ),
        ({"image": "a.png", "prompt": "?"}, "answer: found nothing"),
        ({**GOOD, "answer": 2}, "answer: found 2, expected text"),
        ({**GOOD, "prompt": " "}, "prompt: found ' ', expected text"),
        ({**GOOD, "type": None}, "type: found None"),
        ({**GOOD, "answer": "..."}, "punctuation only"),
        (json.dumps({**GOOD, "prompt": "x" * (1 << 20)}), "at most"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, words):
    with pytest.raises(DataError, match=r"data\.jsonl:2") as error:
        read_samples(write(tmp_path, GOOD, line))
    assert words in str(error.value)
    assert len(str(error.value)) < 400


def test_a_file_without_samples_is_refused(tmp_path):
    with pytest.raises(DataError, match="no samples"):
        read_samples(write(tmp_path, "", ""))
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot read"):
        read_samples(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_samples(tmp_path / "latin.jsonl")


def test_a_folder_stands_for_the_only_file_in_it(tmp_path):
    with pytest.raises(DataError, match=r"found 0 files \*\.jsonl"):
        read_samples(tmp_path)
    file = write(tmp_path, GOOD)
    assert read_samples(tmp_path) == read_samples(file)
    write(tmp_path, GOOD, name="more.jsonl")
    with pytest.raises(DataError, match=r"found 2 files .*: data\.jsonl, more\.jsonl"):
        read_samples(tmp_path)


def test_answers_may_be_left_out_where_nothing_is_compared_with_them(tmp_path):
    asked = {key: GOOD[key] for key in ("image", "prompt")}
    file = write(tmp_path, asked, GOOD)
    assert [one.answer for one in read_samples(file, answers=False)] == ["", "2"]
    with pytest.raises(DataError, match=r"data\.jsonl:1: answer: found nothing"):
        read_samples(file)
    with pytest.raises(DataError, match=r"data\.jsonl:1: image: found nothing"):
        read_samples(write(tmp_path, {"prompt": "?"}), answers=False)
    with pytest.raises(DataError, match="punctuation only"):
        read_samples(write(tmp_path, {**asked, "answer": "."}), answers=False)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Bottom-right.", "bottom right"),
        ("  YES \n", "yes"),
        ("“U”", "u"),
        ("STRASSE", "straße"),
        ("\uff12", "2"),
        ("3.5!", "3.5"),
        ("-3", " -3."),
        ("left, then right", "left then right"),
    ],
)
def test_answers_that_are_equal(one, other):
    assert normalise_answer(one) == normalise_answer(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("yes", "no"),
        ("yes", "yes it is"),
        ("3.5", "35"),
        ("3.5", "3 5"),
        ("-3", "3"),
        ("10:30", "1030"),
        ("bottom right", "bottomright"),
        ("C", "C++"),
    ],
)
def test_answers_that_differ(one, other):
    assert normalise_answer(one) != normalise_answer(other)
