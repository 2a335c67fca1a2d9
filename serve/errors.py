"""Refusals as HTTP: a status, and the error object that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from ..graphs.errors import (
    BusyError,
    CapacityError,
    ImageError,
    ImageFormatError,
    ImageSizeError,
    MissingDependencyError,
    PromptError,
    VisistageError,
)
from ..runtime.ticket import Cancelled

RETRY_SECONDS = 1
"""When to ask again, as a full queue says: an answer takes about as long."""

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

STATUSES: tuple[tuple[type[VisistageError], int, str], ...] = (  # the first that fits counts
    (ImageSizeError, 413, "image_too_large"),
    (ImageFormatError, 415, "unsupported_image"),
    (ImageError, 422, "invalid_image"),
    (CapacityError, 422, "context_length_exceeded"),
    (PromptError, 422, "invalid_value"),
    (MissingDependencyError, 422, "not_installed"),
    (BusyError, 429, "queue_full"),
    (Cancelled, 503, "shutting_down"),
)


class RequestError(VisistageError):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        code: a word for programs.
        param: the field that it is about, such as ``messages.0.content``.
    """

    def __init__(self, message: str, status: int, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def as_refusal(error: VisistageError, param: str | None = None) -> RequestError:
    """Return an error of the runtime as the refusal that a caller gets."""
    if isinstance(error, RequestError):
        return error
    for kind, status, code in STATUSES:
        if isinstance(error, kind):
            return RequestError(str(error), status, code, param)
    return RequestError(str(error), 500, "model_failed", param)


BUG = RequestError("the server failed; its log says how", 500, "internal_error")
"""All that a caller learns of an error that is a bug."""


def error_object(refusal: RequestError) -> dict[str, Any]:
    """Return OpenAI's error object."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    facts = {"message": str(refusal), "type": KINDS.get(refusal.status, kind)}
    return {"error": {**facts, "param": refusal.param, "code": refusal.code}}


def json_response(
    data: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a response in JSON; in ASCII, as callers may send text that is no Unicode."""
    return Response(json.dumps(data), status, headers, "application/json")


def error_response(refusal: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response of a refusal."""
    headers = dict(headers or {})
    if refusal.status in (429, 503):
        headers["retry-after"] = str(RETRY_SECONDS)
    return json_response(error_object(refusal), refusal.status, headers)
