"""A loaded bundle: pictures and prompts in, answers out, one at a time.

    with runtime.load("engines/demo") as session:
        image = session.open("photo.jpg")            # paid once
        answer = session.infer(image, "How many?")
        for piece in session.stream(image, "Why?"): ...

It knows prompts, pictures and sampling; stages are ``context``'s and the back end's business.
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
from .backends.backend import check_backend, open_backend
from .backends.ort import OrtOptions
from .byte_cache import ByteCache
from .image.image import Preprocessing, load_image, pixel_key, preprocess
from .reuse import Context, PromptImage, PromptPart
from .text.detokenize import TextStream
from .text.prompt import PromptEncoder
from .text.sampling import Sampling, choose, eos_ids, stop_strings
from .tune_merging import choose_fused_prefill

DEFAULT_CACHE_BYTES = 512 << 20
DEFAULT_MAX_TOKENS = 128


@dataclass(frozen=True)
class OpenedImage:
    """A picture that has been decoded; its key says what it shows."""

    key: str
    image: Image.Image
    preprocessing: Preprocessing

    @cached_property
    def pixels(self) -> np.ndarray:
        """(3, H, W) float32, as the tower takes them; made when first needed."""
        return preprocess(self.image, self.preprocessing)


Source = Any
"""A path, bytes, file object, PIL image, uint8 array, or an ``OpenedImage``."""


class Session:
    """See the module. Not for several threads at once; a stream ends when the next one starts.

    ``backend``: who runs the graphs; None: whoever the bundle's target names. ``onnxruntime`` runs
    the graphs of any bundle on this CPU. ``profile``: a folder where ONNX Runtime shall note every
    operator's times (``executor.end_profiles``).
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
        check_backend(bundle, backend)
        bundle.check()
        for name in bundle.manifest.text_files.values():
            bundle.file(name)  # refuses names that leave the bundle
        self.bundle = bundle
        manifest = bundle.manifest
        self.preprocessing = Preprocessing.from_dict(manifest.preprocessing)
        self.encoder = PromptEncoder.from_files(bundle.path, manifest.text_files)
        self.sampling = Sampling.from_generation_config(manifest.generation)
        self.eos = frozenset(eos_ids(manifest.generation))
        options = OrtOptions(threads, memory_limit, profile)
        self.executor = open_backend(bundle, backend, options)
        self.fused_prefill = choose_fused_prefill(bundle, self.executor)
        self.context = Context(
            bundle,
            self.executor,
            cache_bytes // 2,
            fused=self.fused_prefill is not None and self.fused_prefill.fused,
        )
        self.visual_rows: ByteCache[Rows] = ByteCache(cache_bytes // 2)
        self._turn = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs and caches; the session cannot be used afterwards."""
        self.visual_rows.clear()
        self.context.cached.clear()
        self.context.pending.clear()
        self.executor.close()

    def open(self, image: Source) -> OpenedImage:
        """Decode a picture and run it through the tower and stage 0, so that questions do not."""
        opened = self._decode(image)
        parts = self._parts("-", [opened])
        self._turn += 1  # a stream that is under way would go on in another picture
        self.context.ensure_capacity(parts, 0)
        self.context.advance(parts)
        self.context.keep()
        return opened

    def infer(self, image: Source | Sequence[Source] | None, prompt: str, **options) -> Answer:
        """Answer ``prompt`` about ``image``; options as in ``stream``."""
        stream = self.stream(image, prompt, **options)
        for _ in stream:
            pass
        assert stream.answer is not None
        return stream.answer

    def stream(
        self,
        image: Source | Sequence[Source] | None,
        prompt: str,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] | str = (),
        sampling: Sampling | None = None,
    ) -> Stream:
        """The answer piece by piece; ``stream.answer`` holds the whole once it is over.

        Args:
            image: one picture, several, or None for a prompt without any.
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
        opened = self._decode_all(image)
        preprocess_ms = (time.perf_counter() - started) * 1e3
        parts = self._parts(prompt, opened)
        self._check_capacity(parts, max_tokens)
        self._turn += 1
        return Stream(
            self,
            parts,
            max_tokens,
            self._stops(stop),
            sampling or self.sampling,
            started,
            preprocess_ms,
        )

    def score(
        self, image: Source | Sequence[Source] | None, prompt: str, tokens: Sequence[int]
    ) -> np.ndarray:
        """What the model would say next, had its answer so far been ``tokens`` (teacher forcing).

        Returns:
            (1 + len(tokens), V) float32 logits: of the prompt's last row, then after each token.

        Raises:
            As ``stream``.
        """
        parts = self._parts(prompt, self._decode_all(image))
        self._check_capacity(parts, len(tokens))
        self._turn += 1
        first = self.context.prefill(parts).logits[0]
        return np.stack([first, *(self.context.decode(token) for token in tokens)])

    def _decode_all(self, image: Source | Sequence[Source] | None) -> list[OpenedImage]:
        images = [] if image is None else list(image) if _is_many(image) else [image]
        return [self._decode(one) for one in images]

    def _stops(self, stop: Sequence[str] | str) -> tuple[str, ...]:
        given = (stop,) if isinstance(stop, str) else tuple(stop)
        return given + stop_strings(self.bundle.manifest.generation)

    def _decode(self, image: Source) -> OpenedImage:
        if isinstance(image, OpenedImage):
            return image
        decoded = load_image(image)
        key = pixel_key(decoded, self.preprocessing)
        opened = OpenedImage(key, decoded, self.preprocessing)
        if key not in self.visual_rows:
            _ = opened.pixels  # now, while preprocessing is what is timed
        return opened

    def _parts(self, prompt: str, opened: Sequence[OpenedImage]) -> list[PromptPart]:
        encoded = self.encoder.encode(prompt, images=len(opened))
        images = iter(opened)
        parts: list[PromptPart] = []
        for segment in encoded.segments:
            if segment.is_image:
                one = next(images)
                parts.append(PromptImage(one.key, partial(self._rows, one)))
            else:
                parts.append(segment.ids)
        return parts

    def _rows(self, opened: OpenedImage) -> Rows:
        """Visual rows (1, N, D) of a picture, from the cache or the tower."""
        rows = self.visual_rows.get(opened.key)
        if rows is None:
            rows = self.executor.encode(opened.pixels[None])
            self.visual_rows.put(opened.key, rows, rows.nbytes)
        return rows

    def _check_capacity(self, parts: Sequence[PromptPart], max_tokens: int) -> None:
        rows = self.context.rows_of(parts)
        context = self.bundle.manifest.config.text.max_positions
        if rows + max_tokens > context:
            visual = (
                sum(isinstance(part, PromptImage) for part in parts) * self.context.visual_tokens
            )
            raise CapacityError(
                f"the prompt takes {rows} rows ({visual} of them visual) and max_tokens "
                f"{max_tokens}, the model's context is {context}. "
                + (
                    f"Ask for at most {context - rows} tokens"
                    if rows < context
                    else "Shorten the prompt"
                )
            )
        self.context.ensure_capacity(parts, max_tokens)


class Stream(Iterator[str]):
    """Iterator over the pieces of one answer."""

    def __init__(self, session, parts, max_tokens, stop, sampling, started, preprocess_ms):
        self.answer: Answer | None = None
        self._session = session
        self._turn = session._turn
        self._pieces = self._run(parts, max_tokens, stop, sampling, started, preprocess_ms)

    def __next__(self) -> str:
        if self.answer is None and self._turn != self._session._turn:
            raise VisistageError(
                "this stream was interrupted by a newer question on the same session. "
                "Finish a stream before asking again, or load the bundle twice"
            )
        return next(self._pieces)

    def _run(self, parts, max_tokens, stop, sampling, started, preprocess_ms) -> Iterator[str]:
        session = self._session
        context, executor = session.context, session.executor
        executor.reset_elapsed()
        done = context.prefill(parts)
        random = sampling.rng()
        text = TextStream(session.encoder.tokenizer, stop)
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
            if len(tokens) == max_tokens:
                break
            logits = context.decode(token)
        rest = text.finish()
        if rest:
            pieces.append(rest)
        total_ms = (time.perf_counter() - started) * 1e3
        per_token = (total_ms - first_ms) / (len(tokens) - 1) if len(tokens) > 1 else None
        self.answer = Answer(
            text="".join(pieces).strip(),
            tokens=tuple(tokens),
            finish=finish,
            timings=Timings(preprocess_ms, graphs_ms, first_ms, per_token, total_ms),
            plan=plan_facts(
                session.bundle.manifest.plan,
                Geometry.of(session.bundle.manifest.config.text),
                done,
                visual_tokens=context.visual_tokens
                * sum(isinstance(part, PromptImage) for part in parts),
                prompt_rows=context.rows_of(parts),
            ),
        )
        if rest:
            yield rest
        context.keep()


def load(path: str | os.PathLike, **options) -> Session:
    """Open the bundle at ``path`` (or the only one below it); options as in ``Session``."""
    return Session(Bundle.open(path), **options)


def _is_many(image: Any) -> bool:
    return isinstance(image, (list, tuple))
