"""easy-VQA's questions: all of them, right, and a clear word where the package is missing."""

from collections import Counter

import numpy as np
import pytest
from visistage.demo import easy_vqa
from visistage.demo.easy_vqa import (
    QUESTIONS,
    EasyQuestions,
    blind_easy_vqa,
    easy_vqa_samples,
    question_kind,
)

COLOURS = {  # of the data set, as matplotlib and Pillow have these names
    **{"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)},
    **{"black": (0, 0, 0), "gray": (128, 128, 128), "teal": (0, 128, 128), "brown": (165, 42, 42)},
}


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(easy_vqa, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'visistage\[easy-vqa\]'"):
        next(easy_vqa_samples())


@pytest.mark.parametrize(
    ("text", "answer", "kind"),
    [
        ("is there not a red shape?", "yes", "negated"),
        ("is no blue shape present?", "no", "negated"),
        ("is there a triangle in the image?", "no", "yes/no"),
        ("what color is the shape?", "red", "colour"),
        ("what is the teal shape?", "circle", "shape"),
    ],
)
def test_kinds(text, answer, kind):
    assert question_kind(text, answer) == kind


@pytest.mark.parametrize("split", QUESTIONS)
def test_every_question_is_there(split):
    pytest.importorskip("easy_vqa")
    source = EasyQuestions(split)
    assert len(source.rows) == QUESTIONS[split] == sum(map(len, source.questions.values()))
    assert set(source.images) == {image for _, _, image in source.rows}


def test_samples_are_spread_over_the_split_and_show_what_they_ask_about():
    pytest.importorskip("easy_vqa")
    samples = list(easy_vqa_samples(400))
    assert len(samples) == 400
    assert len({s.image.tobytes() for s in samples}) > 300
    kinds = Counter(s.kind for s in samples)
    assert min(kinds[kind] for kind in ("colour", "shape", "yes/no", "negated")) > 30
    for sample in samples:
        assert sample.image.size == (96, 96)
        assert sample.prompt == f"USER: <image>\n{sample.question} ASSISTANT:"
        if sample.kind == "colour":
            pixels = np.asarray(sample.image).reshape(-1, 3).astype(int)
            near = np.abs(pixels - np.array(COLOURS[sample.answer])).max(1) < 40
            assert near.sum() > 30


def test_wording_alone_answers_two_in_three():
    pytest.importorskip("easy_vqa")
    blind = blind_easy_vqa()
    assert 0.6 < blind["all"] < 0.75
    assert blind["colour"] < 0.2
