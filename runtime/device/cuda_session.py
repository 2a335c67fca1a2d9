"""A session of one node on CUDA, opened in a process of its own: what target ``cuda`` rests on.

ONNX Runtime lists its CUDA provider wherever it was built with it, and goes on without it where its
libraries are missing or no GPU answers. Why, it tells standard error alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import lru_cache

import numpy as np

from ...graphs.child import isolated
from ..backends.onnx_runtime import find_cuda_libraries, ort
from ..backends.ort import CUDA_PROVIDER

SECONDS = 120
"""Limit of a first start of CUDA, whose kernels may come from a disk that sleeps."""

MODEL = bytes.fromhex(  # y = Abs(x), of four floats; neither onnx nor a file is needed
    "08083a320a0b0a017812017922034162731201615a0f0a0178120a0a08"
    "080112040a020804620f0a0179120a0a08080112040a02080442021010"
)

_CAUSE = "with error: "
"""Text between the name of the library that did not load and the reason of the loader."""

_COLOURS = re.compile(r"\x1b\[[0-9;]{0,20}m")


@lru_cache(maxsize=1)
def why_no_session() -> str | None:
    """Return why ONNX Runtime computes nothing on this GPU; None: it was tried, and does."""
    with isolated(__name__) as (command, options):
        try:
            done = subprocess.run(
                command, **options, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"a session on the GPU did not open in {SECONDS} s"
    answer = done.stdout.strip().splitlines()[-1:]
    if done.returncode == 0 and answer == ["true"]:
        return None
    return reason(done.stderr) or f"its process ended with {done.returncode} and said nothing"


def reason(said: str) -> str:
    """Return the cause in what ONNX Runtime wrote to standard error, without time and colours."""
    lines = [_message(line) for line in said.splitlines()]
    causes = [line.partition(_CAUSE)[2] for line in lines if _CAUSE in line]
    return next(iter(causes or [line for line in reversed(lines) if line]), "")


def _message(line: str) -> str:
    """Return a line of a log without its colours, its time and its place in the source."""
    line = _COLOURS.sub("", line).strip()
    head, _, message = line.partition("] ")
    return message if ":onnxruntime:" in head else line


def main() -> None:
    """Open the session and run it; answer on stdout whether the provider computed."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        sys.exit(f"ONNX Runtime {ort.__version__} was built without {CUDA_PROVIDER}")
    find_cuda_libraries()
    session = ort.InferenceSession(MODEL, providers=[CUDA_PROVIDER])
    runs = CUDA_PROVIDER in session.get_providers()
    if runs:
        x = ort.OrtValue.ortvalue_from_shape_and_type([4], np.float32, "cuda", 0)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x)
        binding.bind_output("y", "cuda")
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
    print(json.dumps(runs))
