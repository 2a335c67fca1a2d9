"""FasterVLM's rule: the patches that the class row attends to most."""

from __future__ import annotations

from .arithmetic import largest
from .entry import EncoderReadings, Entered, EntrySelector


class ClassAttention(EntrySelector):
    """The K patches of the largest saliency."""

    name = "cls"
    summary = "FasterVLM: the patches with most attention of the encoder's class row"
    reads = ("saliency",)

    def choose(self, given: EncoderReadings, keep: int) -> Entered:
        """Return the patches of the largest saliency."""
        assert given.saliency is not None
        return Entered(largest(given.saliency, keep))
