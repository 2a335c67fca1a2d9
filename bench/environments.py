"""A separate Python for each peer: their requirements contradict each other and ours.

    .cache/bench/peers/NAME/      the environment
    .cache/bench/peers/NAME.log   the output of pip

pip finds packages as it is configured here; that configuration is not recorded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .runner import PeerError, ending, last_line

ROOT = Path(".cache/bench")
NOTE = "visistage.json"


@dataclass(frozen=True)
class Environment:
    """``steps``: arguments of pip, in turn. ``variables``: what its processes find set."""

    name: str
    steps: tuple[tuple[str, ...], ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


OWN = Environment("own")
"""The Python that runs this."""

OPENVINO = Environment(
    "openvino",
    (
        # First, so that nothing later takes a build for GPUs.
        ("install", "torch==2.13.0"),
        (
            "install",
            "torch==2.13.0",
            "torchvision==0.28.0",
            "optimum-intel[openvino]==2.2.0",
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1",
            "openvino-tokenizers==2026.4.1",
            "pillow",
        ),
        # optimum-intel asks for torchvision, whose build may not match torch's; without it images
        # are processed by Pillow.
        ("uninstall", "-y", "torchvision", "triton"),
    ),
    {"HF_HUB_OFFLINE": "1"},
)
OPENVINO_QWEN = replace(
    OPENVINO, name="openvino-qwen", steps=(*OPENVINO.steps, ("install", "transformers==4.57.6"))
)
"""For optimum-intel's export of Qwen2-VL and Qwen2.5-VL, which takes no later one."""

LLAMA_CPP = Environment(
    "llama-cpp",
    (
        ("install", "numpy", "gguf", "safetensors"),
        ("install", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"),
    ),
    {"CMAKE_BUILD_PARALLEL_LEVEL": "2"},
)
"""Built from source for this processor."""


def interpreter(environment: Environment, minutes: float) -> Path:
    """Return the environment's Python, made if need be, with ``minutes`` for each step.

    Raises:
        PeerError: a step failed or took longer; names it and says why.
    """
    if environment is OWN:
        return Path(sys.executable)
    folder = (ROOT / "peers" / environment.name).absolute()
    python, note = folder / "bin" / "python", folder / NOTE
    recipe = json.dumps({"steps": environment.steps})
    if note.is_file() and note.read_text() == recipe:
        return python
    log = folder.with_suffix(".log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], environment, log, minutes)
    for step in environment.steps:
        _run([str(python), "-m", "pip", *step], environment, log, minutes)
    note.write_text(recipe)
    return python


def run_in(environment: Environment, arguments: list[str], log: Path, minutes: float) -> None:
    """Run a script or module of a finished environment.

    Raises:
        PeerError: it failed.
    """
    python = interpreter(environment, minutes)
    _run([str(python), *arguments], environment, log, minutes)


def _run(command: list[str], environment: Environment, log: Path, minutes: float) -> None:
    """Run a command at low priority: a setup may be heavy and is not measured."""
    words = " ".join(Path(word).name if word.startswith("/") else word for word in command[1:])
    with log.open("a") as stream:
        process = subprocess.Popen(
            ["nice", "-n", "19", *command],
            stdout=stream,
            stderr=stream,
            env={**os.environ, **environment.variables},
            start_new_session=True,
        )
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            raise PeerError(f"{environment.name}: {words} took over {minutes:g} min") from None
        finally:
            if process.poll() is None:
                # With all it started: compilers would continue for minutes beside a measurement.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        why = last_line(log.read_text(errors="replace"))
        raise PeerError(f"{environment.name}: {words} failed ({ending(code)}): {why}")
