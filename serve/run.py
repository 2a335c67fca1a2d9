"""A server from its start to its end: loaded, listening, drained, closed."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..graphs.bundle import Bundle
from ..graphs.errors import CapacityError
from .app import make_app
from .options import ServeOptions
from .pool import EnginePool
from .service import Service

KEEP_ALIVE_SECONDS = 20
HEAD_SECONDS = 20
"""In which the head of a request has to be here; a connection without one is closed."""

LAST_SECONDS = 1
"""That cancelled requests have to say so, once the time to drain is over."""


class TimedProtocol(H11Protocol):
    """A connection that ends where it is open and no request comes, or one byte by byte."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take bytes, which may complete the head of a request, or begin another."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """End with the connection."""
        super().connection_lost(exc)
        self._stop()

    def _wait(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class DrainingServer(uvicorn.Server):
    """A server that goes on answering when it is asked to stop: until all is said, or it is late.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service, self._late = service, 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; called by a signal."""
        if self.service.draining:
            self.should_exit = self.force_exit = True
        self._late = time.monotonic() + self.service.options.drain_seconds
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; called ten times a second."""
        over = not self.service.active or time.monotonic() > self._late
        self.should_exit = self.should_exit or (self.service.draining and over)
        return await super().on_tick(counter)


def serve(
    bundles: Mapping[str, Bundle], options: ServeOptions, started: Callable[[str], None]
) -> None:
    """Serve bundles until a signal says to stop; ``started`` is told the address.

    Raises:
        CapacityError: the port is taken, or the memory.
        VisistageError: the first bundle cannot be loaded.
    """
    listener = listen(options)
    service = Service(EnginePool(bundles, options), options)
    try:
        service.load_first()
        host = f"[{options.host}]" if ":" in options.host else options.host
        started(f"http://{host}:{listener.getsockname()[1]}")
        DrainingServer(server_config(service), service).run([listener])
    finally:
        listener.close()
        service.close()


def server_config(service: Service) -> uvicorn.Config:
    """Return how uvicorn runs the application of a service."""
    return uvicorn.Config(
        make_app(service),
        http=TimedProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
    )


def listen(options: ServeOptions) -> socket.socket:
    """Return the socket of a server.

    Raises:
        CapacityError: the port is taken, or not this user's to take.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CapacityError(
            f"{options.host}:{options.port} cannot be listened at: {reason}. Choose another: "
            "--port 0 takes any that is free"
        ) from error
