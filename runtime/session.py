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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..graphs.bundle import Bundle
from ..graphs.chain.rows import Prefilled
from ..graphs.errors import ImageError, VisistageError
from .answer import Answer
from .autotune import choose_fused_prefill
from .chat import Chat, Selection
from .image.image import MAX_PIXELS
from .image_cache import ByteCache, CachedPrefix
from .image_file import write_image
from .loaded import Images, LoadedBundle, Question
from .opened_image import LoadedImage, Opened, Source
from .prompt_parts import PromptPart
from .reuse import Context
from .settings import DEFAULT_MAX_TOKENS, AnswerSettings
from .stream import Stream
from .text.sampling import Sampling

_loaded: weakref.WeakSet[Session] = weakref.WeakSet()


class Session(LoadedBundle):
    """See the module. A question, or a newer stream, ends a stream that is under way.

    Args:
        bundle: an opened one; ``load`` takes its path. The others: ``LoadedBundle``.

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
        capture: bool = False,
    ):
        super().__init__(
            bundle,
            backend=backend,
            threads=threads,
            memory_limit=memory_limit,
            cache_bytes=cache_bytes,
            max_pixels=max_pixels,
            profile=profile,
            capture=capture,
        )
        self.fused_prefill = choose_fused_prefill(bundle, self.executor)
        fused = self.fused_prefill is not None and self.fused_prefill.fused
        self.context = Context(bundle, self.executor, ByteCache(self.prefix_bytes), fused=fused)
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
            saved = self.saved_layout(opened.layout)
            write_image(Path(file), saved, opened.key, opened.size, encoded, cached)

    def load_image(self, file: str | os.PathLike) -> LoadedImage:
        """Read a file of ``save_image``: questions about it are answered as about the image, whose
        pixels need not be here.

        Raises:
            ImageError: the file is damaged, or was saved by another bundle.
        """
        with self.taking_turns():
            return self.read_image(file)

    def infer(
        self,
        image: Images,
        prompt: Question,
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
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        schema: Mapping[str, Any] | str | None = None,
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
                logit_bias=logit_bias,
                logprobs=logprobs,
                schema=schema,
            )
            for _ in stream:
                pass
        assert stream.answer is not None
        return stream.answer

    def stream(
        self,
        image: Images,
        prompt: Question,
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
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        schema: Mapping[str, Any] | str | None = None,
    ) -> Stream:
        """Answer piece by piece; ``stream.answer`` holds the whole once it is over.

        ``image`` is one image, several, or None for a prompt without any; ``prompt`` the question,
        put through the checkpoint's chat template, or a conversation, a list of messages
        (``PromptEncoder.encode``). The others are fields of ``AnswerSettings``.

        Raises:
            PromptError, ImageError: the input cannot be used.
            CapacityError: prompt and answer do not fit the model's context.
            VisistageError: the session is closed, or another process's.
        """
        settings = AnswerSettings(
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
            logit_bias=logit_bias,
            logprobs=logprobs,
            schema=schema,
        )
        return self.start(image, prompt, settings)

    def start(
        self,
        image: Images,
        prompt: Question,
        settings: AnswerSettings,
        begin: Callable[[Sequence[PromptPart]], Prefilled] | None = None,
    ) -> Stream:
        """Begin an answer as ``stream`` does; ``begin``: what takes the prompt through the stages,
        by default ``Context.prefill``.
        """
        with self.taking_turns():
            started = time.perf_counter()
            self.asked, preprocess_ms = self.decode_images(image)
            parts = self.prompt_parts(prompt, self.asked)
            request = settings.request(self, parts, started, preprocess_ms)
            self.context.check_room(parts, request.max_tokens)
            self.turn += 1
            with self.computing():
                self.context.ensure_capacity(parts, request.max_tokens)
            return Stream(self, request, begin or self.context.prefill)

    def chat(
        self,
        image: Images = None,
        *,
        system: str | None = None,
        selection: Selection = "reselect",
    ) -> Chat:
        """Begin a conversation; arguments as in ``Chat``."""
        return Chat(self, image, system=system, selection=selection)

    def score(self, image: Images, prompt: Question, tokens: Sequence[int]) -> np.ndarray:
        """Return what the model would say next after each of ``tokens`` (teacher forcing).

        Returns:
            (1 + len(tokens), V) float32 logits: of the prompt's last row, then after each token.

        Raises:
            VisistageError: as ``stream``.
        """
        with self.taking_turns():
            self.asked, _ = self.decode_images(image)
            parts = self.prompt_parts(prompt, self.asked)
            self.context.check_room(parts, len(tokens))
            self.turn += 1
            with self.computing():
                self.context.ensure_capacity(parts, len(tokens))
                first = self.context.prefill(parts).logits[0]
                return np.stack([first, *(self.context.decode(token) for token in tokens)])

    def _computed(self, opened: Opened) -> CachedPrefix | None:
        """Bring the stages to the end of an image, and keep what they hold, if they hold any."""
        parts = self.located(self.encoder.image_segments(opened.layout), [opened])
        self.turn += 1  # a stream that is under way would go on in another image
        with self.computing():
            self.context.ensure_capacity(parts, 0)
            cached = self.context.computed(parts)
            self.context.keep()
        return cached


def load(
    path: str | os.PathLike,
    *,
    backend: str | None = None,
    threads: int | None = None,
    memory_limit: int | None = None,
    cache_bytes: int | None = None,
    max_pixels: int = MAX_PIXELS,
    profile: Path | None = None,
    capture: bool = False,
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
        capture=capture,
    )


def _forked() -> None:
    """Keep the parent's graphs for good: to free them would wait for threads that stayed there."""
    for session in _loaded:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session.executor))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)
