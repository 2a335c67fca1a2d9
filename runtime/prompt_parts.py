"""Parts of a prompt, text and images between it: their rows, and the keys of what is in front."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..graphs.chain.executor import Encoded
from ..graphs.families.family import ImageLayout
from ..graphs.plan.plan import StagePlan
from .image_cache import CachedPrefix


@dataclass(frozen=True)
class PromptImage:
    """An image in a prompt, or one of several runs of its rows: the key of its pixels, a function
    for all its rows that enter, how they are laid out, and which run it is.

    ``known``: what the stages made of a prompt up to it, by its key (``Context.computed``), where
    that comes from a file.
    """

    key: str
    encoded: Callable[[], Encoded]
    layout: ImageLayout
    known: tuple[str, CachedPrefix] | None = None
    run: int = 0

    @property
    def rows(self) -> int:
        """N of the run."""
        start, stop = self.layout.spans[self.run]
        return stop - start

    @property
    def last(self) -> bool:
        """True of an image's last run, which is its only one where no markers are between."""
        return self.run == len(self.layout.spans) - 1


PromptPart = Sequence[int] | PromptImage
"""A stretch of a prompt: token ids, or an image."""


def image_rows(parts: Sequence[PromptPart]) -> list[int]:
    """Return N of each image of a prompt."""
    return [part.layout.rows for part in parts if isinstance(part, PromptImage) and part.last]


def ends_image(part: PromptPart) -> bool:
    """Tell if an image ends with this part, the last of its runs."""
    return isinstance(part, PromptImage) and part.last


def visual_rows(plan: StagePlan, images: Sequence[int]) -> list[int]:
    """Return the most visual rows that each stage may hold of a prompt; ``images``: N of each."""
    counts, arriving = [], sum(min(plan.entering, rows) for rows in images)
    for index, stage in enumerate(plan.stages):
        edge = plan.edges[index - 1] if index else None
        if edge is not None and edge.op in ("select", "drop"):
            arriving = min(arriving, edge.keep or 0)
        counts.append(arriving if stage.visual_tokens else 0)
    return counts


def tail_of(parts: Sequence[PromptPart]) -> list[int]:
    """Return the ids of the text behind the last image of a prompt, or of all of it."""
    behind = parts[max(images_among(parts), default=-1) + 1 :]
    return [id_ for part in behind for id_ in part]  # type: ignore[union-attr]


def images_among(parts: Sequence[PromptPart]) -> list[int]:
    """Return the places of the images among ``parts``."""
    return [index for index, part in enumerate(parts) if isinstance(part, PromptImage)]


def chain_keys(begin: int, stages: int, parts: Sequence[PromptPart]) -> list[str]:
    """Return the key of everything up to each part: ids, images and, by their counts, positions;
    and of the number of stages that it went through.
    """
    digest = hashlib.sha256(f"{begin} {stages}".encode())
    keys = []
    for part in parts:
        if isinstance(part, PromptImage):
            text = f"image:{part.key}:{part.run}"
        else:
            text = f"ids:{list(part)}"
        digest.update(f"|{text}".encode())
        keys.append(digest.copy().hexdigest())
    return keys
