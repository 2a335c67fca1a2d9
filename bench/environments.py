"""A Python of its own for each peer: their requirements contradict each other and ours.

    .cache/bench/peers/NAME/      the environment
    .cache/bench/peers/NAME.log   what pip said

pip finds packages as it is configured here; nothing of that is written down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

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
        # optimum-intel asks for torchvision, whose build may not match torch's; without it pictures
        # are processed by Pillow.
        ("uninstall", "-y", "torchvision", "triton"),
    ),
    {"HF_HUB_OFFLINE": "1"},
)
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
    """The environment's Python, made if need be; a finished one is used again.

    Args:
        environment: which.
        minutes: that each step may take.

    Raises:
        PeerError: a step failed or took longer; names it and says why.
    """
    if environment is OWN:
        return Path(sys.executable)
    folder = (ROOT / "peers" / environment.name).absolute()
    python, note = folder / "bin" / "python", folder / NOTE
    recipe = {"steps": [list(step) for step in environment.steps]}
    if _read(note) == recipe:
        return python
    log = folder.with_suffix(".log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], environment, log, minutes)
    for step in environment.steps:
        _run([str(python), "-m", "pip", *step], environment, log, minutes)
    note.write_text(json.dumps(recipe))
    return python


def run_in(environment: Environment, arguments: list[str], log: Path, minutes: float) -> None:
    """Run a script or module of a finished environment.

    Raises:
        PeerError: it failed.
    """
    python = interpreter(environment, minutes)
    _run([str(python), *arguments], environment, log, minutes)


def _run(command: list[str], environment: Environment, log: Path, minutes: float) -> None:
    """Niced: setting up may be heavy, and is measured by nobody."""
    words = " ".join(Path(word).name if word.startswith("/") else word for word in command[1:])
    with log.open("a") as stream:
        process = subprocess.Popen(
            ["nice", "-n", "19", *command],
            stdout=stream,
            stderr=stream,
            env={**os.environ, **environment.variables},
        )
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            process.wait()
            raise PeerError(f"{environment.name}: {words} took over {minutes:g} min") from None
    if code:
        why = last_line(log.read_text(errors="replace"))
        raise PeerError(f"{environment.name}: {words} failed ({ending(code)}): {why}")


def _kill(pid: int) -> None:
    """End a process and all it started: compilers would go on for minutes beside a measurement."""
    top = psutil.Process(pid)
    for one in [*top.children(recursive=True), top]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def _read(note: Path) -> dict | None:
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):
        return None
