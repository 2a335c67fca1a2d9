"""Placement of a bundle's weights: in the checkpoint's own files, or converted once beside them.

A weight whose type is already the graph's is left in its safetensors file, which the bundle hard
links (or copies, across file systems): ONNX Runtime refuses links that leave the folder. Only what
must change type, and what quantising makes, goes to ``weights.bin``, one tensor in memory at a
time.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...graphs.bundle import TensorRef
from ...graphs.dtypes import BY_SAFETENSORS, DTYPES
from ...graphs.errors import TargetError
from ...graphs.precision import HALF_MAX
from ...graphs.progress import Advance, no_advance
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.names import EMBEDDING
from ..disk import require_disk_space
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
    file, start = info.file.name, info.offset
    if info.file not in linked:
        file, start = CONVERTED, reserve(info.nbytes)
        spans[EMBEDDING] = WeightSpan(CONVERTED, start, info.nbytes)
    embedding = TensorRef(file, start, BY_SAFETENSORS[info.dtype].name, tuple(info.shape))
    return Placement(tuple(linked), tuple(converted), spans, embedding, nbytes)


def check_disk(placement: Placement, folder: Path) -> None:
    """Check that the weights fit on the disk of ``folder``, before tens of gigabytes are written.

    Raises:
        CapacityError: they do not.
    """
    needed = placement.new_bytes
    if placement.linked and os.stat(placement.linked[0]).st_dev != os.stat(folder).st_dev:
        needed += sum(file.stat().st_size for file in placement.linked)
    require_disk_space(folder, needed, "the bundle", "choose another disk: --out DIR")


def link_files(placement: Placement, folder: Path) -> list[str]:
    """Bring the checkpoint's files into ``folder``; return their names."""
    for file in placement.linked:
        destination = folder / file.name
        destination.unlink(missing_ok=True)
        real = file.resolve()  # a hub cache keeps links; a hard link must name the file itself
        try:
            os.link(real, destination)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            shutil.copyfile(real, destination)
    return [file.name for file in placement.linked]


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
                "Build with PRECISION=fp32 on a target that offers it (TARGET=cpu)"
            )
    return tensor.to(dtype)
