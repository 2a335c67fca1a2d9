"""What nobody wants of pruning, or of a measurement, is told first."""

import os
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from visistage.cli.main import main
from visistage.runtime import hardware
from visistage.runtime.image import image
from visistage.runtime.image.preprocessing import Preprocessing
from visistage.tools.findings import AnswerPair, changed_answers, slower

FASTER = {"first token": (10.0, 12.0), "later token": (3.0, 3.0)}


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (FASTER, []),
        ({"first token": (10.1, 10.0)}, []),
        ({**FASTER, "later token": (3.3, 3.0)}, ["than dense: later token 3.3 ms for 3.0 ms."]),
        ({"first token": (20.0, 0.0)}, []),
    ],
)
def test_slower_times_are_told(times, words):
    found = slower(times, "dense")
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


def pair(question, pruned, dense):
    """Two answers whose tokens are the letters of their texts."""
    said = (SimpleNamespace(text=text, tokens=tuple(text)) for text in (pruned, dense))
    return AnswerPair(question, *said)


SAME, CHANGED = pair("Which?", "red", "red"), pair("How many?", "two", "three")


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        ([], []),
        ([SAME, SAME], []),
        ([CHANGED], ["Pruning changed the answer: 'two', the unpruned model says 'three'."]),
        (
            [SAME, CHANGED, SAME, pair("Why?", "", "x")],
            [
                "Pruning changed 2 of 4 answers. The first, to 'How many?': 'two', the unpruned "
                "model says 'three'."
            ],
        ),
    ],
)
def test_changed_answers_are_counted_and_the_first_is_told(pairs, found):
    assert changed_answers(pairs) == found


@pytest.fixture
def load(monkeypatch):
    def loaded(average):
        monkeypatch.setattr(os, "getloadavg", lambda: (average, 0.0, 0.0), raising=False)

    return loaded


def test_a_busy_machine_says_so(load):
    load(hardware.cores() + 0.5)
    assert "times measured now mean nothing" in hardware.busy_machine()
    estimate = ["estimate", "llava-7b", "--device"]
    assert "This machine is busy" not in CliRunner().invoke(main, [*estimate, "h100"]).stderr
    assert "This machine is busy" in CliRunner().invoke(main, [*estimate, "cpu"]).stderr
    load(hardware.cores())
    assert hardware.busy_machine() is None


def test_more_threads_than_cores_are_clamped(load):
    load(0.0)
    asked = ["estimate", "demo", "--device", "h100", "--threads"]
    done = CliRunner().invoke(main, [*asked, "4096"])
    assert done.exit_code == 0, done.output
    assert f"{hardware.cores()} are used" in done.stderr
    assert "are used" not in CliRunner().invoke(main, [*asked, "1"]).stderr


def test_the_first_image_pays_for_no_decoder():
    image._formats.cache_clear()
    image.warm_up.cache_clear()
    image.warm_up(Preprocessing("CLIPImageProcessor", None, 8, 3, (8, 8), 1 / 255, None, None))
    assert image._formats.cache_info().currsize == 1
