"""The gate of a server: what every request passes before its route, and what is written of it.

Who asks by a name that is not this server's (DNS rebinding), without the key, while it shuts down
or beyond what it can hold is turned away here. The log has method, route, status, milliseconds,
tokens and an id, which the response carries; nothing of what was asked or answered.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import BUG, RequestError, error_response
from .service import Service

logger = logging.getLogger(__name__)

HEALTH = ("/health", "/ready", "/v2/health/live", "/v2/health/ready")
ROUTES = (*HEALTH, "/", "/metrics", "/v1/models", "/v1/chat/completions")

METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass
class Record:
    """The facts of a request that the log tells."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    tokens: int | None = None

    @staticmethod
    def of(scope: Scope) -> Record:
        """Return that of the request which ``scope`` describes."""
        record = scope["visistage.record"]
        assert isinstance(record, Record)
        return record


class Guard:
    """See the module; an ASGI application around another."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service
        options = service.options
        self._names = {*LOCAL_NAMES, options.host.lower()} if options.loopback else None
        self._key = None if options.api_key is None else _digest(options.api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = scope["visistage.record"] = Record()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_headers(record)]
            await send(message)

        counted = scope["path"] not in HEALTH
        self.service.active += counted
        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await error_response(refusal, _challenge(refusal))(scope, receive, noted)
            else:
                await self.app(scope, receive, noted)
        except ClientDisconnect:
            record.status = 499
        except Exception as error:
            logger.error("request %s failed", record.id, exc_info=error)
            if not record.status:
                await error_response(BUG)(scope, receive, noted)
        finally:
            self.service.active -= counted
            self._note(scope, record)

    def _refusal(self, scope: Scope) -> RequestError | None:
        headers = Headers(scope=scope)
        if self._names is not None and _host(headers.get("host", "")) not in self._names:
            text = "this server is asked by its own name: localhost"
            return RequestError(text, 403, "host_not_allowed")
        if scope["path"] in HEALTH:
            return None
        if self._key is not None and not _carries(headers.get("authorization", ""), self._key):
            text = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            return RequestError(text, 401, "invalid_api_key")
        if self.service.draining:
            text = "the server is shutting down and takes no more requests"
            return RequestError(text, 503, "shutting_down")
        if self.service.active > self.service.most:
            text = f"{self.service.most} requests are under way, as many as may be"
            return RequestError(text, 429, "too_many_requests")
        return None

    def _note(self, scope: Scope, record: Record) -> None:
        path = scope["path"]
        route = next((known for known in ROUTES if path == known), "other")
        elapsed_ms = (time.monotonic() - record.started) * 1e3
        tokens = "-" if record.tokens is None else record.tokens
        self.service.metrics.requests.labels(route, record.status).inc()
        method = scope["method"] if scope["method"] in METHODS else "other"
        line = "%s %s %s %d %.0f ms %s tokens"
        logger.info(line, record.id, method, route, record.status, elapsed_ms, tokens)


def _headers(record: Record) -> list[tuple[bytes, bytes]]:
    return [(b"x-request-id", record.id.encode()), (b"x-content-type-options", b"nosniff")]


def _challenge(refusal: RequestError) -> dict[str, str]:
    """Return the header that lets a browser ask its user for the key, as a password."""
    return {"www-authenticate": 'Basic realm="visistage"'} if refusal.status == 401 else {}


def _host(header: str) -> str:
    """Return the name in a Host header, without its port."""
    name, _, port = header.lower().rpartition(":")
    return name if name and port.isdecimal() else header.lower()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _carries(header: str, key: bytes) -> bool:
    """Return whether an Authorization header carries the key, in a time that tells nothing."""
    scheme, _, given = header.partition(" ")
    secret = given.strip().encode("latin-1", "replace")
    if scheme.lower() == "basic":
        try:
            secret = base64.b64decode(secret, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(_digest(secret), key)
