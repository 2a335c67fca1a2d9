"""A question on its way from a request's bytes to an engine's ticket, and what all requests share.

Everything that takes time runs in threads: decoding in as many as there are cores, so that no
crowd of requests decodes at once; loading one bundle at a time; fetching beside both.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ..graphs.errors import BusyError, ImageError, VisistageError
from ..runtime.engine import Engine
from ..runtime.hardware import cores
from ..runtime.image.overlay import Box, Grid, seen_box
from ..runtime.opened_image import OpenedImage
from ..runtime.ticket import Ticket
from .errors import RequestError, as_refusal
from .images import image_bytes
from .metrics import Metrics
from .options import ServeOptions
from .pool import EnginePool, Served
from .requests import SETTINGS, ChatRequest, read_chat

logger = logging.getLogger(__name__)

PARAMS = {name: name for name in SETTINGS}
PARAMS |= {"logprobs": "top_logprobs", "schema": "response_format", "schema=": "response_format"}
"""The field of a request by the word that an error about it begins with."""

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A question that an engine has taken; ``boxes``: what its images show of those sent."""

    request: ChatRequest
    model: str
    engine: Engine
    ticket: Ticket
    boxes: Sequence[Box]


class Service:
    """See the module.

    Attributes:
        active: requests under way that are not about health.
        draining: whether new ones are refused.
    """

    def __init__(self, pool: EnginePool, options: ServeOptions):
        self.pool, self.options, self.metrics = pool, options, Metrics(pool)
        self.active, self.draining = 0, False
        self._decoding = ThreadPoolExecutor(cores(), "visistage decoding")
        self._fetching = ThreadPoolExecutor(8, "visistage fetching")
        self._loading = ThreadPoolExecutor(1, "visistage loading")

    @property
    def most(self) -> int:
        """Requests that may be under way: those that lanes and queues have room for, and some."""
        return 8 + len(self.pool.served) * (self.options.queue + (self.options.lanes or 8))

    def load_first(self) -> None:
        """Load the first bundle, so that the first question need not wait for it."""
        with self.pool.borrow(next(iter(self.pool.served))) as own:
            self.pool.engine_of(own)

    def close(self) -> None:
        """Cancel what is under way, and free everything."""
        self.pool.close()
        for threads in (self._decoding, self._fetching, self._loading):
            threads.shutdown(wait=False, cancel_futures=True)

    async def read(self, body: bytes) -> tuple[ChatRequest, list[bytes]]:
        """Return what is asked, and the files of its images.

        Raises:
            RequestError: it cannot be used, or not now.
        """
        limits = self.options.max_images, self.options.max_tokens
        request = await _run(self._decoding, read_chat, body, *limits)
        self._check_queue(self.pool.name_of(request.model))
        allowed, most = self.options.allow_images_from, self.options.max_body
        files = [
            await _run(self._fetching, image_bytes, image, allowed, most)
            for image in request.images
        ]
        return request.without_urls(), files

    @asynccontextmanager
    async def ask(
        self, request: ChatRequest, files: list[bytes], notify: Callable[[Ticket], None]
    ) -> AsyncIterator[Asked]:
        """Hand a question to its engine; it is given up when the block ends.

        ``files`` is emptied: an answer takes longer than images need to be kept.

        Raises:
            RequestError: it cannot be used, or not now.
        """
        name = self.pool.name_of(request.model)
        with self.pool.borrow(name) as own:
            engine = own.engine
            if engine is None or engine.closed:
                engine = await _run(self._loading, self._load, own)
            images, files[:] = files[:], []
            coming = asyncio.get_running_loop().run_in_executor(
                self._decoding, _submit, engine, request, images, notify
            )
            del images
            try:
                ticket, boxes = await asyncio.shield(coming)
                yield Asked(request, name, engine, ticket, boxes)
            finally:
                coming.add_done_callback(_give_up)

    def _check_queue(self, name: str) -> None:
        """Refuse a question whose engine's queue is full, before its images are decoded."""
        engine = self.pool.loaded().get(name)
        if engine is not None and engine.load()["waiting"] >= engine.queue:
            text = f"{engine.queue} questions are waiting, as many as may. Ask again in a moment"
            raise as_refusal(BusyError(text))

    def _load(self, own: Served) -> Engine:
        try:
            return self.pool.engine_of(own)
        except RequestError:
            raise
        except VisistageError as error:  # a caller cannot help it, the log says why
            logger.error("%s cannot be loaded: %s", own.name, error)
            text = f"the model {own.name} cannot be loaded"
            raise RequestError(text, 503, "model_not_loaded", "model") from error


def _submit(
    engine: Engine, request: ChatRequest, files: list[bytes], notify: Callable[[Ticket], None]
) -> tuple[Ticket, list[Box]]:
    """Decode a question's images and hand it to the engine."""
    config = engine.bundle.manifest.config
    opened, boxes = [], []
    for param, file in zip(request.places, files, strict=True):
        try:
            image = engine.decode_image(file)
            assert isinstance(image, OpenedImage), "bytes are no file of a saved image"
            opened.append(image.without_picture())
        except ImageError as error:
            raise as_refusal(error, param) from error
        grid = Grid.of(config, image.layout)
        boxes.append(seen_box(image.image.size, engine.preprocessing, grid))
    try:
        ticket = engine.submit(opened, request.messages, notify=notify, **request.settings)
    except VisistageError as error:
        refusal = as_refusal(error)
        if refusal.status == 422:  # errors about a setting begin with its name
            text = str(error).removeprefix("the ")
            other = "stop" if "stop string" in text else "messages"
            refusal.param = PARAMS.get(text.split()[0], other)
        raise refusal from error
    return ticket, boxes


def _give_up(coming: asyncio.Future[tuple[Ticket, list[Box]]]) -> None:
    """Cancel a question that was handed over; one that is answered does not mind."""
    if not coming.cancelled() and coming.exception() is None:
        coming.result()[0].cancel()


async def _run(threads: ThreadPoolExecutor, work: Callable[..., T], *given: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work, *given)
