"""The same server as a Ray Serve deployment: replicas on one machine or on many.

    from ray import serve
    from visistage.serve.ray import deployment

    serve.run(deployment({"demo": "engines/demo"}, replicas=2), blocking=True)

Ray routes requests, replaces replicas that died, and lets those that shall stop end their answers.
Routes, limits, errors and the key are those of ``visistage serve``; every replica loads the bundles
from its own disk, and has lanes, a queue and image caches of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from ..graphs.bundle import Bundle, find_bundle
from ..runtime.engine import DEFAULT_LANES
from .app import make_app
from .options import ServeOptions
from .pool import EnginePool
from .service import Service


def deployment(
    bundles: Mapping[str, str | Path], *, replicas: int = 1, cpus: float = 1, **options: Any
) -> serve.Application:
    """Return an application for ``serve.run``.

    Args:
        bundles: folders by name, found on every machine that runs a replica.
        replicas: how many.
        cpus: that Ray sets aside for each; with ``threads`` as many are used.
        options: fields of ``ServeOptions``. ``host`` says what requests may call the server: leave
            it out where Ray listens at 127.0.0.1, as it does by default.

    Raises:
        VisistageError: an option cannot be used.
    """
    chosen = ServeOptions(**options)
    folders = {name: str(path) for name, path in bundles.items()}

    def build() -> ASGIApp:
        opened = {name: Bundle.open(find_bundle(Path(path))) for name, path in folders.items()}
        service = Service(EnginePool(opened, chosen), chosen)
        service.load_first()
        return make_app(service)

    configured = serve.deployment(
        serve.ingress(build)(),
        name="visistage",
        num_replicas=replicas,
        max_ongoing_requests=(chosen.lanes or DEFAULT_LANES) + chosen.queue,
        graceful_shutdown_timeout_s=chosen.drain_seconds,
        ray_actor_options={"num_cpus": cpus},
    )
    return configured.bind()
