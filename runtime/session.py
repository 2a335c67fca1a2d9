"""A loaded bundle: images and prompts in, answers out, one at a time.

    with runtime.load("engines/demo") as session:
        image = session.open("photo.jpg")            # computed once
        answer = session.infer(image, "How many?")
        for piece in session.stream(image, "Why?"): ...

It knows prompts, images and sampling; stages are the business of ``reuse`` and the back end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..graphs.bundle import Bundle
from ..graphs.chain.executor import Rows
from ..graphs.errors import CapacityError, PromptError, VisistageError
from ..graphs.plan.cost import Geometry
from .answer import Answer, Timings, plan_facts
from .autotune import choose_fused_prefill
from .backends.backend import BackendOptions
from .backends.registry import find_backend
from .image.image import Preprocessing, load_image, pixel_key, preprocess
from .reuse import ByteCache, Context, PromptImage, PromptPart
from .text.detokenize import TextStream
from .text.prompt import PromptEncoder, Segment
from .text.sampling import Sampling, choose, eos_ids, stop_strings

DEFAULT_CACHE_BYTES = 512 << 20
DEFAULT_MAX_TOKENS = 128


@dataclass(frozen=True)
class OpenedImage:
    """A decoded image; its key stands for what it shows."""

    key: str
    image: Image.Image
    preprocessing: Preprocessing

    @cached_property
    def pixels(self) -> np.ndarray:
        """(3, H, W) float32, as the vision encoder takes them; made when first needed."""
        return preprocess(self.image, self.preprocessing)


Source = Any
"""A path, bytes, file object, PIL image, uint8 array, or an ``OpenedImage``."""

Images = Source | Sequence[Source] | None
"""One image, several (a list or a tuple), or none."""


class Session:
    """See the module. Not for several threads at once; a stream ends when the next one starts.

    ``backend``: what runs the graphs; None: as the bundle's target says. ``onnxruntime`` runs the
    graphs of any bundle on this CPU. ``profile``: a folder for ONNX Runtime's times of every
    operator (``executor.end_profiles``).
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str | None = None,
        threads: int | None = None,
        memory_limit: int | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        profile: Path | None = None,
    ):
        options = BackendOptions(threads, memory_limit, profile)
        row = find_backend(bundle, backend, options)
        bundle.check()
        for name in bundle.manifest.text_files.values():
            bundle.file(name)  # refuses names that leave the bundle
        self.bundle = bundle
        manifest = bundle.manifest
        self.preprocessing = Preprocessing.from_dict(manifest.preprocessing)
        self.encoder = PromptEncoder.from_files(bundle.path, manifest.text_files)
        self.sampling = Sampling.from_generation_config(manifest.generation)
        self.eos = frozenset(eos_ids(manifest.generation))
        self.executor = row.open(bundle, options)
        self.fused_prefill = choose_fused_prefill(bundle, self.executor)
        fused = self.fused_prefill is not None and self.fused_prefill.fused
        self.context = Context(bundle, self.executor, cache_bytes // 2, fused=fused)
        self.visual_rows: ByteCache[Rows] = ByteCache(cache_bytes // 2)
        self.turn = 0  # counts what was asked: a newer question ends a stream

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs and caches; the session cannot be used afterwards."""
        self.visual_rows.clear()
        self.context.clear()
        self.executor.close()

    def open(self, image: Source) -> OpenedImage:
        """Run an image through the vision encoder and stage 0, so that questions need not."""
        opened = self.decode_image(image)
        parts = self._located(self.encoder.image_segments(), [opened])
        self.turn += 1  # a stream that is under way would go on in another image
        self.context.ensure_capacity(parts, 0)
        self.context.advance(parts)
        self.context.keep()
        return opened

    def infer(self, image: Images, prompt: str, **options) -> Answer:
        """Answer ``prompt`` about ``image``; options as in ``stream``."""
        stream = self.stream(image, prompt, **options)
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
        stop: Sequence[str] | str = (),
        sampling: Sampling | None = None,
    ) -> Stream:
        """Answer piece by piece; ``stream.answer`` holds the whole once it is over.

        Args:
            image: one image, several, or None for a prompt without any.
            prompt: the question; put through the checkpoint's chat template.
            max_tokens: the answer's longest length in tokens.
            stop: strings that end the answer (and are not part of it), besides the checkpoint's.
            sampling: greedy by default, or as the checkpoint's generation config says.

        Raises:
            PromptError, ImageError: the input cannot be used.
            CapacityError: prompt and answer do not fit the model's context.
        """
        if max_tokens < 1:
            raise PromptError(f"max_tokens is {max_tokens}: it must be at least 1")
        started = time.perf_counter()
        opened = self._decode_images(image)
        preprocess_ms = (time.perf_counter() - started) * 1e3
        parts = self.prompt_parts(prompt, opened)
        self._check_capacity(parts, max_tokens)
        self.turn += 1
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        stops += stop_strings(self.bundle.manifest.generation)
        request = AnswerRequest(parts, max_tokens, stops, sampling or self.sampling)
        return Stream(self, request, started, preprocess_ms)

    def score(self, image: Images, prompt: str, tokens: Sequence[int]) -> np.ndarray:
        """Return what the model would say next after each of ``tokens`` (teacher forcing).

        Returns:
            (1 + len(tokens), V) float32 logits: of the prompt's last row, then after each token.

        Raises:
            As ``stream``.
        """
        parts = self.prompt_parts(prompt, self._decode_images(image))
        self._check_capacity(parts, len(tokens))
        self.turn += 1
        first = self.context.prefill(parts).logits[0]
        return np.stack([first, *(self.context.decode(token) for token in tokens)])

    def decode_image(self, image: Source) -> OpenedImage:
        """Decode an image, and preprocess it if its visual rows are not known."""
        if isinstance(image, OpenedImage):
            return image
        decoded = load_image(image)
        key = pixel_key(decoded, self.preprocessing)
        opened = OpenedImage(key, decoded, self.preprocessing)
        if key not in self.visual_rows:
            _ = opened.pixels  # now, while preprocessing is what is timed
        return opened

    def encode_image(self, opened: OpenedImage) -> Rows:
        """Return the visual rows (1, N, D) of an image, from the cache or the vision encoder."""
        rows = self.visual_rows.get(opened.key)
        if rows is None:
            rows = self.executor.encode(opened.pixels[None])
            self.visual_rows.put(opened.key, rows, rows.nbytes)
        return rows

    def prompt_parts(self, prompt: str, opened: Sequence[OpenedImage]) -> list[PromptPart]:
        """Return the token ids and images of a prompt in their order."""
        return self._located(self.encoder.encode(prompt, images=len(opened)).segments, opened)

    def _located(
        self, segments: Sequence[Segment], opened: Sequence[OpenedImage]
    ) -> list[PromptPart]:
        """Put the images into their places among ``segments``."""
        images = (PromptImage(image.key, partial(self.encode_image, image)) for image in opened)
        return [next(images) if segment.is_image else segment.ids for segment in segments]

    def _decode_images(self, image: Images) -> list[OpenedImage]:
        images = [] if image is None else image if isinstance(image, (list, tuple)) else [image]
        return [self.decode_image(source) for source in images]

    def _check_capacity(self, parts: Sequence[PromptPart], max_tokens: int) -> None:
        rows = self.context.rows_of(parts)
        context = self.bundle.manifest.config.text.max_positions
        if rows + max_tokens > context:
            advice = (
                f"Ask for at most {context - rows} tokens"
                if rows < context
                else "Shorten the prompt"
            )
            raise CapacityError(
                f"the prompt takes {rows} rows ({self.context.visual_rows_of(parts)} of them "
                f"visual) and max_tokens {max_tokens}, the model's context is {context}. {advice}"
            )
        self.context.ensure_capacity(parts, max_tokens)


@dataclass(frozen=True)
class AnswerRequest:
    """A prompt, and the options of its answer."""

    parts: list[PromptPart]
    max_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling


class Stream(Iterator[str]):
    """Iterator over the pieces of one answer."""

    def __init__(
        self, session: Session, request: AnswerRequest, started: float, preprocess_ms: float
    ):
        self.answer: Answer | None = None
        self._session, self._turn = session, session.turn
        self._pieces = self._run(request, started, preprocess_ms)

    def __next__(self) -> str:
        if self.answer is None and self._turn != self._session.turn:
            raise VisistageError(
                "this stream was interrupted by a newer question on the same session. "
                "Finish a stream before asking again, or load the bundle twice"
            )
        return next(self._pieces)

    def _run(self, request: AnswerRequest, started: float, preprocess_ms: float) -> Iterator[str]:
        session, parts, sampling = self._session, request.parts, request.sampling
        context, executor = session.context, session.executor
        executor.reset_elapsed()
        done = context.prefill(parts)
        random = sampling.rng()
        text = TextStream(session.encoder.tokenizer, request.stop)
        history = [id_ for part in parts if not isinstance(part, PromptImage) for id_ in part]
        tokens: list[int] = []
        pieces: list[str] = []
        finish = "length"
        logits = done.logits[0]
        first_ms, graphs_ms = 0.0, {}
        while True:
            token = choose(logits, sampling, history, random)
            if not tokens:
                first_ms = (time.perf_counter() - started) * 1e3
                graphs_ms = executor.reset_elapsed()
            tokens.append(token)
            history.append(token)
            if token in session.eos:
                finish = "eos"
                break
            piece = text.push(token)
            if piece:
                pieces.append(piece)
                yield piece
            if text.stopped:
                finish = "stop"
                break
            if len(tokens) == request.max_tokens:
                break
            logits = context.decode(token)
        rest = text.finish()
        if rest:
            pieces.append(rest)
        total_ms = (time.perf_counter() - started) * 1e3
        per_token = (total_ms - first_ms) / (len(tokens) - 1) if len(tokens) > 1 else None
        manifest = session.bundle.manifest
        self.answer = Answer(
            text="".join(pieces).strip(),
            tokens=tuple(tokens),
            finish=finish,
            timings=Timings(preprocess_ms, graphs_ms, first_ms, per_token, total_ms),
            plan=plan_facts(
                manifest.plan,
                Geometry.of(manifest.config.text),
                done,
                visual_tokens=context.visual_rows_of(parts),
                prompt_rows=context.rows_of(parts),
            ),
        )
        if rest:
            yield rest
        context.keep()


def load(path: str | os.PathLike, **options) -> Session:
    """Open the bundle at ``path`` (or the only one below it); options as in ``Session``."""
    return Session(Bundle.open(path), **options)
