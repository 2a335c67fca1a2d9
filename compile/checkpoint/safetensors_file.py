"""The header of one safetensors file: where each tensor lies. Nothing else is read.

    8 bytes            n, little endian
    n bytes            JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    the rest           the tensors' bytes, without gaps

Files come from strangers and downloads break off, so everything a header claims is checked
against the file: a ``TensorInfo`` never points outside it. Format: the README of safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ...graphs.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

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


@dataclass(frozen=True)
class TensorInfo:
    """Where the bytes of one tensor lie."""

    file: Path
    offset: int  # bytes from the start of the file
    nbytes: int
    dtype: str  # as safetensors spells it: "F32", "F16", "BF16", ...
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """All tensors of ``file``, by their name in the file, in the order of their bytes.

    Raises:
        ModelError: the file cannot be read, is cut short, or its header contradicts itself.
    """
    try:
        size = os.path.getsize(file)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                claim = f"a header of {length} bytes" if size >= 8 else "8 bytes for its length"
                _broken(file, f"has {size} bytes, but should hold {claim} (at most 100 MB)")
            text = stream.read(length)
    except OSError as error:
        raise ModelError(
            f"cannot read {file}: {error.strerror or error}. Check the file, or download the "
            "checkpoint again."
        ) from error
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        _broken(file, f"has a header that is no JSON ({str(error)[:100]})")
    if not isinstance(entries, dict):
        _broken(file, "has a header that is no JSON object")
    entries.pop("__metadata__", None)
    start = 8 + length
    found = {name: _tensor(file, start, name, entry) for name, entry in entries.items()}
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = start
    for name, info in ordered.items():
        if info.offset != end:
            _broken(file, f"has overlapping tensors or a gap before {_short(name)}")
        end += info.nbytes
    if end != size:
        _broken(file, f"has {size} bytes, but its header speaks of {end}")
    return ordered


def _tensor(file: Path, start: int, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _broken(file, f"describes {_short(name)} without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        _broken(file, f"gives {_short(name)} the unknown type {_short(dtype)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or len(numbers) > 8 or not all(map(_is_size, numbers)):
            _broken(file, f"gives {_short(name)} the {what} {_short(numbers)}")
    if len(offsets) != 2 or math.prod(shape) * ITEM_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        _broken(
            file, f"gives {_short(name)} the bytes {_short(offsets)} for {dtype} {_short(shape)}"
        )
    return TensorInfo(file, start + offsets[0], offsets[1] - offsets[0], dtype, tuple(shape))


def _broken(file: Path, what: str) -> NoReturn:
    raise ModelError(
        f"{file} {what}: the file is corrupt or incomplete. Download it again, or save the model "
        "again with save_pretrained."
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs twice")
    return entries
