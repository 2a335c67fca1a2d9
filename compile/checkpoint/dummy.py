"""Checkpoints of published shapes with random weights, to build and time without a download.

Written as a stream: one block of random numbers is drawn from the seed, and each tensor is a
stretch of it that starts where the seed and the tensor's name say, wrapped around as often as
needed. So 14 GB cost no more than writing them, and memory holds the block in a few spreads. The
block's length is a prime: no two rows of a matrix are equal. The numbers mean nothing; their
spreads keep every layer's values finite in FP16 and greedy answers from repeating one token.

Equal arguments give equal bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ...graphs.config import ModelConfig
from ...graphs.dtypes import DTYPES
from ...graphs.errors import CapacityError, ModelError
from ...graphs.fields import read_json
from ...graphs.files import sync
from ...graphs.plan.routing import Routing
from ...graphs.progress import Advance, no_advance
from ..disk import locked, require_disk_space, writing
from .dummy_tokenizer import SYSTEM, write_text_files
from .known_models import KNOWN_MODELS, KnownModel
from .names import HEAD_WEIGHT, Shapes, published_name, router_shapes, tensor_shapes
from .safetensors_file import SHARD_INDEX, SINGLE

DUMMY_VERSION = 1
"""Raised when equal arguments give other bytes than before."""

DUMMY_NOTE = "dummy.json"
LOCK = ".lock"
DUMMY_DTYPES = ("float32", "float16", "bfloat16")
RANDOM_BLOCK = 16_777_213  # values; the largest prime below 2**24
SHARD_BYTES = 4_500_000_000
OTHER_BYTES = 4 << 20  # tokenizer and configs, generously


def make_dummy(
    geometry: str,
    path: Path,
    *,
    dtype: str = "float16",
    seed: int = 0,
    known_model: KnownModel | None = None,
    image_size: int | None = None,
    routing: Routing | None = None,
    progress: Advance = no_advance,
) -> Path:
    """Make the checkpoint folder ``path``, or find it complete.

    The folder appears under its name when it is whole; an interrupted run leaves nothing.

    Args:
        geometry: a key of ``KNOWN_MODELS``, or the name of ``known_model``.
        path: the folder to make.
        dtype: ``float16``, ``float32`` or ``bfloat16``.
        seed: of the random numbers.
        known_model: shapes that are not listed there.
        image_size: side of the images in pixels, and so the visual tokens; None: as published.
        routing: with routers of its kind; None: without any.
        progress: called with bytes as they are written.

    Raises:
        ModelError: an unknown geometry or type, or ``path`` holds something else.
        CapacityError: the disk has no space for it, or another run is making it.
    """
    if known_model is None and geometry not in KNOWN_MODELS:
        raise ModelError(
            f"there are no dummy weights of {geometry!r}, only of {', '.join(KNOWN_MODELS)}. "
            "Choose one of those: visistage build llava-45m --dummy-weights"
        )
    if dtype not in DUMMY_DTYPES:
        raise ModelError(
            f"dummy weights cannot be {dtype!r}, only {', '.join(DUMMY_DTYPES)}. Choose one."
        )
    path = Path(path)
    known_model = known_model or KNOWN_MODELS[geometry]
    if image_size is not None:
        known_model = _resized(known_model, image_size)
    config = ModelConfig.from_hf(known_model.config)
    shapes = tensor_shapes(config, whole_encoder=True)
    if config.text.tied:  # published files hold the embedding alone
        del shapes[HEAD_WEIGHT]
    facts: dict = {"geometry": geometry, "dtype": dtype, "seed": seed, "version": DUMMY_VERSION}
    if image_size is not None:
        facts["image_size"] = image_size
    if routing is not None:
        shapes |= router_shapes(config.text, routing)
        facts["routers"] = routing.kind
    if _complete(path, facts):
        return path
    if path.exists():
        raise ModelError(
            f"{path} is there, but is not the dummy checkpoint {geometry} ({dtype}, seed {seed}). "
            "Remove it, or choose another folder."
        )
    nbytes = _nbytes(shapes, dtype) + OTHER_BYTES
    require_disk_space(
        path.parent, nbytes, f"the dummy checkpoint {geometry}", "take a smaller one: llava-45m"
    )
    with _folder(path) as folder:
        blocks = _Blocks(dtype, seed, config.text.layers)
        _write_weights(folder, shapes, dtype, blocks, config.family, progress)
        _write_config(folder, known_model, dtype)
        write_text_files(folder, config, known_model.specials, system=SYSTEM)
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != LOCK}
        (folder / DUMMY_NOTE).write_text(json.dumps(facts | {"files": dict(sorted(sizes.items()))}))
    return path


def _resized(known_model: KnownModel, side: int) -> KnownModel:
    """Return ``known_model`` for images of another size."""
    vision = {**known_model.config["vision_config"], "image_size": side}
    tokens = (side // vision["patch_size"]) ** 2
    config = {**known_model.config, "vision_config": vision, "image_seq_length": tokens}
    return replace(known_model, config=config)


class _Blocks:
    """Block of random numbers in every spread that was asked for, as bytes."""

    def __init__(self, dtype: str, seed: int, depth: int):
        generator = np.random.Generator(np.random.PCG64(seed))
        self.values = torch.from_numpy(generator.standard_normal(RANDOM_BLOCK, dtype=np.float32))
        self.dtype, self.seed, self.depth = getattr(torch, dtype), seed, depth
        self.scaled: dict[float, memoryview] = {}

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
        """Yield the bytes of one tensor, in stretches of the block."""
        constant = _constant(name, shape)
        if constant is not None:
            yield _bytes(torch.full(shape, constant, dtype=self.dtype))
            return
        block = self._block(_spread(name, shape, self.depth))
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        start = int.from_bytes(digest[:8], "little") % RANDOM_BLOCK * self.dtype.itemsize
        left = math.prod(shape) * self.dtype.itemsize
        while left:
            piece = block[start : start + left]
            yield piece
            left -= len(piece)
            start = 0

    def _block(self, spread: float) -> memoryview:
        if spread not in self.scaled:
            self.scaled[spread] = _bytes((self.values * spread).to(self.dtype))
        return self.scaled[spread]


def _constant(name: str, shape: tuple[int, ...]) -> float | None:
    """Return what a tensor is full of: norms start as the identity, biases at zero."""
    if len(shape) > 1 or name.endswith("class_embedding"):
        return None
    return 1.0 if name.endswith(("weight", "lambda_1", "lambda_2")) else 0.0


_LEARNED = (
    "embed_tokens.weight",
    "position_embedding.weight",
    "class_embedding",
    "pos_embed.weight",
)
_UPDATES = (
    "o_proj.weight",
    "down_proj.weight",
    "out_proj.weight",
    "fc2.weight",
    "attn.proj.weight",
)


def _spread(name: str, shape: tuple[int, ...], depth: int) -> float:
    """Return the standard deviation by which unit-variance rows give about unit-variance rows.

    Updates shrink with the decoder's depth, so the residual stays far from FP16's end however deep
    it is. Queries and keys are larger, else attention would be flat, whatever the question.
    """
    fan_in = math.prod(shape[1:])
    if name.endswith(_LEARNED):
        return 0.5
    if name.endswith(_UPDATES):
        return (depth / 4) ** -0.5 * fan_in**-0.5
    attends = name.endswith(("q_proj.weight", "k_proj.weight")) or name == HEAD_WEIGHT
    return (2.0 if attends else 1.0) * fan_in**-0.5


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


# --- files ----------------------------------------------------------------------------------------


def _write_weights(
    folder: Path, shapes: Shapes, dtype: str, blocks: _Blocks, family: str, progress: Advance
) -> None:
    shards = split_shards(shapes, dtype)
    where = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        file = SINGLE if len(shards) == 1 else file
        with _full_disk_named(folder / file), (folder / file).open("wb") as stream:
            stream.write(shard_header({name: shapes[name] for name in names}, dtype, family))
            for name in names:
                for piece in blocks.pieces(name, shapes[name]):
                    stream.write(piece)
                    progress(len(piece))
                where[published_name(name, family)] = file
    if len(shards) > 1:
        index_data = {
            "metadata": {"total_size": _nbytes(shapes, dtype)},
            "weight_map": dict(sorted(where.items())),
        }
        (folder / SHARD_INDEX).write_text(json.dumps(index_data, indent=2) + "\n")


@contextmanager
def _full_disk_named(file: Path) -> Iterator[None]:
    """Raise CapacityError where the disk fills up while ``file`` is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CapacityError(
            f"the disk filled up while {file} was written. Free some, and start again."
        ) from error


def _nbytes(shapes: Shapes, dtype: str) -> int:
    return sum(map(math.prod, shapes.values())) * getattr(torch, dtype).itemsize


def split_shards(shapes: Shapes, dtype: str) -> list[list[str]]:
    """Return the names of every shard, as many as fit ``SHARD_BYTES``."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = _nbytes({name: shape}, dtype)
        if shards[-1] and filled + nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def shard_header(shapes: Shapes, dtype: str, family: str = "llava") -> bytes:
    """Return the first bytes of a safetensors file that holds tensors of ``shapes``."""
    entries: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _nbytes({name: shape}, dtype)
        entries[published_name(name, family)] = {
            "dtype": DTYPES[dtype].safetensors,
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return len(text).to_bytes(8, "little") + text


def _write_config(folder: Path, known_model: KnownModel, dtype: str) -> None:
    data = {**known_model.config, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n")


def _complete(path: Path, facts: dict) -> bool:
    try:
        noted = read_json(path / DUMMY_NOTE, ModelError, "")
        sizes = noted.pop("files")
        return noted == facts and all((path / k).stat().st_size == v for k, v in sizes.items())
    except (OSError, ModelError, ValueError, AttributeError, KeyError, TypeError):
        return False


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """Yield a locked ``.partial`` folder that becomes ``path`` at the end, or vanishes."""
    folder = path.with_name(path.name + ".partial")
    busy = f"another run is making {path}. Wait for it, or stop it."
    elsewhere = "Such checkpoints are made in ./.cache: start in another folder."
    with writing(folder, elsewhere):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(folder, elsewhere), locked(folder / LOCK, busy):
        for leftover in folder.iterdir():  # of a run that was killed
            if leftover.name != LOCK:
                leftover.unlink()
        try:
            yield folder
            for written in (*folder.iterdir(), folder):
                sync(written)
            folder.rename(path)  # with the lock, or another run might begin in between
            (path / LOCK).unlink()
            sync(path.parent)
        except BaseException:  # Ctrl-C too: half a checkpoint is of no use
            shutil.rmtree(folder, ignore_errors=True)
            raise
