"""An evaluation counts what was right, by type, and hides nothing that could not be asked."""

import json
from pathlib import Path

import pytest
from visistage.calib.answer_file import AnswerFile
from visistage.calib.evaluate import UNTYPED, Share, evaluate
from visistage.calib.samples import Sample
from visistage.graphs.errors import CapacityError, DataError, ImageError, PromptError
from visistage.runtime.answer import Answer, PlanFacts, Timings
from visistage.runtime.text.sampling import Sampling

ANSWERS = {"one?": "One.", "two?": "three", "where?": "Top-left"}


class Scripted:
    """A session whose answers are known; pictures called bad cannot be read."""

    sampling = Sampling(temperature=0.7, repetition_penalty=1.5)

    def __init__(self):
        self.asked = []

    def infer(self, image, prompt, **options):
        self.asked.append((image, prompt, options))
        if "bad" in str(image):
            raise ImageError(f"{image}: damaged")
        if prompt not in ANSWERS:
            raise PromptError("too long")
        later = 2.0 if prompt == "one?" else None
        timings = Timings(1.0, {}, 10.0 * len(self.asked), later, 20.0)
        return Answer(ANSWERS[prompt], (1, 2), "eos", timings, PlanFacts("p", 0, 0, 4, 9, None))


def sample(prompt, answer, type_=None, image="good.png"):
    return Sample(f"data:{prompt}", Path(image), prompt, answer, type_)


SAMPLES = [
    sample("one?", "one", "count"),
    sample("two?", "two", "count"),
    sample("one?", "1", "count", image="bad.png"),
    sample("where?", "top left"),
]


def test_counts_by_type_and_names_what_was_wrong():
    ticks, heard = [], []
    report = evaluate(Scripted(), SAMPLES, advance=ticks.append, heard=heard.append)
    assert [answer.text for answer in heard] == ["One.", "three", "Top-left"]
    assert report.overall == Share(2, 3)
    assert report.by_type == {"count": Share(1, 2), UNTYPED: Share(1, 1)}
    (miss,) = report.misses
    assert (miss.prompt, miss.expected, miss.given) == ("two?", "two", "three")
    assert report.unreadable == (("data:one?", "bad.png: damaged"),)
    assert len(ticks) == len(SAMPLES)


def test_times_are_means_of_the_answers_that_have_them():
    report = evaluate(Scripted(), SAMPLES)
    assert report.first_token_ms == pytest.approx((10 + 20 + 40) / 3)
    assert report.per_token_ms == 2.0
    assert evaluate(Scripted(), SAMPLES[1:2]).per_token_ms is None


def test_asks_greedily_with_the_checkpoints_other_settings():
    session = Scripted()
    evaluate(session, SAMPLES[:1], max_tokens=7)
    (_, _, options) = session.asked[0]
    assert options == {"max_tokens": 7, "sampling": Sampling(repetition_penalty=1.5)}


def test_a_sample_that_fails_is_named_and_the_others_count():
    report = evaluate(Scripted(), [sample("unknown?", "x"), *SAMPLES], unreadable=[("a:1", "b")])
    assert report.overall == Share(2, 3)
    assert report.unreadable[:2] == (("a:1", "b"), ("data:unknown?", "too long"))


class Stopped(Scripted):
    """The same, interrupted at the third question."""

    def infer(self, image, prompt, **options):
        if len(self.asked) == 2:
            raise KeyboardInterrupt
        return super().infer(image, prompt, **options)


def test_answers_outlive_a_run_that_ends_early(tmp_path):
    file = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Stopped(), SAMPLES, kept=AnswerFile(file, "bundle"))
    assert len(file.read_text().splitlines()) == 2
    file.write_text(file.read_text() + '{"digest": "12')  # killed while it wrote
    session = Scripted()
    report = evaluate(session, SAMPLES, kept=AnswerFile(file, "bundle"))
    assert [prompt for _, prompt, _ in session.asked] == ["one?", "where?"]
    assert report.overall == Share(2, 3)
    assert report.misses == evaluate(Scripted(), SAMPLES).misses
    other = Scripted()
    evaluate(other, SAMPLES, kept=AnswerFile(file, "another bundle"))
    assert len(other.asked) == len(SAMPLES)
    again = evaluate(session, SAMPLES, kept=AnswerFile(file, "bundle"))
    assert (again.overall, len(session.asked)) == (Share(2, 3), 3)  # what failed is tried again


@pytest.mark.parametrize("text", ["no answers\n", "no answers", '{"image": "a.png"}\n', "[]\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=r"answers\.jsonl:1\b"):
        AnswerFile(file, "bundle")
    assert file.read_text() == text
    with pytest.raises(CapacityError, match="cannot be kept"):
        AnswerFile(tmp_path / "absent" / "answers.jsonl", "bundle")
    with pytest.raises(CapacityError, match="cannot be kept"):
        AnswerFile(tmp_path, "bundle")


def test_nothing_asked_is_an_error_not_a_score():
    with pytest.raises(DataError, match=r"none of 1 .*bad\.png: damaged"):
        evaluate(Scripted(), SAMPLES[2:3])
    with pytest.raises(DataError, match="none of 0"):
        evaluate(Scripted(), [])


def test_the_report_as_json():
    data = json.loads(json.dumps(evaluate(Scripted(), SAMPLES).to_dict()))
    assert (data["right"], data["total"], data["accuracy"]) == (2, 3, pytest.approx(2 / 3))
    assert data["by_type"]["count"] == {"right": 1, "total": 2, "accuracy": 0.5}
    assert data["unreadable"] == [{"sample": "data:one?", "reason": "bad.png: damaged"}]
    assert data["misses"][0]["given"] == "three"
