"""Choices that are measured: how many threads run a bundle; given, noted, or measured."""

import json

import pytest
from visistage.compile.build import make_bundle
from visistage.graphs.bundle import Bundle
from visistage.graphs.errors import VisistageError
from visistage.runtime import autotune, load
from visistage.runtime.autotune import (
    THREADS_FILE,
    THREADS_VARIABLE,
    ThreadsNote,
    TrialPrompt,
    thread_counts,
)

from ..support.toy import make_checkpoint


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("threads")
    return make_bundle(str(make_checkpoint(folder / "model")), plan="visipruner", out=folder).path


@pytest.fixture
def tried(built, monkeypatch):
    """A bundle on a machine of four cores, whose trial counts how often it takes place."""
    monkeypatch.delenv(THREADS_VARIABLE)
    monkeypatch.setattr(autotune, "cores", lambda: 4)
    (built / THREADS_FILE).unlink(missing_ok=True)
    times, calls = {1: 10.0, 2: 6.0, 4: 6.2}, []

    class Instant:
        def __init__(self, bundle, executor, question_rows):
            self.threads = executor.threads

        def answer(self):
            return self.threads

    def fastest(answers):
        counts = [answer() for answer in answers]
        calls.extend(counts)
        return [times[count] for count in counts]

    monkeypatch.setattr(autotune, "TrialPrompt", Instant)
    monkeypatch.setattr(autotune, "fastest", fastest)
    return built, times, calls


def test_candidates_are_powers_of_two_and_all_cores():
    assert thread_counts(1) == [1]
    assert thread_counts(2) == [1, 2]
    assert thread_counts(6) == [1, 2, 4, 6]
    assert thread_counts(8) == [1, 2, 4, 8]


def test_alternatives_take_turns_and_the_first_round_does_not_count(monkeypatch):
    seconds = iter([0, 9, 0, 9, 0, 2, 0, 5, 0, 1, 0, 4, 0, 3, 0, 6])
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: next(seconds))
    ran = []
    assert autotune.fastest([lambda: ran.append("a"), lambda: ran.append("b")]) == [1000, 4000]
    assert ran == ["a", "b"] * 4


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({"1": 10.0, "2": 6.0, "4": 6.2}, 4),  # near enough: all cores
        ({"1": 10.0, "2": 5.0, "4": 6.2}, 2),
        ({"1": 3.0, "2": 5.0, "4": 6.2}, 1),
        ({"1": 3.0, "2": 3.1, "16": 6.0}, 2),  # two are not clearly slower than one
    ],
)
def test_fewer_threads_must_be_clearly_faster(times, best):
    assert ThreadsNote("m", "e", "s", times).threads == best


def test_the_trial_takes_place_once_on_a_machine(tried):
    path, times, calls = tried
    with load(path) as session:
        assert session.executor.threads == 4
    assert calls == [1, 2, 4]
    times[1] = 1.0
    with load(path) as session:
        assert session.executor.threads == 4  # as was found before
    assert calls == [1, 2, 4]
    noted = json.loads((path / THREADS_FILE).read_text())
    (path / THREADS_FILE).write_text(json.dumps(noted | {"machine": "another"}))
    with load(path) as session:
        assert session.executor.threads == 1
    assert calls == [1, 2, 4] * 2


@pytest.mark.parametrize("spoilt", ["", "[]", '{"machine": 1}', "\0"])
def test_a_broken_note_is_measured_again(spoilt, tried):
    path, _, calls = tried
    (path / THREADS_FILE).write_text(spoilt)
    with load(path) as session:
        assert session.executor.threads == 4
    assert len(calls) == 3


def test_a_note_of_other_types_is_measured_again(tried):
    path, _, calls = tried
    for changed in ({}, {"answer_ms": "fast"}, {"answer_ms": {"4": "fast"}}):
        if changed:
            noted = json.loads((path / THREADS_FILE).read_text())
            (path / THREADS_FILE).write_text(json.dumps(noted | changed))
        with load(path) as session:
            assert session.executor.threads == 4
    assert calls == [1, 2, 4] * 3


def test_who_says_a_number_gets_it_untried(tried, monkeypatch):
    path, _, calls = tried
    with load(path, threads=3) as session:
        assert session.executor.threads == 3
    monkeypatch.setenv(THREADS_VARIABLE, "2")
    with load(path) as session:
        assert session.executor.threads == 2
    monkeypatch.setattr(autotune, "LARGEST_BYTES", 1)
    monkeypatch.delenv(THREADS_VARIABLE)
    with load(path) as session:
        assert session.executor.threads == 4  # too large to be loaded three times
    assert not calls


@pytest.mark.parametrize("said", ["", "0", "-1", "two"])
def test_an_unusable_number_in_the_environment_is_named(said, built, monkeypatch):
    monkeypatch.setenv(THREADS_VARIABLE, said)
    with pytest.raises(VisistageError, match=f"{THREADS_VARIABLE} is '{said}', expected a number"):
        load(built)


def test_the_trial_answers_with_every_kind_of_call(built, monkeypatch):
    monkeypatch.delenv(THREADS_VARIABLE)
    bundle = Bundle.open(built)
    with load(built, threads=1) as session:
        (took,) = autotune.fastest([TrialPrompt(bundle, session.executor, 24).answer])
        ran = session.executor.reset_elapsed()
    assert took > 0
    assert set(ran) == set(bundle.manifest.graphs)
