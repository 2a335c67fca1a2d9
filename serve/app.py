"""The routes of a server, behind its gate."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ..graphs.errors import VisistageError, nearest
from ..pages.page import render_page
from .chat import ChatCompletions
from .errors import BUG, RequestError, as_refusal, error_response, json_response
from .guard import ROUTES, Guard
from .pool import Served
from .service import Service

PAGE_FOLDER = Path(__file__).parent / "page"


def make_app(service: Service) -> ASGIApp:
    """Return the ASGI application of a service."""
    page = _page(service)

    async def health(request: Request) -> Response:
        return json_response({"status": "ok"})

    async def live(request: Request) -> Response:
        return json_response({"live": True})

    async def ready(request: Request) -> Response:
        good = not service.draining
        return json_response({"ready": good}, 200 if good else 503)

    async def metrics(request: Request) -> Response:
        text = service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(request: Request) -> Response:
        served = service.pool.served.values()
        return json_response({"object": "list", "data": [_model(own) for own in served]})

    async def model(request: Request) -> Response:
        name = service.pool.name_of(request.path_params["name"])
        return json_response(_model(service.pool.served[name]))

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers={"content-security-policy": "frame-ancestors 'none'"})

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/ready", ready),
            Route("/v2/health/live", live),
            Route("/v2/health/ready", ready),
            Route("/metrics", metrics),
            Route("/", index),
        ],
        exception_handlers={
            HTTPException: _refuse_route,
            VisistageError: _refuse,
            Exception: _tell_bug,
        },
    )
    app.router.redirect_slashes = False
    guarded: ASGIApp = Guard(app, service)
    if service.options.allow_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=service.options.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return guarded


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Answer to a path or a method that there is not."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:80]
    known = error.status_code != 404
    text = f"{request.method[:20]} is not for {path}" if known else f"there is no {path}"
    refusal = RequestError(
        f"{text}.{'' if known else nearest(path, ROUTES)}",
        error.status_code,
        "method_not_allowed" if known else "not_found",
    )
    return error_response(refusal, error.headers)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, VisistageError)
    return error_response(as_refusal(error))


async def _tell_bug(request: Request, error: Exception) -> Response:
    return error_response(BUG)


def _model(own: Served) -> dict[str, Any]:
    """Return a bundle as OpenAI lists models, and what may be known of it."""
    manifest = own.bundle.manifest
    return {
        "id": own.name,
        "object": "model",
        "created": int((own.bundle.path / "manifest.json").stat().st_mtime),
        "owned_by": "visistage",
        "visistage": {
            "model": manifest.model,
            "plan": manifest.plan.name,
            "precision": manifest.precision,
            "target": manifest.target,
            "visual_tokens": manifest.config.visual_tokens,
            "context": manifest.config.text.max_positions,
            "loaded": own.engine is not None,
        },
    }


def _page(service: Service) -> str:
    script = (PAGE_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    options = service.options
    facts = {
        "models": [_model(own)["visistage"] | {"id": n} for n, own in service.pool.served.items()],
        "most_images": options.max_images,
        "most_tokens": options.max_tokens,
    }
    return render_page(PAGE_FOLDER, {**facts, "script": script, "script_hash": f"sha256-{digest}"})
