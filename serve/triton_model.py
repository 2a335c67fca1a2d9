"""A bundle behind Triton's Python backend, which imports this in an exported repository.

A request has PROMPT, perhaps IMAGE (files, as bytes) and MAX_TOKENS; its answer comes in pieces, as
decoupled models send them. All requests share one engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ..graphs.bundle import Bundle
from ..graphs.errors import VisistageError
from ..runtime.engine import Engine
from ..runtime.settings import DEFAULT_MAX_TOKENS
from ..runtime.ticket import Ticket
from .triton import BUNDLE_FOLDER


class TritonPythonModel:
    """See the module; the name and the methods are Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle of this version."""
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE_FOLDER
        lanes = json.loads(args["model_config"])["parameters"]["lanes"]["string_value"]
        self.engine = Engine(Bundle.open(folder), lanes=int(lanes))

    def execute(self, requests: list[Any]) -> None:
        """Hand requests to the engine; their answers are sent as they come."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                prompt, images = _value(request, "PROMPT"), _values(request, "IMAGE")
                tokens = _value(request, "MAX_TOKENS")
                self.engine.submit(
                    images,
                    prompt.decode(errors="replace"),
                    max_tokens=DEFAULT_MAX_TOKENS if tokens is None else int(tokens),
                    notify=Replies(sender).send,
                )
            except VisistageError as error:
                _fail(sender, error)

    def finalize(self) -> None:
        """Let answers under way end, and free everything."""
        self.engine.close(drain=True)


class Replies:
    """The responses of one request; one that was cancelled is given up."""

    def __init__(self, sender: Any):
        self._sender, self._over = sender, False

    def send(self, ticket: Ticket) -> None:
        """Send what is new of an answer; called in the engine's thread."""
        if self._over:
            return
        if self._sender.is_cancelled():
            ticket.cancel()
        for piece in ticket.pieces():
            self._sender.send(pb_utils.InferenceResponse([_text(piece)]))
        if ticket.over.is_set():
            self._over = True
            if ticket.error is not None:
                _fail(self._sender, ticket.error)
            else:
                self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _values(request: Any, name: str) -> list[Any]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else list(tensor.as_numpy().reshape(-1))


def _value(request: Any, name: str) -> Any:
    return next(iter(_values(request, name)), None)


def _text(piece: str) -> Any:
    return pb_utils.Tensor("TEXT", np.array([piece.encode()], dtype=np.object_))


def _fail(sender: Any, error: BaseException) -> None:
    text = str(error) if isinstance(error, VisistageError) else "the model failed"
    response = pb_utils.InferenceResponse([], pb_utils.TritonError(text))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
