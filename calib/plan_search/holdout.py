"""Which samples choose, and which are kept back to check the choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ...graphs.errors import DataError


def hold_out(images: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Indices (choosing, held out) of samples, each ascending; about ``share`` are held out.

    Questions about one picture stay together: a plan that was chosen on a picture has seen it. The
    order of the samples says nothing, as files are often sorted by kind of question; the hash of
    the picture decides, and so every run decides alike.

    Args:
        images: a hash (hex) of what each sample shows.
        share: 0 holds out nothing.

    Raises:
        DataError: ``share`` is no share below 1, or one picture is all there is.
    """
    if not 0 <= share < 1:
        raise DataError(f"holdout: found {share:g}, expected 0 to below 1. Type --holdout 0.33.")
    of_image = Counter(images)
    known = sorted(of_image)
    if share and len(known) < 2:
        raise DataError(
            f"holdout: found {len(known)} picture among {len(images)} samples, expected two or "
            "more: one must choose and another confirm. Add samples, or type --holdout 0."
        )
    wanted = share * len(images)
    held: set[str] = set()
    count = 0
    for key in known[:-1]:
        if count >= wanted:
            break
        held.add(key)
        count += of_image[key]
    both = range(len(images))
    return (
        [index for index in both if images[index] not in held],
        [index for index in both if images[index] in held],
    )
