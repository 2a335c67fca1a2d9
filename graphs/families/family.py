"""A model family: what its module tells all others, and how it lays out an image.

config.json ──read──▶ ModelConfig ──layout(height, width)──▶ ImageLayout
├ pixels: resizes, tiles
├ prompt: runs, positions, advance
└ feeds of the vision graph
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from ..config import Limits, ModelConfig

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class ImageLayout:
    """Result of laying out an image: a pure function of its height, width and the limits.

    Attributes:
        rows: N, its visual rows in all.
        runs: how it stands in a prompt: texts of markers, and counts of rows between them.
        positions: (N, A) of its rows on each axis, from the first row of their run on.
        advance: positions that a run of n rows takes, by run; n of each on one axis.
        resizes: sizes that the picture is brought to, one after the other; none where the
            processor's own steps do it whatever its size.
        padded: the last size with what is put around the picture, in black; None: nothing is.
        grid: rows and columns of the tiles that are cut.
        merge: of tiles that are patches, the side of the squares in whose order they come; 0: of
            other tiles, which come row by row.
        whole_of: the picture that this small one is made of: as it came, or as it was resized.
        whole: where among the tiles the whole picture comes, squeezed to one; "": it does not.
        boxes: (N, 4) left, top, right and bottom of what a row stands for, in shares of the
            picture; None: a matter of the vision encoder's one grid (``overlay.Grid``).
        feeds: inputs of the vision graph beside the pixels.
    """

    rows: int
    runs: tuple[str | int, ...]
    positions: np.ndarray = field(compare=False, repr=False)
    advance: tuple[int, ...]
    resizes: tuple[Size, ...] = ()
    padded: Size | None = None
    grid: tuple[int, int] = (1, 1)
    merge: int = 0
    whole: Literal["", "first", "last"] = ""
    whole_of: Literal["picture", "resized"] = "picture"
    boxes: np.ndarray | None = field(default=None, compare=False, repr=False)
    feeds: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Rows [start, stop) of each run."""
        ends = [0, *accumulate(run for run in self.runs if isinstance(run, int))]
        return list(pairwise(ends))

    @property
    def tiles(self) -> int:
        """Tiles that the vision graph takes, the whole picture among them."""
        return self.grid[0] * self.grid[1] + bool(self.whole)


def in_blocks(values: np.ndarray, merge: int) -> np.ndarray:
    """Return values (H, W, ...) of tiles one after another, a square of them after the other."""
    high, wide = values.shape[:2]
    split = values.reshape(high // merge, merge, wide // merge, merge, *values.shape[2:])
    return split.swapaxes(1, 2).reshape(high * wide, *values.shape[2:])


def in_one_run(rows: int, **more: Any) -> ImageLayout:
    """Return the layout of rows one after another on one axis, without markers.

    ``more``: other fields of ``ImageLayout``, ``runs`` with markers around the rows among them.
    """
    positions = np.arange(rows, dtype=np.int32)[:, None]
    return ImageLayout(
        **{"rows": rows, "runs": (rows,), **more}, positions=positions, advance=(rows,)
    )


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: ``model_type`` of its ``config.json``.
        architecture: the class of transformers.
        read: returns the config that ``config.json`` describes, of the published limits.
        layout: returns how an image of a height and a width is laid out.
        most_rows: returns N of the largest image, what plans and slots are made for.
        prefixes: of tensor names: those in files, the longer ones first, and ours.
        spellings: parts of names in the vision encoder, in files and here.
        nested: whether transformers takes the tiles of an image in a dimension of their own.
        limits: returns the limits that the image processor's file says; None: it has none.
        plan: where none is named: a pruned one only where its authors published settings.
        budgeted: returns the limits under which no image has more than so many rows; None: every
            image has as many, which no option changes.
        windows: returns how many windows an image has that the encoder attends in: the fewest, of
            a square one of the most rows, and the most; None: it has none.
    """

    name: str
    architecture: str
    read: Callable[[Mapping[str, Any]], ModelConfig]
    layout: Callable[[ModelConfig, int, int], ImageLayout]
    most_rows: Callable[[ModelConfig], int]
    prefixes: tuple[tuple[str, str], ...]
    spellings: tuple[tuple[str, str], ...] = (("vision_tower.vision_model.", "vision_tower."),)
    plan: str = "dense"
    nested: bool = False
    limits: Callable[[ModelConfig, Mapping[str, Any]], Limits] | None = None
    budgeted: Callable[[ModelConfig, int], Limits] | None = None
    windows: Callable[[ModelConfig], tuple[int, int, int]] | None = None
