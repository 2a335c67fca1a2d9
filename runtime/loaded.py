"""A bundle whose graphs are loaded: images and prompts in, parts of a prompt out.

What sessions and engines share. It computes nothing but visual rows, and takes no turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ..graphs.bundle import MANIFEST, Bundle
from ..graphs.chain import enter
from ..graphs.chain.executor import Encoded
from ..graphs.errors import BundleError, ImageError, PromptError, TargetError
from ..graphs.families.family import ImageLayout
from ..graphs.vision_contract import pixel_shape
from .answer import DECODED
from .backends.backend import Backend, BackendOptions
from .backends.registry import find_backend
from .image.image import MAX_PIXELS, Preprocessing, load_image, pixel_key, warm_up
from .image_cache import ByteCache, default_cache_bytes
from .image_file import SavedLayout, layout_of, read_image, saved_size
from .opened_image import SUFFIX, LoadedImage, Opened, OpenedImage, Source
from .prompt_parts import PromptImage, PromptPart
from .reuse import Context
from .text.generation import GenerationRules
from .text.grammar import Grammars
from .text.messages import Message
from .text.prompt import MAX_IMAGES, PromptEncoder, Segment
from .text.sampling import whole_number

ROWS_SHARE = 8
"""Divisor of the bytes for images that gives the part for what the vision encoder made of them."""

Images = Source | Sequence[Source] | None
"""One image, several (a list or a tuple), or none."""

Question = str | Sequence[Message]
"""A question behind its images, or a whole conversation (``PromptEncoder.encode``)."""


class LoadedBundle:
    """See the module.

    Args:
        bundle: an opened one.
        backend: what runs the graphs; None: as the bundle's target says. ``onnxruntime`` runs the
            graphs of any bundle on this CPU.
        threads: of the CPU; None: as many as were found fastest here.
        memory_limit: bytes that the weights may take; None: what is available now.
        cache_bytes: for images seen before: an eighth for what the vision encoder made of them, the
            rest for what the stages did. 0 computes every image anew. None: as much as the weights
            take, or 64 MiB, and at most a sixteenth of the memory that is free.
        max_pixels: of the largest image that is decoded, width x height.
        profile: a folder for ONNX Runtime's times of every operator (``executor.end_profiles``).
        lanes: prompts whose caches lie side by side; None: one.
        capture: on target ``cuda``, replay steps of an answer as CUDA graphs. It spares a thousand
            launches a token of a 7B; not tried on hardware yet, so off by default.

    Attributes:
        context: one of those that prompts go through (``Context``).

    Raises:
        VisistageError: the bundle cannot run here, or an option cannot be used.
    """

    context: Context

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str | None = None,
        threads: int | None = None,
        memory_limit: int | None = None,
        cache_bytes: int | None = None,
        max_pixels: int = MAX_PIXELS,
        profile: Path | None = None,
        lanes: int | None = None,
        capture: bool = False,
    ):
        if cache_bytes is not None:
            whole_number("cache_bytes", cache_bytes, 0, TargetError)
        self.max_pixels = whole_number("max_pixels", max_pixels, 1, TargetError)
        for name, value in (
            ("threads", threads),
            ("memory_limit", memory_limit),
            ("lanes", lanes),
        ):
            if value is not None:
                whole_number(name, value, 1, TargetError)
        options = BackendOptions(threads, memory_limit, profile, lanes, capture or None)
        row = find_backend(bundle, backend, options)
        bundle.check()
        self.bundle = bundle
        manifest = bundle.manifest
        self.preprocessing = Preprocessing.from_dict(manifest.preprocessing)
        side = manifest.config.vision.image_size
        if self.preprocessing.output_size not in (None, (side, side)):
            raise BundleError(
                f"{bundle.path / MANIFEST} prepares images of {self.preprocessing.output_size} for "
                f"an encoder of {(side, side)}. {bundle.again}"
            )
        warm_up(self.preprocessing)
        enter.warm_up(manifest.plan, manifest.config)
        config = manifest.config
        vocab, layout = config.text.vocab, config.layout(side, side)
        self.encoder = PromptEncoder.from_files(
            bundle.path, manifest.text_files, vocab, layout, config.image_token_id
        )
        rules = GenerationRules.read(manifest.generation, vocab)
        self.sampling, self.eos, self.stops = rules.sampling, rules.eos, rules.stops
        self.executor: Backend = row.open(bundle, options)
        if cache_bytes is None:
            cache_bytes = default_cache_bytes(self.executor.free_bytes(), manifest.weight_bytes)
        self.visual_rows: ByteCache[Encoded] = ByteCache(cache_bytes // ROWS_SHARE)
        self.prefix_bytes = cache_bytes - self.visual_rows.limit

    @cached_property
    def grammars(self) -> Grammars:
        """Grammars of answers by a schema; made when the first is asked for.

        Raises:
            MissingDependencyError: llguidance is not installed.
        """
        manifest = self.bundle.manifest
        tokenizer = self.bundle.file(manifest.text_files["tokenizer"])
        return Grammars(tokenizer, manifest.config.text.vocab, self.eos)

    def decode_image(self, image: Source) -> Opened:
        """Decode an image, and preprocess it if its visual rows are not known."""
        if isinstance(image, (str, os.PathLike)) and Path(image).suffix == SUFFIX:
            return self.read_image(image)
        if isinstance(image, LoadedImage):
            image.origin.check(image.file, self.saved_layout(image.layout).origin)
        if isinstance(image, (OpenedImage, LoadedImage)):
            return image
        decoded = load_image(image, max_pixels=self.max_pixels)
        layout = self.bundle.manifest.config.layout(decoded.height, decoded.width)
        key = pixel_key(decoded, self.preprocessing, layout)
        opened = OpenedImage(key, decoded, self.preprocessing, layout)
        if key not in self.visual_rows:
            _ = opened.pixels  # now, while preprocessing is what is timed
        return opened

    def decode_images(self, image: Images) -> tuple[list[Opened], float]:
        """Decode the images of a prompt; the second is the milliseconds that it took."""
        started = time.perf_counter()
        images = [] if image is None else image if isinstance(image, (list, tuple)) else [image]
        if len(images) > MAX_IMAGES:
            raise PromptError(f"{len(images)} images were given; at most {MAX_IMAGES} can be.")
        opened = [self.decode_image(source) for source in images]
        pictures = [image for image in opened if isinstance(image, OpenedImage)]
        DECODED.update({image.key: image for image in pictures})
        return opened, (time.perf_counter() - started) * 1e3

    def encode_image(self, opened: Opened) -> Encoded:
        """Return the visual rows of an image that enter; errors as in ``encoded_by``."""
        return self.encoded_by(self.executor, opened)

    def encoded_by(self, executor: Backend, opened: Opened) -> Encoded:
        """Return the visual rows of an image, from the cache or the vision encoder.

        Raises:
            ImageError: it is prepared in another size than the encoder takes.
        """
        if isinstance(opened, LoadedImage):
            return opened.encoded
        encoded = self.visual_rows.get(opened.key)
        if encoded is None:
            wanted = pixel_shape(self.bundle.manifest.config, 1)[1:]
            found = opened.pixels.shape[1:]
            if found != wanted:  # the checkpoint's preprocessing crops nothing
                raise ImageError(
                    f"the image is prepared as {found}, the vision encoder takes {wanted}. Crop "
                    "the image to a square"
                )
            encoded = executor.encode(opened.pixels, (opened.key,), opened.layout.feeds)
            nbytes = sum(rows.nbytes for rows in (encoded.rows, *encoded.inject.values()))
            self.visual_rows.put(opened.key, encoded, nbytes)
        return encoded

    def ids_of(self, parts: Sequence[PromptPart]) -> list[int]:
        """Return a prompt's ids with the image token once for each image, as penalties see it."""
        image = [] if self.encoder.image_token_id is None else [self.encoder.image_token_id]
        return [id_ for part in parts for id_ in (image if isinstance(part, PromptImage) else part)]

    def prompt_parts(self, prompt: Question, opened: Sequence[Opened]) -> list[PromptPart]:
        """Return the token ids and images of a prompt in their order."""
        layouts = [image.layout for image in opened]
        segments = self.encoder.encode(prompt, len(opened), layouts).segments
        return self.located(segments, opened)

    def located(self, segments: Sequence[Segment], opened: Sequence[Opened]) -> list[PromptPart]:
        """Put the images into their places among ``segments``."""
        encode = self.encode_image
        images = (
            PromptImage(image.key, partial(encode, image), image.layout, image.known, run)
            for image in opened
            for run in range(len(image.layout.spans))
        )
        return [next(images) if segment.is_image else segment.ids for segment in segments]

    def read_image(self, file: str | os.PathLike) -> LoadedImage:
        """Read a file of ``Session.save_image``.

        Raises:
            ImageError: the file is damaged, or was saved by another bundle.
        """
        size = saved_size(Path(file))
        layout = self.bundle.manifest.config.layout(*size)
        saved = self.saved_layout(layout)
        key, encoded, cached = read_image(Path(file), saved)
        known = self.context.opening_key(self._opening(key, layout)), cached
        return LoadedImage(key, Path(file), saved.origin, size, layout, encoded, known)

    def saved_layout(self, layout: ImageLayout) -> SavedLayout:
        """Return what a file of an image that is laid out so holds here."""
        return layout_of(self.bundle, self.context, self._opening("", layout), layout.rows)

    def _opening(self, key: str, layout: ImageLayout) -> list[PromptPart]:
        """Return a prompt up to its image, whose rows are not asked for."""
        unknown = Encoded(None, np.zeros((1, 0), np.int64))
        runs = (
            PromptImage(key, lambda: unknown, layout, run=run) for run in range(len(layout.spans))
        )
        segments = self.encoder.image_segments(layout)
        return [next(runs) if segment.is_image else segment.ids for segment in segments]
