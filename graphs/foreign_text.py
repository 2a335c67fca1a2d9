"""Text that others wrote, made fit to be shown: it neither steers a terminal nor fills it."""

from __future__ import annotations

import re

MOST_CHARACTERS = 1600
MOST_LINES = 20
"""Length of a message: what a terminal shows at once."""

_LINE_SEPARATORS = re.compile("[\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that turn the direction of writing."""


def printable(text: str) -> str:
    """Return ``text`` without what steers a terminal; line separators become spaces."""
    return _CONTROLS.sub("", _LINE_SEPARATORS.sub(" ", text))


def escape_json(text: str) -> str:
    """Return a JSON text whose strings hold none of it either, nor halves of characters."""
    pattern = "[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(pattern, lambda match: f"\\u{ord(match[0]):04x}", text)


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return a message of at most a screen: what is too much is left out of its middle."""
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        half = MOST_LINES // 2
        left_out = f"... {len(lines) - 2 * half} lines ..."
        text = "\n".join([*lines[:half], left_out, *lines[-half:]])
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]} ... {len(text) - 2 * half} characters ... {text[-half:]}"
    return text
