"""The prefix of every prompt, whose keys and values a bundle stores: computed at build time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..graphs.bundle import Bundle
from ..graphs.caches import stage_caches
from ..graphs.chain.chain import Chain
from ..graphs.chain.rows import AppendedRows
from .backends.backend import Backend
from .backends.feeds import map_tensor
from .prompt_parts import PromptImage, PromptPart, images_among


class StoredPrefix:
    """A bundle's prefix, if it has one, and how much of it the stages of a chain hold.

    rows: of the prefix in the first slots of every stage.
    """

    def __init__(self, bundle: Bundle, chain: Chain):
        self.chain, self.rows = chain, 0
        self.ids = () if bundle.manifest.prefix is None else bundle.manifest.prefix.ids
        self.saved = self._mapped(bundle)

    def part_from(self, parts: Sequence[PromptPart]) -> tuple[int, list[PromptPart]]:
        """Return the slot where a prompt starts, and what of it is not prefix."""
        head = parts[0]
        if not self.ids or isinstance(head, PromptImage):
            return 0, list(parts)
        if self.chain.plan.freezes("prefix") and not images_among(parts):
            return 0, list(parts)  # only rows before an image are frozen
        if tuple(head[: len(self.ids)]) != self.ids:
            return 0, list(parts)
        rest = head[len(self.ids) :]
        return len(self.ids), [*([rest] if len(rest) else []), *parts[1:]]

    def hold(self, begin: int, executor: Backend) -> bool:
        """Make the first ``begin`` slots of every stage hold the prefix, and nothing else there.

        Returns True where they held something else before.
        """
        if begin == self.rows:
            return False
        order = np.arange(begin, dtype=np.int32)[None]
        for index, slots in enumerate(self.chain.slots):
            slots.rewind(0)
            if begin:
                self.chain.reserve(index, begin)
                slots.write(AppendedRows(False, None, order, order))
                executor.restore(index, 0, self.saved[index])
        self.rows = begin
        return True

    def _mapped(self, bundle: Bundle) -> list[dict[str, np.ndarray]]:
        """Map the stored keys and values, by stage; nothing is read yet."""
        prefix = bundle.manifest.prefix
        if prefix is None:
            return []
        stored = {"key": prefix.keys, "value": prefix.values}
        arrays = {name: map_tensor(bundle, ref) for name, ref in stored.items()}
        arrays["ahead"] = arrays["key"]
        stages = [[name.split(".") for name in names] for names in stage_caches(self.chain.plan)]
        return [
            {f"{kind}.{layer}": arrays[kind][int(layer)][None] for kind, layer in names}
            for names in stages
        ]
