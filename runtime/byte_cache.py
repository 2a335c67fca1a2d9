"""A least-recently-used cache with a limit in bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """Keeps the values last used whose sizes together stay within ``limit`` bytes.

    A value larger than the limit is not kept at all.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self._items: OrderedDict[str, tuple[Value, int]] = OrderedDict()

    def get(self, key: str) -> Value | None:
        """The value, now the most recently used; None when it is not (or no longer) here."""
        item = self._items.get(key)
        if item is None:
            return None
        self._items.move_to_end(key)
        return item[0]

    def put(self, key: str, value: Value, nbytes: int) -> None:
        """Keep ``value``, dropping the least recently used until it fits."""
        self.drop(key)
        if nbytes > self.limit:
            return
        while self.nbytes + nbytes > self.limit:
            self.drop(next(iter(self._items)))
        self._items[key] = (value, nbytes)
        self.nbytes += nbytes

    def drop(self, key: str) -> None:
        """Forget ``key`` if it is here."""
        item = self._items.pop(key, None)
        if item is not None:
            self.nbytes -= item[1]

    def clear(self) -> None:
        """Forget everything."""
        self._items.clear()
        self.nbytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)
