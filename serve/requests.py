"""The body of a chat completion: JSON from anybody -> what is asked, checked field by field.

What would change an answer and is not done here is refused by name, what changes none is ignored.
A field that is null counts as left out, as OpenAI's clients mean it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ..graphs.errors import nearest
from ..graphs.fields import show
from ..runtime.settings import DEFAULT_MAX_TOKENS
from .errors import RequestError

MOST_PARTS = 500_000
"""Commas and brackets of a body. Twenty megabytes of ``[]`` would take a gigabyte once read."""

SETTINGS = {  # a field of a request -> that of ``AnswerSettings``
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "stop": "stop",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
    "logit_bias": "logit_bias",
}
ONLY: dict[str, tuple[Any, ...]] = {  # fields that may say what is done anyway, and nothing else
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "store": (False,),
}
IGNORED = (
    *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("parallel_tool_calls", "reasoning_effort", "verbosity"),
)
OWN = (
    *("model", "messages", "stream", "stream_options", "logprobs", "top_logprobs"),
    *("response_format", "visistage"),
)
KNOWN = (*OWN, *SETTINGS, *ONLY, *IGNORED)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ImageAddress:
    """An image of a request: a data URI, or the address of one; ``param``: where it stood."""

    url: str
    param: str


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion that is asked for.

    Attributes:
        model: its name; None where the request has none.
        messages: as ``PromptEncoder.encode`` takes them.
        images: in their order.
        settings: fields of ``AnswerSettings``.
        stream: whether pieces are sent as they come.
        usage: whether the last event of a stream counts tokens.
        facts: whether the answer tells kept tokens and times.
    """

    model: str | None
    messages: list[dict[str, Any]]
    images: tuple[ImageAddress, ...]
    settings: dict[str, Any]
    stream: bool
    usage: bool
    facts: bool

    @property
    def places(self) -> list[str]:
        """Return where its images stood."""
        return [image.param for image in self.images]

    def without_urls(self) -> ChatRequest:
        """Return the same without its images' addresses, which may be megabytes of data."""
        images = tuple(replace(image, url="") for image in self.images)
        return replace(self, images=images)


def read_chat(body: bytes, max_images: int, max_tokens: int) -> ChatRequest:
    """Read a request.

    Raises:
        RequestError: naming the field, what was found and what was expected.
    """
    fields = _given(_parse(body))
    for name in fields:
        if name not in KNOWN:
            text = f"{show(name)} is no field of a chat completion.{nearest(name[:40], KNOWN)}"
            raise RequestError(text, 422, "unknown_parameter", name[:80])
    for name, allowed in ONLY.items():
        if name in fields and not any(_same(fields[name], value) for value in allowed):
            _refuse(name, fields[name], " or ".join(map(json.dumps, allowed)) or "nothing here")
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        _refuse("model", model, "the name of a model, see /v1/models")
    stream, usage = _flag(fields, "stream"), False
    if "stream_options" in fields:
        given = fields["stream_options"]
        options = _given(given) if isinstance(given, dict) and stream else None
        if options is None or set(options) - {"include_usage", "include_obfuscation"}:
            _refuse("stream_options", given, '{"include_usage": true}, with "stream": true')
        usage = _flag(options, "include_usage", "stream_options.include_usage")
    messages, images = _messages(fields.get("messages"))
    if len(images) > max_images:
        text = f"{len(images)} images were sent; this server takes {max_images} (--max-images)"
        raise RequestError(text, 413, "too_many_images", "messages")
    return ChatRequest(
        model,
        messages,
        tuple(images),
        _settings(fields, max_tokens),
        stream,
        usage,
        _flag(fields, "visistage"),
    )


def _parse(body: bytes) -> dict[str, Any]:
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_PARTS:
        text = f"the body has more than {MOST_PARTS} commas and brackets. Send less"
        raise RequestError(text, 413, "body_too_large")
    try:
        data = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, too deep, a number too long
        raise RequestError("the body is not JSON that can be read", 400, "invalid_json") from None
    if not isinstance(data, dict):
        text = f"the body is {show(data)}; expected an object with 'model' and 'messages'"
        raise RequestError(text, 400, "invalid_json")
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _same(value: Any, other: Any) -> bool:
    """Return whether two values are equal, and true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _flag(fields: Mapping[str, Any], name: str, param: str | None = None) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        _refuse(param or name, value, "true or false")
    return value


def _settings(fields: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, field in SETTINGS.items():
        if name in fields:
            if settings.get(field, fields[name]) != fields[name]:
                _refuse(name, fields[name], "the same as max_tokens, of which it is another name")
            settings[field] = fields[name]
    tokens = settings.get("max_tokens")
    if isinstance(tokens, int) and tokens > max_tokens:
        _refuse("max_tokens", tokens, f"at most {max_tokens}, the limit here (--max-tokens)")
    if tokens is None:
        settings["max_tokens"] = min(DEFAULT_MAX_TOKENS, max_tokens)
    if "logit_bias" in fields and not _is_bias(fields["logit_bias"]):
        _refuse("logit_bias", fields["logit_bias"], "numbers from -100 to 100 by token id")
    if _flag(fields, "logprobs"):
        settings["logprobs"] = fields.get("top_logprobs", 0)
    elif "top_logprobs" in fields:
        _refuse("top_logprobs", fields["top_logprobs"], 'it beside "logprobs": true only')
    if "response_format" in fields:
        settings |= _form(fields["response_format"])
    return settings


def _is_bias(bias: Any) -> bool:
    return isinstance(bias, dict) and all(
        token.isdecimal() and len(token) < 10 and isinstance(value, (int, float))
        and not isinstance(value, bool) and -100 <= value <= 100
        for token, value in bias.items()
    )  # fmt: skip


def _form(given: Any) -> dict[str, Any]:
    """Return the setting that makes an answer take the form that was asked for."""
    form = _given(given) if isinstance(given, dict) else {}
    inner = form.get("json_schema")
    if form == {"type": "text"}:
        return {}
    if form == {"type": "json_object"}:
        return {"schema": {"type": "object"}}
    if form.get("type") == "json_schema" and isinstance(inner, dict):
        schema = inner.get("schema")
        if isinstance(schema, dict):
            return {"schema": schema}
    _refuse(
        "response_format",
        given,
        "{'type': 'text'}, {'type': 'json_object'}, or {'type': 'json_schema', 'json_schema': "
        "{'name': ..., 'schema': {...}}}",
    )


def _messages(messages: Any) -> tuple[list[dict[str, Any]], list[ImageAddress]]:
    if not isinstance(messages, list) or not messages:
        _refuse("messages", messages, "a list of {'role': ..., 'content': ...}")
    images: list[ImageAddress] = []
    return [_message(item, f"messages.{at}", images) for at, item in enumerate(messages)], images


def _message(item: Any, at: str, images: list[ImageAddress]) -> dict[str, Any]:
    """Return a message as the runtime takes it; its images go into ``images``."""
    message = _given(item) if isinstance(item, dict) else {}
    # What a client read is sent back whole: {"annotations": [], "tool_calls": null, ...}.
    message = {k: v for k, v in message.items() if k in ("role", "content") or v not in ([], "")}
    if set(message) != {"role", "content"}:
        _refuse(at, item, "exactly the keys 'role' and 'content'; names and tools are not read")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ROLES:
        _refuse(f"{at}.role", role, f"one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = [
            _block(block, f"{at}.content.{number}", images) for number, block in enumerate(content)
        ]
    elif not isinstance(content, str):
        _refuse(f"{at}.content", content, "text, or a list of parts")
    return {"role": ROLES[role], "content": content}


def _block(block: Any, at: str, images: list[ImageAddress]) -> dict[str, str]:
    part = _given(block) if isinstance(block, dict) else {}
    kind = part.get("type")
    if kind == "text" and set(part) == {"type", "text"} and isinstance(part["text"], str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url" and set(part) == {"type", "image_url"}:
        image = part["image_url"]
        url = image.get("url") if isinstance(image, dict) else image
        if isinstance(url, str):  # of "detail" there is one kind
            images.append(ImageAddress(url, f"{at}.image_url"))
            return {"type": "image"}
    _refuse(
        at,
        block,
        "{'type': 'text', 'text': ...} or {'type': 'image_url', 'image_url': {'url': ...}}",
    )


def _refuse(param: str, found: Any, expected: str) -> NoReturn:
    shown = "missing" if found is None else show(found)
    code = "unsupported_value" if param in ONLY else "invalid_value"
    raise RequestError(f"{param} is {shown}; expected {expected}", 422, code, param)
