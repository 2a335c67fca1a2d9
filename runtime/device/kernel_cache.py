"""Kernels that TensorRT-RTX compiled for this GPU, kept for the next start.

They are programs, so they lie with this user and not with the bundle, which may come from anywhere;
a file that is damaged, or of other engines, is not read, and replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any

from ...graphs.engine_index import Engines
from ...graphs.files import user_cache, write_file
from .tensorrt import TensorRtVariant

DIGEST_BYTES = 32


class KernelCache:
    """One cache for all engines of a bundle.

    ``name``: of its file in the user's cache; None: nothing is kept. ``engines``: their hashes,
    which the file must be of.
    """

    def __init__(self, name: str | None = None, engines: str = ""):
        self.name, self.engines = name, engines
        self.file: Path | None = None
        self._cache: Any = None
        self._read = b""

    def attach(self, config: Any) -> None:
        """Let a context of ``config``, an ``IRuntimeConfig``, take kernels from here."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            folder = user_cache() if self.name else None
            self.file = folder and folder / str(self.name)
            self._read = self._load()
            if self._read:  # of another driver: refused, and the cache is empty
                self._cache.deserialize(self._read)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what is new."""
        if self._cache is None or self.file is None:
            return
        data = bytes(self._cache.serialize())
        if data != self._read:
            with contextlib.suppress(OSError):  # a full disk: they are compiled again
                write_file(self.file, self._digest(data) + data)

    def _load(self) -> bytes:
        if self.file is None:
            return b""
        try:
            whole = self.file.read_bytes()
        except OSError:
            return b""
        digest, data = whole[:DIGEST_BYTES], whole[DIGEST_BYTES:]
        return data if digest == self._digest(data) else b""

    def _digest(self, data: bytes) -> bytes:
        return hashlib.sha256(self.engines.encode() + data).digest()


def kernels_of(engines: Engines, trt_variant: TensorRtVariant, gpu: str) -> KernelCache:
    """Return the kernels kept for a bundle's engines, by library and GPU."""
    bundle = hashlib.sha256(str(engines.folder.resolve()).encode()).hexdigest()[:16]
    words = re.sub(r"[^A-Za-z0-9]", "-", gpu)[:60]
    name = f"kernels-{trt_variant.backend}-{trt_variant.version}-{words}-{bundle}.cache"
    return KernelCache(name, "".join(fact.sha256 for fact in engines.engines))
