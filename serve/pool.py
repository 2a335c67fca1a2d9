"""The bundles of a server by their names: loaded when asked for, the least used one put away.

Engines are borrowed: one that is not borrowed is idle, and may make room for another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ..graphs.bundle import Bundle
from ..graphs.errors import CapacityError, nearest
from ..graphs.fields import show
from ..graphs.targets import find_target
from ..pages.units import show_bytes
from ..runtime.backends.registry import BACKENDS, backend_of
from ..runtime.engine import DEFAULT_LANES, Engine
from .errors import RequestError
from .options import ServeOptions


@dataclass
class Served:
    """A bundle, and its engine while it is loaded; ``borrowed``: how often at this moment."""

    name: str
    bundle: Bundle
    engine: Engine | None = None
    borrowed: int = 0
    used: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.bundle.manifest.weight_bytes


class EnginePool:
    """See the module; any thread may ask.

    Args:
        bundles: opened ones by name; the first is meant where a request names none.
        options: those that engines take, and ``memory_limit``.

    Raises:
        CapacityError: a bundle's weights take more than the limit.
    """

    def __init__(self, bundles: Mapping[str, Bundle], options: ServeOptions):
        self.options = options
        self.served = {name: Served(name, bundle) for name, bundle in bundles.items()}
        self._lock, self._loading = threading.Lock(), threading.Lock()
        limit = options.memory_limit
        for own in self.served.values():
            if limit is not None and own.nbytes > limit:
                raise CapacityError(
                    f"the weights of {own.name} take {show_bytes(own.nbytes)}, and --memory-limit "
                    f"is {show_bytes(limit)}. Raise it"
                )

    def name_of(self, model: str | None) -> str:
        """Return the name of the bundle that a request means.

        Raises:
            RequestError: there is none of that name, or several and none was named.
        """
        if model is None and len(self.served) == 1:
            return next(iter(self.served))
        if model not in self.served:
            names = list(self.served)
            what = "no model was named" if model is None else f"there is no model {show(model)}"
            hint = nearest(model[:80], names) if model else ""
            text = f"{what}; here are {', '.join(names)}.{hint}"
            raise RequestError(text, 404, "model_not_found", "model")
        return model

    def loaded(self) -> dict[str, Engine]:
        """Return the engines that are loaded, by name."""
        with self._lock:
            found = {own.name: own.engine for own in self.served.values()}
        return {name: engine for name, engine in found.items() if engine is not None}

    @contextmanager
    def borrow(self, name: str) -> Iterator[Served]:
        """Keep a bundle's engine, or the one that will be loaded, from being put away."""
        own = self.served[name]
        with self._lock:
            own.borrowed += 1
        try:
            yield own
        finally:
            with self._lock:
                own.borrowed -= 1
                own.used = time.monotonic()

    def engine_of(self, own: Served) -> Engine:
        """Return the engine of a bundle that was borrowed, loaded if need be.

        Raises:
            RequestError: there is no room for it now.
            VisistageError: it cannot be loaded.
        """
        with self._loading:
            if own.engine is not None and own.engine.closed:  # an error of ours ended its thread
                self._put_away(own)
            if own.engine is None:
                own.engine = self._load(own)
            return own.engine

    def close(self) -> None:
        """Close all engines; what is under way there is cancelled."""
        with self._loading:
            for own in self.served.values():
                self._put_away(own)

    def _load(self, own: Served) -> Engine:
        options, limit = self.options, self.options.memory_limit
        if limit is not None:
            limit -= self._make_room(limit - own.nbytes)
        target = find_target(own.bundle.manifest.target)
        row = BACKENDS[options.backend] if options.backend else backend_of(target)
        lanes = options.lanes or (DEFAULT_LANES if "lanes" in row.options else 1)
        return Engine(
            own.bundle,
            lanes=lanes,
            queue=options.queue,
            backend=options.backend,
            threads=options.threads,
            memory_limit=limit,
            max_pixels=options.max_pixels,
        )

    def _make_room(self, most: int) -> int:
        """Put idle engines away until the weights of the others take at most ``most`` bytes.

        Returns how many they take.

        Raises:
            RequestError: too many of them are at work.
        """
        while True:
            with self._lock:
                here = [own for own in self.served.values() if own.engine is not None]
                taken = sum(own.nbytes for own in here)
                if taken <= most:
                    return taken
                idle = [own for own in here if not own.borrowed]
                if not idle:
                    raise RequestError(
                        "other models are answering and there is no room for this one "
                        "(--memory-limit). Ask again in a moment",
                        503,
                        "no_room",
                        "model",
                    )
                oldest = min(idle, key=lambda own: own.used)
                engine, oldest.engine = oldest.engine, None
            assert engine is not None
            engine.close()

    def _put_away(self, own: Served) -> None:
        with self._lock:
            engine, own.engine = own.engine, None
        if engine is not None:
            engine.close()
