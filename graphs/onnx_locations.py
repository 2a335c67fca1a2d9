"""Names of the files that an ONNX graph reads its weights from; standard library only.

A graph whose own bytes are known may still name any file as external data. This walks its protocol
buffers just far enough to see every tensor: field numbers are those of ``onnx.proto``.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from .errors import BundleError

_CHILDREN = {  # message: {field: message}
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {1: "key", 2: "value"},
}
_DEEPEST = 100
"""Levels of messages, as protocol buffers themselves allow."""


def external_files(file: Path, remedy: str) -> set[str]:
    """Return the names of all files that the graph in ``file`` reads beside itself.

    Raises:
        BundleError: it is no ONNX graph.
    """
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return set(_locations(data, 0, len(data), "model", 0))
    except (ValueError, IndexError, OSError):  # an empty file cannot be mapped
        raise BundleError(f"{file} is no ONNX graph. {remedy}") from None


def _locations(data: mmap.mmap, at: int, end: int, message: str, depth: int) -> Iterator[str]:
    """Yield the locations in the message at ``data[at:end]``."""
    if depth > _DEEPEST:
        raise ValueError("too deep")
    children, texts = _CHILDREN[message], {"key": b"", "value": b""}
    while at < end:
        tag, at = _varint(data, at)
        field, wire = (tag & 0xFFFFFFFF) >> 3, tag & 7  # readers drop what exceeds 32 bits
        start = at
        if wire == 0:
            _, at = _varint(data, at)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        elif wire == 2:
            length, start = _varint(data, at)
            at = start + length
        else:  # groups: no message of ONNX has any
            raise ValueError("unknown wire type")
        if at > end:
            raise ValueError("too long")
        child = children.get(field) if wire == 2 else None
        if child in texts:
            texts[child] = data[start:at]
        elif child is not None:
            yield from _locations(data, start, at, child, depth + 1)
    if texts["key"] == b"location":
        yield texts["value"].decode("utf-8")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return the number that begins at ``at``, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
