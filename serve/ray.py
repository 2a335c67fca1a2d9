"""The same server as a Ray Serve deployment: replicas on one machine or on many.

    from ray import serve
    from visistage.serve.ray import deployment

    serve.run(deployment({"demo": "engines/demo"}, replicas=2), blocking=True)

Ray routes requests, replaces replicas that died, and lets those that shall stop end their answers.
Routes, limits, errors and the key are those of ``visistage serve``; every replica loads the bundles
from its own disk, and has lanes, a queue and image caches of its own. Requests with one value of
the header ``serve_multiplexed_model_id``, such as a hash of their image, go to one replica if it
can take them, where the image is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from ..graphs.bundle import Bundle, find_bundle
from ..runtime.engine import DEFAULT_LANES
from .app import make_app
from .options import ServeOptions
from .pool import EnginePool
from .service import Service

MOST_IMAGES = 256
"""Whose replica Ray remembers, for each replica."""


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
        return _affine(make_app(service))

    configured = serve.deployment(
        serve.ingress(build)(),
        name="visistage",
        num_replicas=replicas,
        max_ongoing_requests=(chosen.lanes or DEFAULT_LANES) + chosen.queue,
        graceful_shutdown_timeout_s=chosen.drain_seconds,
        ray_actor_options={"num_cpus": cpus},
    )
    return configured.bind()


def _affine(app: ASGIApp) -> ASGIApp:
    """Return an application whose replica Ray remembers as the one for an image."""

    @serve.multiplexed(max_num_models_per_replica=MOST_IMAGES)
    async def remember(image: str) -> str:
        return image  # Ray's router learns of it, which is all

    async def remembering(scope: Scope, receive: Receive, send: Send) -> None:
        image = serve.get_multiplexed_model_id()
        if image:
            await remember(image)
        await app(scope, receive, send)

    return remembering
