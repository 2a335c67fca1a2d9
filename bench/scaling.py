"""Growth of time and memory: visual tokens, text, batch, images, questions, KV slots.

    python -m visistage.bench.scaling [--repeats 5]

Each point is a process of its own, so that its peak memory is its own; nothing of the compiler is
imported there, since torch would be most of the peak. The plans of a point follow each other.
Images are noise, new in every repetition, so that no cache has them. Sessions take prompts one by
one, so the batch goes through the executor alone. Last, all presets prefill the same images in
turn: how much faster than dense each is, over how much faster the roofline says it could be, with
rates measured in the same run (``lower_bound.py``).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import numpy as np

from ..graphs.bundle import Bundle
from ..graphs.chain.chain import Chain
from ..graphs.chain.rows import AppendedRows
from ..graphs.config import ModelConfig
from ..graphs.errors import VisistageError
from ..graphs.presets.presets import PRESETS
from ..runtime import Answer, Session, load
from ..runtime.backends.backend import BackendOptions
from ..runtime.backends.feeds import Embedding
from ..runtime.backends.ort import OrtExecutor
from ..runtime.text.prompt import PromptEncoder
from .environments import ROOT
from .lower_bound import Rates, measure_rates, milliseconds, prefill_layers
from .record import dry_option, save, spread
from .runner import last_line
from .runners.serving import peak

QUESTION = "What is shown in this image?"
WARMUPS = 1
PUBLISHED_SIDE = 336
AXES = {
    "visual": (168, 252, 336, 504, 672),  # pixels; 144, 324, 576, 1 296 and 2 304 visual tokens
    "images": (1, 2, 3, 4, 5),
    "text": (0, 64, 256, 768),  # words
    "batch": (1, 2, 4, 8, 16),
    "questions": (1, 2, 4, 8, 16),
    "slots": (1024, 2048, 4096),
}
PLANS = ("dense", "visipruner")
SWEEPS = (*AXES, "presets")


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
            encoded = np.repeat(embed(part.ids), batch, 0)
            if part.is_image:
                encoded = executor.encode(pixels).rows
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


def points(sweep: str, geometry: str) -> Iterator[ScalingPoint]:
    """Yield those of one sweep, the plans of each value together."""
    for value in AXES[sweep]:
        shape = {"visual": {}, "text": {"words": value}}.get(sweep, {sweep: value})
        side = value if sweep == "visual" else PUBLISHED_SIDE
        for plan in PLANS:
            yield ScalingPoint(sweep, value, plan, str(bundle(geometry, side, plan)), **shape)


def bundle(geometry: str, side: int, plan: str) -> Path:
    """Return a bundle with random weights for images of ``side`` pixels, built if need be."""
    from ..compile.build import make_bundle
    from ..compile.checkpoint.dummy import make_dummy

    checkpoint = make_dummy(geometry, ROOT / "dummy" / f"{geometry}-{side}", image_size=side)
    return make_bundle(str(checkpoint), plan=plan, out=ROOT / "bundles").path


def row_of(point: ScalingPoint, found: dict[str, Any]) -> dict[str, Any]:
    """Return what the record keeps of a point."""
    shape = {name: value for name, value in asdict(point).items() if name != "bundle"}
    facts = {name: value for name, value in found.items() if not isinstance(value, list)}
    row = shape | facts | {"slots": found.get("slots", point.slots)}
    return row | {name: spread(found[name]) for name in ("first_ms", "per_token_ms")}


def in_child(point: ScalingPoint, repeats: int, tokens: int, threads: int) -> dict[str, Any]:
    """Measure a point in a fresh process.

    Raises:
        VisistageError: it failed.
    """
    given = json.dumps([asdict(point), repeats, tokens, threads])
    done = subprocess.run(
        [sys.executable, "-m", "visistage.bench.scaling", "--point", given],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        where = f"{point.sweep} {point.value} {point.plan}"
        raise VisistageError(f"{where} failed: {last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def presets(geometry: str, repeats: int, threads: int, rates: Rates) -> list[dict[str, Any]]:
    """Return every preset's prefill beside dense's, and beside what the roofline predicts."""
    times: dict[str, list[float]] = {plan: [] for plan in PRESETS}
    predicted: dict[str, list[float]] = {plan: [] for plan in PRESETS}
    with ExitStack() as stack:
        sessions = {
            plan: stack.enter_context(load(bundle(geometry, PUBLISHED_SIDE, plan), threads=threads))
            for plan in PRESETS
        }
        manifest = sessions["dense"].bundle.manifest
        prefix = len(manifest.prefix.ids) if manifest.prefix else 0
        random = np.random.default_rng(0)
        for number in range(WARMUPS + repeats):
            (image,) = noise(random, 1, PUBLISHED_SIDE)
            for plan, session in sessions.items():
                answer = session.infer(image, question(0, number), max_tokens=1)
                if number >= WARMUPS:
                    times[plan].append(prefill_ms(answer))
                    predicted[plan].append(roofline_ms(manifest.config, answer, prefix, rates))
    dense, ideal = median(times["dense"]), mean(predicted["dense"])
    return [
        {"sweep": "presets", "plan": plan, "prefill_ms": spread(measured)}
        | compared(median(measured), dense, mean(predicted[plan]), ideal)
        for plan, measured in times.items()
    ]


def compared(measured: float, dense: float, roofline: float, ideal: float) -> dict[str, float]:
    """Return a plan's milliseconds and dense's, as measured and as predicted, as speed-ups."""
    speedup, promised = dense / measured, ideal / roofline
    return {
        "roofline_ms": roofline,
        "speedup": speedup,
        "predicted": promised,
        "reached": speedup / promised,
    }


def prefill_ms(answer: Answer) -> float:
    """Return the time inside the decoder's graphs, selections included, until the first token."""
    return sum(ms for name, ms in answer.timings.graphs_ms.items() if name != "vision")


def roofline_ms(config: ModelConfig, answer: Answer, prefix: int, rates: Rates) -> float:
    """Return, layer by layer, the longer of computing and reading, for the rows that really ran."""
    facts = answer.plan
    asked = facts.prompt_rows - facts.visual_tokens - prefix
    visual = facts.visual_tokens_per_layer
    works = prefill_layers(config.text, visual, prefix, asked, cached_layers=0)
    return sum(milliseconds(work, rates, "fp32") for work in works)


@click.command()
@click.option("--geometry", default="llava-45m", show_default=True, help="Of the dummy weights.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=8, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--sweep", "sweeps", multiple=True, type=click.Choice(SWEEPS), help="Only these.")
@click.option("--point", hidden=True, help="Measure this one in this process.")
@dry_option
def main(geometry, repeats, tokens, threads, sweeps, point, dry) -> None:
    """Build, measure point by point, record; every point is a line of JSON on stdout."""
    if point is not None:
        given, *limits = json.loads(point)
        click.echo(json.dumps(measure(ScalingPoint(**given), *limits)))
        return
    rates = measure_rates(threads)
    rows: list[dict[str, Any]] = []
    for sweep in sweeps or SWEEPS:
        if sweep == "presets":
            rates = rates.best(measure_rates(threads))
            rows += presets(geometry, repeats, threads, rates)
            continue
        for point in points(sweep, geometry):
            try:
                row = row_of(point, in_child(point, repeats, tokens, threads))
            except VisistageError as error:
                label = f"{sweep} {point.value}, {point.plan}"
                row = {"sweep": sweep, "label": label, "failed": str(error)}
            click.echo(json.dumps(row))
            rows.append(row)
    machine = {"sweep": "machine", "threads": threads, "repeats": repeats, "tokens": tokens}
    save(f"scaling-{geometry}", [machine | {"rates": rates.to_dict()}, *rows], dry=dry)


if __name__ == "__main__":
    main()
