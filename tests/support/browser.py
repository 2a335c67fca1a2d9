"""A real browser without a window, for the pages that people read."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The first browser that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def look(address: str, *options: str) -> tuple[str, list[str]]:
    """What the browser prints for a page, and what it complains about."""
    name = find()
    assert name is not None
    # fmt: off
    command = [
        name, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=3000",
        *options, address,
    ]
    # fmt: on
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def check_picture(shot: Path, scheme: str, least: float) -> None:
    """Whether a screenshot has the ground of its colour scheme, and ``least`` of it written on."""
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    ground = pixels[2, 2]
    assert (ground.mean() > 200) == (scheme == "light")
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 300
    written = (np.abs(pixels - ground).max(-1) > 60).mean()
    assert least < written < 0.8
