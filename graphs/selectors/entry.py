"""The contract of entry selectors: what one reads of an image, and what it answers.

A selector runs on the host, once per image, where the vision encoder ends. It sees no question, so
its rows are the same for every question about an image. A greedy loop over 576 patches takes 1 to
4 ms there; in a graph it would be hundreds of small operators in a row. What is one product, the
cosines of all pairs, the vision graph computes. All is in FP32: FP64 would only decide between rows
whose scores differ by less than those of two executors.

Ties go to the lowest index. A row of zeros has the cosine 0 with every row, itself included.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class EncoderReadings:
    """The vision encoder's outputs for one image of N patches; what is not read is None."""

    features: np.ndarray | None
    """(N, h) float32: features of the patches, as the projector takes them, without class row."""
    class_row: np.ndarray | None
    """(h,) float32: features of the class row; None where the encoder has none (SigLIP)."""
    saliency: np.ndarray | None
    """(N,) float32: attention of the class row to each patch in the layer that made the features,
    mean over heads; without a class row the mean attention that a patch receives."""
    keys: np.ndarray | None
    """(N, d) float32: key states of that layer, mean over heads."""
    similarity: np.ndarray | None
    """(N, N) float32: cosines of all pairs of features; of a row of zeros they are 0."""
    row_similarity: np.ndarray | None
    """(N, N) float32: cosines of all pairs of rows after the projector."""
    vocabulary: np.ndarray | None
    """(N, 3) int64: ids of the input embeddings with the largest cosines to each of these rows,
    the largest first."""
    rows: np.ndarray | None
    """(N, D) float32: rows after the projector."""
    image: str
    """Digest of the image, hexadecimal."""

    @property
    def patches(self) -> int:
        """Count of patches, N, in whatever was read."""
        values = (getattr(self, name) for name in READINGS if name != "class_row")
        return next(len(value) for value in values if value is not None)


READINGS = tuple(field.name for field in fields(EncoderReadings) if field.name != "image")
"""Names of what a selector may read, in the order in which the vision graph hands it out."""

PROJECTED = ("row_similarity", "vocabulary", "rows")
"""Those that are known only behind the projector."""


PADDING = -2
"""In place of a patch: a row that only fills up the count, and that no other row sees."""


@dataclass(frozen=True)
class Entered:
    """The K rows of an image that enter the decoder."""

    index: np.ndarray
    """(K,) int64, ascending: the patch whose place each row takes; -1 is the class row. Behind
    them, ``PADDING``."""
    features: np.ndarray | None = None
    """(K, h) float32 where rows were merged before the projector; None: rows ``index`` as is."""
    matched: np.ndarray | None = None
    """(K,) bool: the rows that a selector by classes matched."""

    @property
    def source(self) -> np.ndarray:
        """(K,): which of an image's rows to take; of padding any."""
        return self.index.clip(0)


@dataclass(frozen=True)
class EntrySelector:
    """One rule: a row of ``ENTRY_SELECTORS``; its function ``choose`` is in the module of its name.

    The module is loaded when rows are chosen: commands that only name selectors start without
    NumPy.

    Attributes:
        name: as plans write it.
        summary: what it keeps, in a line.
        reads: names in ``READINGS``.
        takes: fields of a plan's entry, besides ``keep``, that it is given.
        needs_renumbering: whether a row may enter that has no place of its own among the patches.
        control: whether it looks at nothing, and is there to be beaten.
    """

    name: str
    summary: str
    reads: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    needs_renumbering: bool = False
    control: bool = False

    def choose(self, given: EncoderReadings, keep: int, **more: Any) -> Entered:
        """Return the ``keep`` rows that enter, 1 to N; ``given`` is left as it is.

        ``more``: the fields that it ``takes``.
        """
        return import_module(f".{self.name}", __package__).choose(given, keep, **more)
