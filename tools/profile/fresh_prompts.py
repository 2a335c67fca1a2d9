"""Pictures that nobody has seen before, and questions that nobody has asked.

A repetition on pixels or words of an earlier one would measure a cache. Pictures are soft noise,
compressed as a camera would: decoding them is part of the time. Questions are alike in length.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIZE = (640, 480)
NOISE_GRID = (20, 15)
FIRST = "What can be seen in part {number} of this picture?"
SECOND = "And what colour is the thing in part {number}?"


@dataclass(frozen=True)
class ProfilePrompt:
    """A picture as JPEG, a question about it, and a second one."""

    image: bytes
    first: str
    second: str


def prompts(seed: int = 0) -> Iterator[ProfilePrompt]:
    """Prompts without end, the same for the same seed."""
    random = np.random.default_rng(seed)
    number = 100  # three digits each: as many tokens
    while True:
        noise = random.integers(0, 256, (NOISE_GRID[1], NOISE_GRID[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC)
        data = io.BytesIO()
        image.save(data, "JPEG", quality=90)
        yield ProfilePrompt(
            data.getvalue(), FIRST.format(number=number), SECOND.format(number=number)
        )
        number = 100 + (number - 99) % 900
