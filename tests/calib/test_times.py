"""Times of two questions: each image is new once, the second question follows at once."""

from types import SimpleNamespace

import pytest
from visistage.calib.plan_search.times import TIMED, QuestionTimes, about_times, question_times
from visistage.calib.samples import Sample


class Session:
    """Takes 10 ms more for each new image, and notes what it was asked."""

    def __init__(self):
        self.asked = []

    def infer(self, image, prompt, max_tokens):
        assert max_tokens == 1
        new = image not in [image for image, _ in self.asked]
        first = not self.asked
        self.asked.append((image, prompt))
        return SimpleNamespace(timings=SimpleNamespace(first_token_ms=1000 * first + 10 * new + 2))


def samples(*images):
    return [Sample(f"{i}", image, f"question {i}", "") for i, image in enumerate(images)]


def test_new_and_known_images_are_told_apart_and_the_first_one_warms_up():
    session = Session()
    found = question_times(session, samples("a", "b", "b", "c"))
    assert found == QuestionTimes(12, 2)
    assert [image for image, _ in session.asked] == list("aabbcc")
    assert session.asked[0] == ("a", "question 0")
    assert session.asked[1][1] != "question 0"


def test_many_images_are_not_all_timed():
    session = Session()
    question_times(session, samples(*map(str, range(50))))
    assert len(session.asked) == 2 * (TIMED + 1)


def test_one_image_is_better_than_none():
    assert question_times(Session(), samples("a")) == QuestionTimes(1012, 2)


@pytest.mark.parametrize(("first", "warned"), [(8.0, False), (12.0, True)])
def test_a_plan_that_is_not_faster_is_warned_of(first, warned):
    found = about_times(QuestionTimes(first, 2.0), QuestionTimes(9.0, 2.5))
    assert bool(found) is warned
    assert about_times(None, QuestionTimes(9.0, 2.5)) == []
