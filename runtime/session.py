"""A loaded bundle: images and prompts in, answers out, one at a time.

    with runtime.load("engines/demo") as session:
        image = session.open("photo.jpg")            # computed once
        answer = session.infer(image, "How many?")
        for piece in session.stream(image, "Why?"): ...

It knows prompts, images and sampling; stages are the business of ``reuse`` and the back end.
Threads may share a session: their calls take turns.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import NoneType

import numpy as np

from ..graphs.bundle import MANIFEST, Bundle
from ..graphs.chain import enter
from ..graphs.chain.executor import Encoded
from ..graphs.errors import (
    BundleError,
    ImageError,
    PromptError,
    TargetError,
    VisistageError,
)
from ..graphs.fields import show
from .answer import DECODED, Answer
from .autotune import choose_fused_prefill
from .backends.backend import BackendOptions
from .backends.registry import find_backend
from .image.image import MAX_PIXELS, Preprocessing, load_image, pixel_key, warm_up
from .image_cache import ByteCache, CachedPrefix, default_cache_bytes
from .image_file import ImageLayout, layout_of, read_image, write_image
from .opened_image import SUFFIX, LoadedImage, Opened, OpenedImage, Source
from .reuse import Context, PromptImage, PromptPart
from .stream import AnswerRequest, Stream
from .text.detokenize import checked_stops
from .text.generation import GenerationRules
from .text.prompt import MAX_IMAGES, PromptEncoder, Segment
from .text.sampling import Sampling, whole_number

ROWS_SHARE = 8
"""Divisor of the bytes for images that gives the part for what the vision encoder made of them."""

DEFAULT_MAX_TOKENS = 128


_loaded: weakref.WeakSet[Session] = weakref.WeakSet()

Images = Source | Sequence[Source] | None
"""One image, several (a list or a tuple), or none."""


class Session:
    """See the module. A question, or a newer stream, ends a stream that is under way.

    Args:
        bundle: an opened one; ``load`` takes its path.
        backend: what runs the graphs; None: as the bundle's target says. ``onnxruntime`` runs the
            graphs of any bundle on this CPU.
        threads: of the CPU; None: as many as were found fastest here.
        memory_limit: bytes that the weights may take; None: what is available now.
        cache_bytes: for images seen before: an eighth for what the vision encoder made of them, the
            rest for what the stages did. 0 computes every image anew. None: as much as the weights
            take, or 64 MiB, and at most a sixteenth of the memory that is free.
        max_pixels: of the largest image that is decoded, width x height.
        profile: a folder for ONNX Runtime's times of every operator (``executor.end_profiles``).

    Raises:
        VisistageError: the bundle cannot run here, or an option cannot be used.
    """

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
    ):
        if cache_bytes is not None:
            whole_number("cache_bytes", cache_bytes, 0, TargetError)
        self.max_pixels = whole_number("max_pixels", max_pixels, 1, TargetError)
        for name, value in (("threads", threads), ("memory_limit", memory_limit)):
            if value is not None:
                whole_number(name, value, 1, TargetError)
        options = BackendOptions(threads, memory_limit, profile)
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
        vocab = manifest.config.text.vocab
        self.encoder = PromptEncoder.from_files(bundle.path, manifest.text_files, vocab)
        rules = GenerationRules.read(manifest.generation, vocab)
        self.sampling, self.eos, self.stops = rules.sampling, rules.eos, rules.stops
        self.executor = row.open(bundle, options)
        self.fused_prefill = choose_fused_prefill(bundle, self.executor)
        fused = self.fused_prefill is not None and self.fused_prefill.fused
        if cache_bytes is None:
            cache_bytes = default_cache_bytes(self.executor.free_bytes(), manifest.weight_bytes)
        self.visual_rows: ByteCache[Encoded] = ByteCache(cache_bytes // ROWS_SHARE)
        rest = cache_bytes - self.visual_rows.limit
        self.context = Context(bundle, self.executor, rest, fused=fused)
        self.turn = 0  # counts what was asked: a newer question ends a stream
        self._lock, self._process, self._closed = threading.RLock(), os.getpid(), False
        _loaded.add(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs and caches; the session cannot be used afterwards."""
        if self._process != os.getpid():
            return  # they belong to the process that this one was forked from
        with self._lock:
            if not self._closed:
                self._closed = True
                self.executor.activate()
                self.visual_rows.clear()
                self.context.clear()
                self.executor.close()

    @contextmanager
    def taking_turns(self) -> Iterator[None]:
        """Wait until no other thread is at work here, and be the one until the block ends.

        Raises:
            VisistageError: the session is closed, or another process's.
        """
        if self._process != os.getpid():
            raise VisistageError(
                f"this session was loaded by process {self._process} and does not survive a fork: "
                "its threads stayed there. Load the bundle in this process (runtime.load), or "
                "start processes with multiprocessing's method 'spawn'"
            )
        with self._lock:
            if self._closed:
                raise VisistageError("this session is closed. Load the bundle again: runtime.load")
            self.executor.activate()
            yield

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Forget what the stages hold if an error, or Ctrl-C, leaves them half done."""
        try:
            yield
        except BaseException:
            self.context.reset()
            raise

    def open(self, image: Source) -> Opened:
        """Run an image through the vision encoder and the stages that are blind to questions, so
        that questions need not. Under a plan that compares all rows of a prompt no stage is.
        """
        with self.taking_turns():
            opened = self.decode_image(image)
            self._computed(opened)
        return opened

    def save_image(self, image: Source, file: str | os.PathLike) -> None:
        """Write what ``open`` computes of an image to a file NAME.safetensors, for ``load_image``.

        Raises:
            ImageError: the image cannot be used, or the file not be written.
        """
        with self.taking_turns():
            opened = self.decode_image(image)
            cached = self._computed(opened)
            if cached is None:
                raise ImageError(
                    f"plan '{self.bundle.manifest.plan.name}' compares all rows of a prompt, so of "
                    "an image alone nothing is computed that could be saved. Ask about the picture "
                    "itself"
                )
            encoded = self.encode_image(opened)
            write_image(Path(file), self._image_layout(), opened.key, encoded, cached)

    def load_image(self, file: str | os.PathLike) -> LoadedImage:
        """Read a file of ``save_image``: questions about it are answered as about the image, whose
        pixels need not be here.

        Raises:
            ImageError: the file is damaged, or was saved by another bundle.
        """
        with self.taking_turns():
            layout = self._image_layout()
            key, encoded, cached = read_image(Path(file), layout)
            known = self.context.opening_key(self._opening(key)), cached
            return LoadedImage(key, Path(file), layout.origin, encoded, known)

    def infer(
        self,
        image: Images,
        prompt: str,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | str = (),
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
    ) -> Answer:
        """Answer ``prompt`` about ``image``; arguments and errors as in ``stream``."""
        with self.taking_turns():
            stream = self.stream(
                image,
                prompt,
                max_tokens=max_tokens,
                max_new_tokens=max_new_tokens,
                stop=stop,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                sampling=sampling,
            )
            for _ in stream:
                pass
        assert stream.answer is not None
        return stream.answer

    def stream(
        self,
        image: Images,
        prompt: str,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | str = (),
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
    ) -> Stream:
        """Answer piece by piece; ``stream.answer`` holds the whole once it is over.

        Args:
            image: one image, several, or None for a prompt without any.
            prompt: the question; put through the checkpoint's chat template.
            max_tokens: the answer's longest length in tokens.
            max_new_tokens: the same, by the name that transformers gives it.
            stop: strings that end the answer (and are not part of it), besides the checkpoint's.
            temperature: 0 takes the most likely token; this and the next ones are fields of
                ``Sampling``. None: as the checkpoint's generation config says, else greedy.
            top_p: draws from the most likely tokens of this total.
            top_k: draws from so many of them.
            min_p: drops tokens less likely than this share of the best one.
            repetition_penalty: lowers what prompt and answer hold already.
            seed: repeats a draw.
            sampling: all of these together, in place of the checkpoint's; those given count more.

        Raises:
            PromptError, ImageError: the input cannot be used.
            CapacityError: prompt and answer do not fit the model's context.
            VisistageError: the session is closed, or another process's.
        """
        given = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        limit = whole_number("max_tokens", max_tokens, 1)
        if max_new_tokens is not None:
            if limit not in (DEFAULT_MAX_TOKENS, max_new_tokens):
                raise PromptError(
                    f"max_tokens is {limit} and max_new_tokens {show(max_new_tokens)}; they are "
                    "two names of one thing. Give one."
                )
            limit = whole_number("max_new_tokens", max_new_tokens, 1)
        if not isinstance(sampling, (Sampling, NoneType)):
            raise PromptError(
                f"sampling is {show(sampling)}; expected runtime.Sampling(temperature=0.7), "
                "or temperature=0.7 without it."
            )
        chosen = (sampling or self.sampling).with_given(given)
        stops = (*checked_stops(stop), *self.stops)
        with self.taking_turns():
            started = time.perf_counter()
            opened = self._decode_images(image)
            preprocess_ms = (time.perf_counter() - started) * 1e3
            parts = self.prompt_parts(prompt, opened)
            self.context.check_room(parts, limit)
            self.turn += 1
            with self.computing():
                self.context.ensure_capacity(parts, limit)
            request = AnswerRequest(parts, limit, checked_stops(stops), chosen)
            return Stream(self, request, started, preprocess_ms)

    def score(self, image: Images, prompt: str, tokens: Sequence[int]) -> np.ndarray:
        """Return what the model would say next after each of ``tokens`` (teacher forcing).

        Returns:
            (1 + len(tokens), V) float32 logits: of the prompt's last row, then after each token.

        Raises:
            As ``stream``.
        """
        with self.taking_turns():
            parts = self.prompt_parts(prompt, self._decode_images(image))
            self.context.check_room(parts, len(tokens))
            self.turn += 1
            with self.computing():
                self.context.ensure_capacity(parts, len(tokens))
                first = self.context.prefill(parts).logits[0]
                return np.stack([first, *(self.context.decode(token) for token in tokens)])

    def decode_image(self, image: Source) -> Opened:
        """Decode an image, and preprocess it if its visual rows are not known."""
        if isinstance(image, (str, os.PathLike)) and Path(image).suffix == SUFFIX:
            return self.load_image(image)
        if isinstance(image, LoadedImage):
            image.origin.check(image.file, self._image_layout().origin)
        if isinstance(image, (OpenedImage, LoadedImage)):
            return image
        decoded = load_image(image, max_pixels=self.max_pixels)
        key = pixel_key(decoded, self.preprocessing)
        opened = OpenedImage(key, decoded, self.preprocessing)
        if key not in self.visual_rows:
            _ = opened.pixels  # now, while preprocessing is what is timed
        return opened

    def encode_image(self, opened: Opened) -> Encoded:
        """Return the visual rows of an image that enter, from the cache or the vision encoder.

        Raises:
            ImageError: it is prepared in another size than the encoder takes.
        """
        if isinstance(opened, LoadedImage):
            return opened.encoded
        encoded = self.visual_rows.get(opened.key)
        if encoded is None:
            vision = self.bundle.manifest.config.vision
            wanted = (vision.channels, vision.image_size, vision.image_size)
            if opened.pixels.shape != wanted:  # the checkpoint's preprocessing crops nothing
                raise ImageError(
                    f"the image is prepared as {opened.pixels.shape}, the vision encoder takes "
                    f"{wanted}. Crop the image to a square"
                )
            encoded = self.executor.encode(opened.pixels[None], (opened.key,))
            nbytes = sum(rows.nbytes for rows in (encoded.rows, *encoded.inject.values()))
            self.visual_rows.put(opened.key, encoded, nbytes)
        return encoded

    def ids_of(self, parts: Sequence[PromptPart]) -> list[int]:
        """Return a prompt's ids with the image token once for each image, as penalties see it."""
        image = [] if self.encoder.image_token_id is None else [self.encoder.image_token_id]
        return [id_ for part in parts for id_ in (image if isinstance(part, PromptImage) else part)]

    def prompt_parts(self, prompt: str, opened: Sequence[Opened]) -> list[PromptPart]:
        """Return the token ids and images of a prompt in their order."""
        return self._located(self.encoder.encode(prompt, images=len(opened)).segments, opened)

    def _located(self, segments: Sequence[Segment], opened: Sequence[Opened]) -> list[PromptPart]:
        """Put the images into their places among ``segments``."""
        images = (
            PromptImage(image.key, partial(self.encode_image, image), image.known)
            for image in opened
        )
        return [next(images) if segment.is_image else segment.ids for segment in segments]

    def _opening(self, key: str) -> list[PromptPart]:
        """Return a prompt up to its image, whose rows are not asked for."""
        segments = self.encoder.image_segments()
        image = PromptImage(key, lambda: Encoded(None, np.zeros((1, 0), np.int64)))
        return [*(part.ids for part in segments[:-1]), image]

    def _image_layout(self) -> ImageLayout:
        return layout_of(self.bundle, self.context, self._opening(""))

    def _computed(self, opened: Opened) -> CachedPrefix | None:
        """Bring the stages to the end of an image, and keep what they hold, if they hold any."""
        parts = self._located(self.encoder.image_segments(), [opened])
        self.turn += 1  # a stream that is under way would go on in another image
        with self.computing():
            self.context.ensure_capacity(parts, 0)
            cached = self.context.computed(parts)
            self.context.keep()
        return cached

    def _decode_images(self, image: Images) -> list[Opened]:
        images = [] if image is None else image if isinstance(image, (list, tuple)) else [image]
        if len(images) > MAX_IMAGES:
            raise PromptError(f"{len(images)} images were given; at most {MAX_IMAGES} can be.")
        opened = [self.decode_image(source) for source in images]
        self.asked = opened  # held until the next question, for those who draw what was seen
        pictures = [image for image in opened if isinstance(image, OpenedImage)]
        DECODED.update({image.key: image for image in pictures})
        return opened


def load(
    path: str | os.PathLike,
    *,
    backend: str | None = None,
    threads: int | None = None,
    memory_limit: int | None = None,
    cache_bytes: int | None = None,
    max_pixels: int = MAX_PIXELS,
    profile: Path | None = None,
) -> Session:
    """Open the bundle at ``path`` (or the only one below it); arguments as in ``Session``."""
    return Session(
        Bundle.open(path),
        backend=backend,
        threads=threads,
        memory_limit=memory_limit,
        cache_bytes=cache_bytes,
        max_pixels=max_pixels,
        profile=profile,
    )


def _forked() -> None:
    """Keep the parent's graphs for good: to free them would wait for threads that stayed there."""
    for session in _loaded:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session.executor))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)
