"""What nobody wants of pruning, or of a measurement, is told first."""

import os

import pytest
from click.testing import CliRunner
from visistage.cli.main import main
from visistage.runtime import hardware
from visistage.runtime.image import image
from visistage.runtime.image.preprocessing import Preprocessing
from visistage.tools.findings import findings

FASTER = {"first token": (10.0, 12.0), "later token": (3.0, 3.0)}


@pytest.mark.parametrize(
    ("times", "answers", "words"),
    [
        (FASTER, None, []),
        ({"first token": (10.1, 10.0)}, None, []),
        (
            {**FASTER, "later token": (3.3, 3.0)},
            None,
            ["than dense: later token 3.3 ms for"],
        ),
        (FASTER, ("two", "three"), ["Pruning changed the answer: 'two', dense says 'three'."]),
        ({"first token": (20.0, 10.0)}, ("", "a"), ["Pruning changed", "first token 20.0 ms for"]),
        ({"first token": (20.0, 0.0)}, None, []),
    ],
)
def test_findings(times, answers, words):
    found = findings(times, answers, "dense")
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


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
