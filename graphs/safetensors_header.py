"""Headers of safetensors files, read strictly and written.

    8 bytes            n, little endian
    n bytes            JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...,
                       "__metadata__": {"key": "text", ...}}
    the rest           the tensors' bytes, without gaps

Files come from strangers and downloads break off, so everything a header claims is checked against
the file: a ``TensorInfo`` never points outside it. Format: the README of safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import VisistageError
from .fields import is_int, parse_json, show

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

METADATA = "__metadata__"

ITEM_BITS = {
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F64": 64,
    "C64": 64,
    "BOOL": 8,
    **{f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)},
    **{f"F8_{kind}": 8 for kind in ("E4M3", "E5M2", "E8M0", "E4M3FNUZ", "E5M2FNUZ")},
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}

Broken = Callable[[str], NoReturn]
"""Raises the error about a finding."""


@dataclass(frozen=True)
class TensorInfo:
    """Place of the bytes of one tensor."""

    file: Path
    offset: int  # bytes from the start of the file
    nbytes: int
    dtype: str  # as safetensors spells it: "F32", "F16", "BF16", ...
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """Tensors by their name in the file, in the order of their bytes, and what else it says."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_safetensors(
    file: Path, error: type[VisistageError], remedy: str, most_bytes: int = MAX_HEADER_BYTES
) -> Header:
    """Return what the header of ``file`` says.

    Args:
        file: the file.
        error: class of the errors, which name the file.
        remedy: last sentence of their messages.
        most_bytes: of the header.

    Raises:
        error: the file cannot be read, is cut short, or its header contradicts itself.
    """

    def broken(finding: str) -> NoReturn:
        raise error(f"{file} {finding}: the file is corrupt or incomplete. {remedy}")

    try:
        size = os.path.getsize(file)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(most_bytes, size - 8):
                claim = f"a header of {length} bytes" if size >= 8 else "8 bytes for its length"
                broken(f"has {size} bytes, but should hold {claim} (at most {most_bytes})")
            text = stream.read(length)
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the name
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"cannot read {file}: {reason}. {remedy}") from None
    if not text.startswith(b"{"):
        broken("has a header that is no JSON object")
    entries = parse_json(text, error, remedy, f"the header of {file}")
    metadata = entries.pop(METADATA, None) or {}
    if not isinstance(metadata, Mapping) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        broken(f"has a {METADATA} that holds more than texts")
    start = 8 + length
    found = {name: _tensor(file, start, name, entry, broken) for name, entry in entries.items()}
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = start
    for name, info in ordered.items():
        if info.offset != end:
            broken(f"has overlapping tensors or a gap before {show(name)}")
        end += info.nbytes
    if end != size:
        broken(f"has {size} bytes, but its header speaks of {end}")
    return Header(ordered, dict(metadata))


def write_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Return the bytes before those of ``tensors``: type as safetensors spells it, and shape."""
    entries: dict[str, Any] = {METADATA: dict(metadata)}
    at = 0
    for name, (dtype, shape) in tensors.items():
        stop = at + math.prod(shape) * ITEM_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the library has it
    return len(text).to_bytes(8, "little") + text


def _tensor(file: Path, start: int, name: str, entry: Any, broken: Broken) -> TensorInfo:
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        broken(f"describes {show(name)} without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        broken(f"gives {show(name)} the unknown type {show(dtype)}")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or len(numbers) > 8 or not all(map(_is_size, numbers)):
            broken(f"gives {show(name)} the {field} {show(numbers)}")
    if len(offsets) != 2 or math.prod(shape) * ITEM_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        broken(f"gives {show(name)} the bytes {show(offsets)} for {dtype} {show(shape)}")
    return TensorInfo(file, start + offsets[0], offsets[1] - offsets[0], dtype, tuple(shape))


def _is_size(value: Any) -> bool:
    return is_int(value) and value >= 0
