"""Conversations as callers give them, turned into plain, checked data.

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]

Nothing else gets through to a chat template. This module knows no templates or tokens.
"""

from collections.abc import Mapping
from typing import Any

from ...graphs.errors import PromptError

ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``; content is text or a list of text and image blocks."""


def checked_messages(messages: Any) -> list[Message]:
    """Return the same messages as plain data, image blocks reduced to their type.

    Raises:
        PromptError: not a list, or empty; a key, role or kind of block that is not known.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise PromptError(
            f"the prompt is {type(messages).__name__} {str(messages)[:40]!r}; expected text, or a "
            "list of {'role': ..., 'content': ...} that is not empty."
        )
    return [_message(message, f"message {at}") for at, message in enumerate(messages, 1)]


def blocks_of(message: Message) -> list[dict[str, str]]:
    """Return the content as a list of blocks."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def is_image(block: Mapping[str, str]) -> bool:
    """Return whether a block stands for an image."""
    return block["type"] == "image"


def texts_of(message: Message) -> list[str]:
    """Return the texts of a message's text blocks."""
    return [block["text"] for block in blocks_of(message) if not is_image(block)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        found = sorted(map(str, message)) if isinstance(message, Mapping) else type(message)
        raise PromptError(f"{where} has {found}; expected exactly the keys 'role' and 'content'.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise PromptError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}.")
    if isinstance(content, str):
        return {"role": role, "content": str(content)}
    if not isinstance(content, (list, tuple)):
        raise PromptError(
            f"the content of {where} is {type(content).__name__}; expected text or a list."
        )
    plain = []
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind in ("image", "image_url"):
            plain.append({"type": "image"})
        elif kind == "text" and isinstance(block.get("text"), str):
            plain.append({"type": "text", "text": str(block["text"])})
        elif kind in ("video", "video_url"):
            raise PromptError(
                f"{where} has a video, which no model reads here. Give some of its frames as images"
            )
        else:
            raise PromptError(
                f"{where} has a block {str(block)[:60]}; expected {{'type': 'text', 'text': ...}} "
                "or {'type': 'image'}."
            )
    return {"role": role, "content": plain}
