"""Denormals are flushed while graphs run, and nowhere else."""

import subprocess
import sys

import numpy as np
import pytest
from visistage.compile.build import make_bundle
from visistage.runtime.backends import denormals
from visistage.runtime.backends.denormals import AVAILABLE, flushed

from ..support.toy import make_checkpoint

needs_the_bits = pytest.mark.skipif(not AVAILABLE, reason="this machine's bits are not known")


def denormal() -> np.float32:
    return np.float32(1e-40) * np.float32(0.5)


@needs_the_bits
def test_a_call_flushes_and_the_thread_does_not():
    assert denormal() != 0
    assert flushed(denormal) == 0
    assert denormal() != 0


@needs_the_bits
def test_a_call_that_fails_leaves_the_thread_as_it_was():
    with pytest.raises(ZeroDivisionError):
        flushed(divmod, 1, 0)
    assert denormal() != 0


@needs_the_bits
def test_calls_within_calls_flush_to_the_end():
    assert flushed(lambda: (flushed(denormal), denormal())) == (0, 0)


def test_without_the_bits_a_call_is_just_a_call(monkeypatch):
    monkeypatch.setattr(denormals, "AVAILABLE", False)
    assert flushed(denormal) == denormal() != 0


PROGRAM = """
import sys, threading
import numpy as np
from PIL import Image
from visistage.runtime import load

def denormal():
    print(np.float32(1e-40) * np.float32(0.5) != 0)

with load(sys.argv[1], threads=int(sys.argv[2])) as session:
    denormal()
    session.infer(Image.new("RGB", (8, 8)), "What is this?", max_tokens=2)
    denormal()
    inside = threading.Thread(target=denormal)
    inside.start()
    inside.join()
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_answers_leave_the_program_around_them_alone(tmp_path, threads):
    """In a process of its own: what ONNX Runtime does to the caller is up to its first session."""
    bundle = make_bundle(
        str(make_checkpoint(tmp_path / "model")), plan="visipruner", out=tmp_path
    ).path
    command = [sys.executable, "-c", PROGRAM, str(bundle), threads]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 3, done.stderr
