"""Options of a server, as the command line gives them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ..graphs.errors import TargetError
from ..runtime.engine import DEFAULT_QUEUE
from ..runtime.image.image import MAX_PIXELS

API_KEY_VARIABLE = "VISISTAGE_API_KEY"


@dataclass(frozen=True)
class ServeOptions:
    """See the module.

    Attributes:
        host: address that the server listens at; one that others reach needs an API key.
        port: 0 takes any that is free.
        api_key: that every request but those for health must carry; None: none.
        lanes: answers that a bundle writes at once; None: 8 where its back end can, else 1.
        queue: questions that may wait for a lane, of each bundle.
        memory_limit: bytes that the weights of all loaded bundles may take; None: no limit.
        backend, threads: as in ``LoadedBundle``.
        allow_images_from: hosts (``HOST`` or ``HOST:PORT``) from which images are fetched.
        allow_origins: origins (``https://app.example``) whose pages may ask.
        max_body: bytes of a request, and of an image that is fetched.
        max_images: of a request.
        max_pixels: width x height of the largest image.
        max_tokens: of the longest answer that may be asked for.
        drain_seconds: that answers under way have to end once the server shall stop.

    Raises:
        TargetError: a key that no header can carry, or none for a host that others reach.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    lanes: int | None = None
    queue: int = DEFAULT_QUEUE
    memory_limit: int | None = None
    backend: str | None = None
    threads: int | None = None
    allow_images_from: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_body: int = 20 << 20
    max_images: int = 8
    max_pixels: int = MAX_PIXELS
    max_tokens: int = 1024
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        key = self.api_key
        sound = key is None or (key.isascii() and key.isprintable() and key.strip() == key)
        if not sound or key == "":
            raise TargetError("the API key has to be printable ASCII without spaces around it")
        if not self.loopback and key is None:
            raise TargetError(
                f"--host {self.host} lets other machines ask, and there is no API key. Set "
                f"{API_KEY_VARIABLE} (or give --api-key), or leave --host out"
            )

    @property
    def loopback(self) -> bool:
        """Return whether only programs on this machine reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
