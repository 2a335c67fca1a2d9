"""Placement of a bundle's weights: in the checkpoint's own files, or converted once beside them.

A weight whose type is already the graph's is left in its safetensors file, which the bundle clones,
copies or hard links (``WAYS``): ONNX Runtime refuses links that leave the folder, and the onnx
package any file with two names. Only what must change type, and what quantising makes, goes to
``weights.bin``, one tensor in memory at a time.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...graphs.bundle import TensorRef
from ...graphs.dtypes import BY_SAFETENSORS, DTYPES
from ...graphs.errors import TargetError
from ...graphs.files import replacing
from ...graphs.precision import HALF_MAX
from ...graphs.progress import Advance, no_advance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.names import EMBEDDING
from ..disk import free_bytes, known_hash, remember_hash, require_disk_space
from ..quantize.quantize import QuantisedTensors
from .export import WeightSpan

CONVERTED = "weights.bin"
WEIGHT_ALIGNMENT = 4096
"""Converted weights start on a page, so that they can be mapped."""


@dataclass(frozen=True)
class Placement:
    """Checkpoint files to link, tensors to convert, and the place of each of them."""

    linked: tuple[Path, ...]
    converted: tuple[str, ...]
    spans: dict[str, WeightSpan]
    embedding: TensorRef
    nbytes: int  # of the weights that the graphs read

    @property
    def new_bytes(self) -> int:
        """Bytes that ``weights.bin`` will take."""
        ends = [s.offset + s.nbytes for s in self.spans.values() if s.file == CONVERTED]
        return max(ends, default=0)


def place(
    checkpoint: Checkpoint,
    names: Iterable[str],
    dtype: str,
    quantised_tensors: QuantisedTensors | None = None,
) -> Placement:
    """Decide, without reading a weight, where the graphs' ``names`` will be in type ``dtype``.

    Tensors that ``quantised_tensors`` changes are always written anew.
    """
    itemsize = getattr(torch, dtype).itemsize
    spans: dict[str, WeightSpan] = {}
    linked: dict[Path, None] = {}
    converted: list[str] = []
    end = 0

    def reserve(nbytes: int) -> int:
        nonlocal end
        start = -(-end // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
        end = start + nbytes
        return start

    for name in sorted(set(names)):
        if quantised_tensors is not None and quantised_tensors.changes(name):
            nbytes = quantised_tensors.nbytes(name, itemsize)
        else:
            info = checkpoint.tensors[name]
            if info.dtype == DTYPES[dtype].safetensors:
                linked[info.file] = None
                spans[name] = WeightSpan(info.file.name, info.offset, info.nbytes)
                continue
            nbytes = math.prod(info.shape) * itemsize
        spans[name] = WeightSpan(CONVERTED, reserve(nbytes), nbytes)
        converted.append(name)
    nbytes = sum(span.nbytes for span in spans.values())

    # The embedding is looked up by the runtime itself, in whatever type it is stored.
    info = checkpoint.tensors[EMBEDDING]
    if EMBEDDING in converted:  # a graph reads it, too
        ref = TensorRef(CONVERTED, spans[EMBEDDING].offset, dtype, tuple(info.shape))
        return Placement(tuple(linked), tuple(converted), spans, ref, nbytes)
    file, start = info.file.name, info.offset
    if info.file not in linked:
        file, start = CONVERTED, reserve(info.nbytes)
        spans[EMBEDDING] = WeightSpan(CONVERTED, start, info.nbytes)
    embedding = TensorRef(file, start, BY_SAFETENSORS[info.dtype].name, tuple(info.shape))
    return Placement(tuple(linked), tuple(converted), spans, embedding, nbytes)


def clone(source: Path, destination: Path) -> bool:
    """Have the file system share the bytes of ``source`` until one of both is written.

    Takes no time and no room. False: it cannot, and ``destination`` holds nothing of use. What was
    there goes first, here and below: it may be a hard link, whose other name would change.
    """
    destination.unlink(missing_ok=True)
    try:
        import fcntl

        with source.open("rb") as stored, destination.open("wb") as copy:
            fcntl.ioctl(copy.fileno(), getattr(fcntl, "FICLONE", 0x40049409), stored.fileno())
    except (ImportError, OSError):  # not Linux; across disks, or not offered
        return False
    if (known := known_hash(source)) is not None:
        remember_hash(destination, known)
    return True


def hard_link(source: Path, destination: Path) -> bool:
    """Give ``source`` a second name; False where that cannot be."""
    destination.unlink(missing_ok=True)
    try:
        os.link(source, destination)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        return False
    return True


def copy(source: Path, destination: Path) -> bool:
    """Copy the bytes."""
    destination.unlink(missing_ok=True)
    shutil.copyfile(source, destination)
    return True


Bring = Callable[[Path, Path], bool]
WAYS: dict[str, tuple[Bring, ...]] = {"copy": (clone, copy), "link": (hard_link, copy)}
"""Ways of files into a bundle, the first that can; ``auto`` is decided by ``choose_ways``."""

DONE = {clone: "cloned", copy: "copied", hard_link: "hard links"}
LINKED = "onnx and polygraphy refuse hard links, they take --weights copy"


def choose_ways(placement: Placement, folder: Path, weights: str = "auto") -> tuple[Bring, ...]:
    """Return the ways to bring files into ``folder``, having checked that there is room.

    Args:
        placement: which files.
        folder: exists.
        weights: ``copy`` or ``link`` (of ``WAYS``); ``auto`` clones, else copies while that leaves
            half of the free disk, else links.

    Raises:
        CapacityError: the weights do not fit, before tens of gigabytes are written.
    """
    free, size = free_bytes(folder), sum(file.stat().st_size for file in placement.linked)
    there = folder / CONVERTED
    converted = placement.new_bytes - (there.stat().st_size if there.is_file() else 0)
    roomy = 2 * (size + converted) <= free
    ways = WAYS.get(weights, (clone, copy) if roomy else (clone, hard_link, copy))
    for file in placement.linked:
        trial = folder / f"{file.name}.trial"
        try:
            brought = (folder / file.name).exists()  # by a run that was interrupted
            if not brought and not any(way(file.resolve(), trial) for way in ways[:-1]):
                converted += file.stat().st_size
        finally:
            trial.unlink(missing_ok=True)
    require_disk_space(folder, converted, "the bundle", "choose another disk: --out DIR")
    return ways


def bring_files(placement: Placement, folder: Path, ways: tuple[Bring, ...]) -> str:
    """Bring the checkpoint's files into ``folder``; return what was done, in words."""
    done = set()
    for file in placement.linked:
        # A hub cache keeps links; a hard link must name the file itself.
        source, destination = file.resolve(), folder / file.name
        done.add(next(way for way in ways if way(source, destination)))
    said = ", ".join(words for way, words in DONE.items() if way in done)
    return f"{said}: {LINKED}" if hard_link in done and WAYS["link"] != ways else said


def own_files(folder: Path, names: Iterable[str]) -> None:
    """Replace those of ``names`` that share their bytes with another name by copies."""
    for file in (folder / name for name in names):
        if file.stat().st_nlink > 1:
            size = file.stat().st_size
            require_disk_space(folder, size, f"a copy of {file.name}", "leave out --weights copy")
            with replacing(file) as partial:
                if not clone(file, partial):
                    copy(file, partial)


def convert(
    checkpoint: Checkpoint,
    placement: Placement,
    dtype: str,
    folder: Path,
    progress: Advance = no_advance,
    quantised_tensors: QuantisedTensors | None = None,
) -> list[str]:
    """Write ``weights.bin``; return its name, or nothing where no tensor changes.

    Raises:
        TargetError: a value does not fit FP16; the message names the tensor.
    """
    if not placement.new_bytes:
        return []
    with (folder / CONVERTED).open("wb") as stream:
        for name, span in sorted(placement.spans.items(), key=lambda item: item[1].offset):
            if span.file != CONVERTED:
                continue
            if quantised_tensors is not None and quantised_tensors.changes(name):
                tensor = quantised_tensors.tensor(name)
            else:
                tensor = checkpoint.load(name)
            if name in placement.converted and tensor.is_floating_point():
                tensor = _to(tensor, getattr(torch, dtype), name)
            stream.seek(span.offset)
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            checkpoint.release()
            progress(span.nbytes)
    return [CONVERTED]


def _to(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if dtype == torch.float16:
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not largest <= HALF_MAX:
            raise TargetError(
                f"weight {name} holds {largest:g}, FP16 ends at {HALF_MAX:g}. "
                "Build with --precision fp32 on a target that offers it (--target cpu)"
            )
    return tensor.to(dtype)
