"""Files of images that were computed before: ``Session.save_image`` writes them.

One safetensors file holds the image's visual rows, and its keys and values in every stage that is
blind to the question:

    visual_rows        (1, n, D), as they entered stage 0
    patches            (n,) int32, the patches that they stand for
    stageI.order       (n,) int32, orders of the rows in the slots of stage I
    key.L, value.L     (1, G, n, d) of each layer of these stages
    rows, positions    (1, n, D), and (n,) or (n, A) int32, as the last of these stages left
                       them: for the next stage, where there is one
    inject.L           (1, n, D), what layer L adds to the visual rows

The metadata says what it was computed by, and the SHA-256 of all else. A file is read only where
all of that is the same here, and every size what it must be: sizes are compared before anything is
read, and what is damaged is refused. What a hash is worth: docs/security.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..graphs.bundle import MANIFEST, Bundle, sha256
from ..graphs.caches import stage_caches
from ..graphs.chain.executor import Encoded
from ..graphs.chain.rows import places_in
from ..graphs.contract import INVISIBLE, inject_name, injected_of
from ..graphs.dtypes import BY_SAFETENSORS, DTYPES
from ..graphs.errors import ImageError
from ..graphs.fields import Words, show
from ..graphs.files import check_place, replacing
from ..graphs.safetensors_header import Header, TensorInfo, read_safetensors, write_header
from ..graphs.selectors.entry import PADDING
from .image_cache import CachedPrefix, HeldSlots
from .opened_image import SAVE_AGAIN, SUFFIX, ImageOrigin
from .prompt_parts import PromptImage, PromptPart, visual_rows
from .reuse import Context

FORMAT = "visistage image 2"
MAX_HEADER_BYTES = 1 << 20
_KEY = re.compile("[0-9a-f]{64}")
_SIZE = re.compile("([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type, as NumPy has it, and shape of every tensor of a file by its name."""


@dataclass(frozen=True)
class SavedLayout:
    """Contents that a session expects of a file.

    Attributes:
        origin: what an image is computed by here.
        begin: the first slot of the image's own part of the prompt.
        texts: orders [first, stop) of the text of that part, before the image and between runs of
            its rows.
        runs: orders that each of these takes.
        tokens: N of an image.
        layers, caches: of each stage that is blind to the question.
        visual: visual rows in each of them; the most of them entered.
        shape: G and d of a layer's cache, and D of a row.
        cache_dtype, rows_dtype: types of caches and rows.
        last: whether no stage follows.
        inject: layers that add something to visual rows.
        axes: positions of a row.
        told_apart: whether some of the image's rows may be matched, and some no rows at all.
    """

    origin: ImageOrigin
    begin: int
    texts: tuple[tuple[int, int], ...]
    runs: tuple[tuple[int, int], ...]
    tokens: int
    layers: Sequence[tuple[int, int]]
    caches: Sequence[Sequence[str]]
    visual: Sequence[int]
    shape: tuple[int, int, int]
    cache_dtype: str
    rows_dtype: str
    last: bool
    told_apart: bool = False
    inject: tuple[int, ...] = ()
    axes: int = 1

    @property
    def text(self) -> int:
        """Rows of text."""
        return len(self.text_orders)

    @cached_property
    def text_orders(self) -> np.ndarray:
        """Orders of the text rows (n,)."""
        return _counted(self.texts)

    def shapes(self) -> Shapes:
        """Return the tensors of a file, in their order."""
        groups, width, hidden = self.shape
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "visual_rows": (self.rows_dtype, (1, max(self.visual), hidden)),
            "patches": ("int32", (max(self.visual),)),
        }
        if self.told_apart:
            found["matched"] = ("int32", (self.visual[0],))
        for stage, (caches, visual) in enumerate(zip(self.caches, self.visual, strict=True)):
            count = self.text + visual
            if count:
                found[_order_name(stage)] = ("int32", (count,))
                for name in caches:
                    found[name] = (self.cache_dtype, (1, groups, count, width))
        if not self.last:
            count = self.text + self.visual[-1]
            found["rows"] = (self.rows_dtype, (1, count, hidden))
            axes = (self.axes,) if self.axes > 1 else ()
            found["positions"] = ("int32", (count, *axes))
        for layer in self.inject:
            found[inject_name(layer)] = (self.rows_dtype, (1, max(self.visual), hidden))
        return found

    def injected_later(
        self, inject: Mapping[int, np.ndarray], stages: Sequence[HeldSlots]
    ) -> dict[int, np.ndarray]:
        """Return what later stages add to the rows that the last of these ``stages`` left."""
        first = stages[self.visual.index(max(self.visual))]
        entered, left = (held.order[held.visual][None] for held in (first, stages[-1]))
        index = places_in(entered, left)[0]
        later = [layer for layer in inject if layer >= self.layers[-1][1]]
        return {layer: inject[layer][:, index] for layer in later}

    def is_visual(self, order: np.ndarray) -> np.ndarray:
        """Return which rows of these orders are no text."""
        return ~np.isin(order, self.text_orders)

    def holds(self, stage: int, order: np.ndarray) -> bool:
        """Return whether rows of these orders are what a stage has of text and image.

        Stage 0 has them as they come, others the image first; rows that are none stand behind.
        """
        visual = self.is_visual(order)
        image = order[visual]
        if self.told_apart:
            image = image[: int((image != INVISIBLE).sum())]
        expected = np.concatenate([order[visual], order[~visual]]) if stage else np.sort(order)
        return bool(
            np.array_equal(order[~visual], self.text_orders)
            and np.isin(image, _counted(self.runs)).all()
            and (np.diff(image) > 0).all()
            and np.array_equal(order, expected)
        )


def layout_of(
    bundle: Bundle, context: Context, opening: Sequence[PromptPart], tokens: int
) -> SavedLayout:
    """Return what files of images of N ``tokens`` hold for ``bundle``; ``opening``: a prompt up to
    its image.
    """
    manifest = bundle.manifest
    plan, text = manifest.plan, manifest.config.text
    begin, rest = context.prefix.part_from(opening)
    spans: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    at = begin
    for part in rest:
        image = isinstance(part, PromptImage)
        stop = at + (plan.span_of(part.rows) if isinstance(part, PromptImage) else len(part))
        spans[image].append((at, stop))
        at = stop
    stages = plan.stages[: plan.blind_stages]
    origin = ImageOrigin(
        sha256(bundle.path / MANIFEST),
        plan.hash,
        _hash(manifest.preprocessing),
        _hash([list(part) for part in opening if not isinstance(part, PromptImage)]),
    )
    return SavedLayout(
        origin,
        begin=begin,
        texts=tuple(spans[False]),
        runs=tuple(spans[True]),
        tokens=tokens,
        layers=[stage.layers for stage in stages],
        caches=stage_caches(plan)[: len(stages)],
        visual=visual_rows(plan, [tokens])[: len(stages)],
        shape=(text.kv_heads, text.head_dim, text.hidden),
        cache_dtype=manifest.cache_dtype,
        rows_dtype=str(np.dtype(context.executor.rows_dtype)),
        last=len(stages) == len(plan.stages),
        inject=text.inject,
        axes=text.rope.axes,
        told_apart=plan.tells_apart,
    )


def write_image(
    file: Path,
    layout: SavedLayout,
    key: str,
    size: tuple[int, int],
    encoded: Encoded,
    cached: CachedPrefix,
) -> None:
    """Write a file in one step, of a picture of a height and a width; arrays may be a device's.

    Raises:
        ImageError: it cannot be written, or has another suffix.
    """
    if file.suffix != SUFFIX:
        raise ImageError(f"{file} would not be known again: its name must end in {SUFFIX}")
    given = {
        "visual_rows": encoded.rows,
        "patches": encoded.patches[0],
        "matched": None if encoded.matched is None else encoded.matched[0],
        "rows": cached.rows,
        "positions": cached.positions,
    }
    for stage, held in enumerate(cached.stages):
        given |= {_order_name(stage): held.order, **held.caches}
    given |= {inject_name(layer): rows for layer, rows in encoded.inject.items()}
    wanted = layout.shapes()
    arrays = {}
    for name, (dtype, shape) in wanted.items():
        arrays[name] = np.ascontiguousarray(given[name], np.dtype(dtype).newbyteorder("<"))
        assert arrays[name].shape == shape, (name, arrays[name].shape, shape)
    pixels = f"{size[0]}x{size[1]}"
    told = {"format": FORMAT, "image": key, "size": pixels, **asdict(layout.origin)}
    told["sha256"] = digest_of(told, arrays.values())
    spelt = {
        name: (DTYPES[dtype].safetensors or "", shape) for name, (dtype, shape) in wanted.items()
    }
    try:
        place = check_place(file)
        if place is None:
            raise ImageError(f"{file} is no file, but a pipe or a device. Name another")
        with replacing(place) as partial, partial.open("wb") as stream:
            stream.write(write_header(spelt, told))
            for array in arrays.values():
                stream.write(array.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise ImageError(
            f"{file} cannot be written: {error.strerror or error}. Name another file"
        ) from error


def saved_size(file: Path) -> tuple[int, int]:
    """Return height and width of the picture that a file was made of.

    Raises:
        ImageError: it is no such file.
    """
    header = read_safetensors(file, ImageError, SAVE_AGAIN, MAX_HEADER_BYTES)
    size = _SIZE.fullmatch(_checked_format(file, header).get("size", ""))
    if size is None:
        _refuse(file, "does not say the size of its picture")
    return int(size[1]), int(size[2])


def read_image(file: Path, layout: SavedLayout) -> tuple[str, Encoded, CachedPrefix]:
    """Read a file; return the image's key, what entered of it, and what the stages made of that.

    Raises:
        ImageError: it is no such file, belongs to another bundle, plan, preprocessing or prompt,
            or is damaged.
    """
    header = read_safetensors(file, ImageError, SAVE_AGAIN, MAX_HEADER_BYTES)
    told = _check_metadata(file, header, layout.origin)
    wanted = layout.shapes()
    _check_shapes(file, header, wanted)
    try:
        arrays = {name: _read(header.tensors[name]) for name in wanted}
    except (OSError, ValueError) as error:
        raise ImageError(f"{file} cannot be read: {error}. {SAVE_AGAIN}") from None
    if digest_of(told, arrays.values()) != header.metadata["sha256"]:
        _refuse(file, "is damaged: its contents are not those that were saved")
    stages = []
    for stage, caches in enumerate(layout.caches):
        order = arrays.get(_order_name(stage), np.zeros(0, np.int32))
        held = {name: arrays[name] for name in caches if name in arrays}
        stages.append(HeldSlots(order, layout.is_visual(order) & (order != INVISIBLE), held))
        if not layout.holds(stage, order):
            _refuse(file, "has rows at places where a prompt has others")
    if not all(np.isfinite(a).all() for a in arrays.values() if a.dtype.kind == "f"):
        _refuse(file, "holds numbers that are not finite")
    positions = arrays.get("positions", np.zeros(0, np.int32))
    of_rows = (np.zeros(0, np.int32), np.zeros(0, bool))
    if not layout.last:
        of_rows = stages[-1].order, layout.is_visual(stages[-1].order)
    inject = injected_of(arrays)
    later = layout.injected_later(inject, stages)
    rows = arrays.get("rows")
    cached = CachedPrefix(layout.begin, tuple(stages), rows, *of_rows, positions, inject=later)
    patches = arrays["patches"]
    matched, real = None, patches
    if layout.told_apart:
        matched = arrays["matched"][None] != 0
        real = patches[: int((patches != PADDING).sum())]  # those that are none stand behind
    wrong = len(real) > 0 and (real.min() < -1 or real.max() >= layout.tokens)
    if wrong or (np.diff(real) <= 0).any() or (patches[len(real) :] != PADDING).any():
        _refuse(file, f"has rows of patches that an image of {layout.tokens} has not")
    return told["image"], Encoded(arrays["visual_rows"], patches[None], inject, matched), cached


def _check_metadata(file: Path, header: Header, origin: ImageOrigin) -> dict[str, str]:
    """Return what the metadata says beside the hash, all of which must be as it is here."""
    told = _checked_format(file, header)
    names = {field.name for field in fields(ImageOrigin)}
    if not _KEY.fullmatch(told["image"]):
        _refuse(file, f"has the key {show(told['image'])}, expected a SHA-256")
    ImageOrigin(**{name: told[name] for name in names}).check(file, origin)
    return told


def _checked_format(file: Path, header: Header) -> dict[str, str]:
    """Return the metadata of a file that this version saved, beside its hash."""
    told = dict(header.metadata)
    told.pop("sha256", None)
    names = {"format", "image", "size", *(field.name for field in fields(ImageOrigin))}
    if told.get("format") != FORMAT or set(header.metadata) != {*names, "sha256"}:
        found = show(told.get("format", "no format"))
        _refuse(file, f"is no image that this version saved: found {found}, expected {FORMAT!r}")
    return told


def _check_shapes(file: Path, header: Header, wanted: Shapes) -> None:
    here = {name: (_spelt(dtype), shape) for name, (dtype, shape) in wanted.items()}
    found = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    for name in (*here, *found):
        if found.get(name) != here.get(name):
            there, expected = (show(known.get(name, Words("nothing"))) for known in (found, here))
            _refuse(file, f"has {show(name)} as {there}, expected {expected}")


def _counted(spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the numbers of all spans [first, stop) (n,) int32."""
    return np.concatenate([np.arange(*span, dtype=np.int32) for span in spans or ((0, 0),)])


def _read(info: TensorInfo) -> np.ndarray:
    dtype = np.dtype(BY_SAFETENSORS[info.dtype].name)
    count = info.nbytes // dtype.itemsize
    array = np.fromfile(info.file, dtype.newbyteorder("<"), count, offset=info.offset)
    return array.reshape(info.shape).astype(dtype, copy=False)


def _spelt(dtype: str) -> str:
    """Return a type as safetensors spells it."""
    return DTYPES[dtype].safetensors or dtype


def digest_of(told: Mapping[str, str], arrays: Any) -> str:
    """Return the hash of a file: of its metadata beside the hash, and of its tensors in order."""
    digest = hashlib.sha256(json.dumps(dict(told), sort_keys=True).encode())
    for array in arrays:
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _order_name(stage: int) -> str:
    return f"stage{stage}.order"


def _refuse(file: Path, finding: str) -> NoReturn:
    raise ImageError(f"{file} {finding}. {SAVE_AGAIN}")
