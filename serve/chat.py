"""``/v1/chat/completions``: OpenAI's protocol around a question, whole or as server-sent events.

A caller who goes away is noticed at once, whatever is being done for him, and his question is
given up: its lane is free within one call of a stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ..graphs.errors import VisistageError
from ..runtime.answer import Answer, TokenLogprob
from ..runtime.ticket import Ticket
from .errors import BUG, RequestError, as_refusal, error_object, json_response
from .guard import Record
from .service import Asked, Service

BODY_SECONDS = 30
"""In which the body of a request has to be here."""

IMPOSSIBLE = -9999.0

FINISHES = {"eos": "stop", "stop": "stop", "length": "length"}

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


class ChatCompletions:
    """See the module; an ASGI application."""

    def __init__(self, service: Service):
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = await read_body(Request(scope, receive), self.service.options.max_body)
        answering = asyncio.ensure_future(self._answer(body, scope, receive, send))
        del body
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            gone = not answering.done()
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering
            if gone:
                Record.of(scope).status = 499

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        request, files = await self.service.read(body)
        del body
        reply = Reply(self.service, Record.of(scope), started)
        async with self.service.ask(request, files, reply.notify) as asked:
            try:
                if request.stream:
                    await self._stream(asked, reply, send)
                else:
                    async for _ in reply.pieces(asked):
                        pass
                    answer = reply.answer(asked)
                    await json_response(reply.whole(asked, answer))(scope, receive, send)
            except asyncio.CancelledError:
                self.service.metrics.cancelled.labels(asked.model).inc()
                raise

    async def _stream(self, asked: Asked, reply: Reply, send: Send) -> None:
        """Send pieces as they come; of an error only the stream itself can tell by then."""

        async def event(data: Any, more: bool = True) -> None:
            text = data if isinstance(data, str) else json.dumps(data)
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await event(reply.chunk(asked, {"role": "assistant", "content": ""}))
        try:
            begun = False
            async for piece in reply.pieces(asked):
                piece = piece if begun else piece.lstrip()
                begun = begun or bool(piece)
                if piece:
                    await event(reply.chunk(asked, {"content": piece}))
            answer = reply.answer(asked)
        except VisistageError as error:
            await event(error_object(as_refusal(error)), more=False)
            return
        except Exception:
            await event(error_object(BUG), more=False)
            raise
        last = reply.chunk(asked, {}, FINISHES[answer.finish])
        last["choices"][0]["logprobs"] = logprobs_of(answer)
        if asked.request.facts:
            last["visistage"] = facts_of(asked, answer)
        await event(last)
        if asked.request.usage:
            await event({**reply.chunk(asked, {}), "choices": [], "usage": usage_of(answer)})
        await event("[DONE]", more=False)


class Reply:
    """An answer on its way to a caller, told in OpenAI's words."""

    def __init__(self, service: Service, record: Record, started: float):
        self.service, self.record, self._last = service, record, started
        self._created = int(time.time())
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()

    def notify(self, _: Ticket) -> None:
        """Wake ``pieces``; called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the caller with it
            self._loop.call_soon_threadsafe(self._news.set)

    async def pieces(self, asked: Asked) -> AsyncIterator[str]:
        """Yield the pieces of an answer until it ends."""
        metrics, first = self.service.metrics, True
        while True:
            await self._news.wait()
            self._news.clear()
            over = asked.ticket.over.is_set()
            for piece in asked.ticket.pieces():
                now = time.monotonic()
                (metrics.first if first else metrics.gap).labels(asked.model).observe(
                    now - self._last
                )
                self._last, first = now, False
                yield piece
            if over:
                return

    def answer(self, asked: Asked) -> Answer:
        """Return the whole answer, counted.

        Raises:
            VisistageError: it failed.
        """
        if isinstance(asked.ticket.error, Exception):
            raise asked.ticket.error
        answer = asked.ticket.wait(0)
        self.record.tokens = len(answer.tokens)
        for kind, count in (("prompt", answer.plan.prompt_rows), ("answer", len(answer.tokens))):
            self.service.metrics.tokens.labels(asked.model, kind).inc(count)
        return answer

    def whole(self, asked: Asked, answer: Answer) -> dict[str, Any]:
        """Return a ``chat.completion``."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": logprobs_of(answer)}
        found = self._object(asked, "chat.completion")
        found["choices"] = [{**choice, "finish_reason": FINISHES[answer.finish]}]
        found["usage"] = usage_of(answer)
        if asked.request.facts:
            found["visistage"] = facts_of(asked, answer)
        return found

    def chunk(
        self, asked: Asked, delta: dict[str, str], finish: str | None = None
    ) -> dict[str, Any]:
        """Return a ``chat.completion.chunk``."""
        found = self._object(asked, "chat.completion.chunk")
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        found["choices"] = [choice]
        if asked.request.usage:
            found["usage"] = None
        return found

    def _object(self, asked: Asked, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.record.id}",
            "object": kind,
            "created": self._created,
            "model": asked.model,
            "system_fingerprint": asked.engine.bundle.manifest.source[:12],
        }


async def read_body(request: Request, most: int) -> bytes:
    """Return the body of a request.

    Raises:
        RequestError: no JSON by its type, too long, or too slow.
        ClientDisconnect: the caller has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        text = "the body has to be JSON; send it with content-type: application/json"
        raise RequestError(text, 415, "unsupported_media_type")
    too_long = RequestError(f"the body has more than {most} bytes", 413, "body_too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:18]) > most:
        raise too_long

    async def collect() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_long
        return bytes(body)

    try:
        return await asyncio.wait_for(collect(), BODY_SECONDS)
    except asyncio.TimeoutError:
        text = f"the body was not here within {BODY_SECONDS} s"
        raise RequestError(text, 408, "body_too_slow") from None


def logprobs_of(answer: Answer) -> dict[str, Any] | None:
    """Return OpenAI's log-probabilities of an answer's tokens; in a stream they come at its end."""

    def told(token: TokenLogprob) -> dict[str, Any]:
        # JSON has no infinity: what a schema rules out has OpenAI's number for it.
        logprob = max(token.logprob, IMPOSSIBLE)
        return {"token": token.text, "logprob": logprob, "bytes": list(token.text.encode())}

    if answer.logprobs is None:
        return None
    content = [
        {**told(token), "top_logprobs": [told(other) for other in token.likely]}
        for token in answer.logprobs
    ]
    return {"content": content, "refusal": None}


def usage_of(answer: Answer) -> dict[str, int]:
    """Return OpenAI's count of tokens; an image counts with all its visual tokens."""
    prompt, new = answer.plan.prompt_rows, len(answer.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def facts_of(asked: Asked, answer: Answer) -> dict[str, Any]:
    """Return what OpenAI's protocol has no words for: the tokens kept of each image, and times.

    Of an image: ``grid`` (rows, columns), ``kept`` [[row, column], ...], and ``box``, the part of
    the image sent that the grid covers: left, top, right, bottom in shares of its sides.
    """
    plan, times = answer.plan, answer.timings
    images = []
    for place, box in zip(answer.shown, asked.boxes, strict=True):
        cells = place.kept(plan.kept)
        kept = [[int(row), int(column)] for row, column in zip(*cells.nonzero(), strict=True)]
        images.append({"grid": list(cells.shape), "box": list(box), "kept": kept})
    return {
        "plan": plan.plan,
        "visual_tokens": plan.visual_tokens,
        "kept_tokens": plan.visual_tokens if plan.kept is None else len(plan.kept),
        "images": images,
        "timings": {
            "first_token_ms": times.first_token_ms,
            "per_token_ms": times.per_token_ms,
            "total_ms": times.total_ms,
        },
    }


async def _disconnected(receive: Receive) -> None:
    """Return once the caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
