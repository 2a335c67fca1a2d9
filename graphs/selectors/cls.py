"""FasterVLM's rule: the patches that the class row attends to most."""

from __future__ import annotations

from .arithmetic import largest
from .entry import EncoderReadings, Entered


def choose(given: EncoderReadings, keep: int) -> Entered:
    """Return the patches of the largest saliency."""
    assert given.saliency is not None
    return Entered(largest(given.saliency, keep))
