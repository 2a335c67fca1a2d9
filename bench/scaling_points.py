"""Measurement of one point of ``scaling``, in a process of its own.

    python -m visistage.bench.scaling_points '[{POINT}, REPEATS, TOKENS, THREADS]'

Images are noise, new in every repetition, so that no cache has them. Nothing of the compiler is
imported: torch would be most of the peak.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..graphs.bundle import Bundle
from ..graphs.chain.chain import AppendedRows, Chain
from ..runtime import Session, load
from ..runtime.backends.backend import BackendOptions
from ..runtime.backends.feeds import Embedding
from ..runtime.backends.ort import OrtExecutor
from ..runtime.text.prompt import PromptEncoder
from .runners.serving import peak

QUESTION = "What is shown in this image?"
WARMUPS = 1


@dataclass(frozen=True)
class ScalingPoint:
    """One measurement.

    sweep, value: which series, and where on its axis. bundle: folder. images: per prompt. words:
    added to the question. questions: in turn, about the same images. slots: of every stage's
    cache, 0 for what is needed. batch: prompts at once, through the executor alone: sessions take
    them one by one.
    """

    sweep: str
    value: int
    plan: str
    bundle: str
    images: int = 1
    words: int = 0
    questions: int = 1
    slots: int = 0
    batch: int = 1


def measure(point: ScalingPoint, repeats: int, tokens: int, threads: int) -> dict[str, Any]:
    """Return the milliseconds of every repetition, and the process's peak.

    first_ms: from the call to the first token, a mean over the questions (of all prompts together
    in a batch); per_token_ms: each later one; both lists.
    """
    ask = _batches if point.sweep == "batch" else _questions
    found: dict[str, Any] = {"first_ms": [], "per_token_ms": []}
    with ask(point, tokens, threads) as repeat:
        for number in range(WARMUPS + repeats):
            first, per_token, facts = repeat(np.random.default_rng(number))
            if number >= WARMUPS:
                found["first_ms"].append(first)
                found["per_token_ms"].append(per_token)
    return found | facts | peak()


@contextmanager
def _questions(point: ScalingPoint, tokens: int, threads: int) -> Iterator:
    """Ask through the public runtime."""
    with load(point.bundle, threads=threads) as session:
        session.eos = frozenset()  # every answer is of the same length
        side = session.bundle.manifest.config.vision.image_size

        def repeat(random: np.random.Generator) -> tuple[float, float, dict[str, Any]]:
            images = list(noise(random, point.images, side))
            _reserve(session, point.slots)
            answers = [
                session.infer(images, question(point.words, number), max_tokens=tokens)
                for number in range(point.questions)
            ]
            first = float(np.mean([answer.timings.first_token_ms for answer in answers]))
            later = float(np.mean([answer.timings.per_token_ms for answer in answers]))
            facts = {
                "prompt_rows": answers[-1].plan.prompt_rows,
                "visual_tokens": answers[-1].plan.visual_tokens,
                "slots": [slots.order.shape[1] for slots in session.context.chain.slots],
            }
            return first, later, facts

        yield repeat


@contextmanager
def _batches(point: ScalingPoint, tokens: int, threads: int) -> Iterator:
    """Run equal prompts about different images, side by side through every graph."""
    bundle = Bundle.open(point.bundle)
    manifest, batch = bundle.manifest, point.batch
    executor = OrtExecutor(bundle, BackendOptions(threads), batch)
    embed = Embedding(bundle, executor.rows_dtype)
    encoder = PromptEncoder.from_files(bundle.path, manifest.text_files)
    prompt = encoder.encode(question(point.words, 0), images=1)
    side = manifest.config.vision.image_size

    def appended(is_image: bool, rows: np.ndarray, at: int) -> AppendedRows:
        count = rows.shape[1]
        order = np.repeat(np.arange(at, at + count, dtype=np.int32)[None], batch, 0)
        return AppendedRows(is_image, rows, order, order)

    def repeat(random: np.random.Generator) -> tuple[float, float, dict[str, Any]]:
        pixels = random.standard_normal((batch, 3, side, side), np.float32)
        started = time.perf_counter()
        chain, segments, at = Chain(manifest.plan, executor, batch), [], 0
        for part in prompt.segments:
            encoded = (
                executor.encode(pixels) if part.is_image else np.repeat(embed(part.ids), batch, 0)
            )
            segments.append(appended(part.is_image, encoded, at))
            at += segments[-1].count
        logits = chain.prefill(segments).logits
        first = time.perf_counter()
        for number in range(tokens - 1):
            chosen = logits.argmax(-1)
            rows = np.concatenate([embed([int(token)]) for token in chosen])
            logits = chain.decode(appended(False, rows, at + number))
        done = time.perf_counter()
        later = (done - first) / (tokens - 1) * 1e3
        return (first - started) * 1e3, later, {"prompt_rows": at}

    yield repeat
    executor.close()


def _reserve(session: Session, slots: int) -> None:
    """Reserve ``slots`` rows in every stage at once, never given back."""
    chain, executor = session.context.chain, session.executor
    for stage, held in enumerate(chain.slots):
        if slots > held.used:
            chain.reserve(stage, slots - held.used)
    if slots:
        vars(executor)["trim_slots"] = lambda stage, used, wanted: executor.blocks[stage].shape[3]


def noise(random: np.random.Generator, count: int, side: int) -> Iterator[np.ndarray]:
    """Yield images (side, side, 3) of uint8."""
    for _ in range(count):
        yield random.integers(0, 256, (side, side, 3), np.uint8)


def question(words: int, number: int) -> str:
    """Return one of a series of different questions of about the same length."""
    return f"{QUESTION} {number} {'and a dog ' * (words // 3)}".strip()


if __name__ == "__main__":
    given, *limits = json.loads(sys.argv[1])
    print(json.dumps(measure(ScalingPoint(**given), *limits)))
