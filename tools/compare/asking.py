"""The same questions to many bundles, two about each image, a file of answers for each bundle.

Of a pair, the second question is asked right after the first on one session: the image is cached
then, and with it all that the plan computed before it knew the question.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...calib.answer_file import AnswerFile, Heard
from ...calib.two_turns import Turns
from ...graphs.bundle import MANIFEST, Bundle, sha256
from ...graphs.errors import VisistageError
from ...graphs.progress import Advance
from ...runtime import load
from ...runtime.hardware import cores

if TYPE_CHECKING:
    from ...runtime import Session

MAX_TOKENS = 32
"""Tokens of an answer at most."""

SMALL_WEIGHTS = 64 << 20
"""Bytes of weights up to which bundles are asked side by side, a thread each: a graph of a small
model leaves most of a second core idle."""

Pair = tuple[Heard, Heard | None]
"""The answers to a pair of questions."""


def bundle_title(bundle: Bundle) -> str:
    """Return the name of a bundle among those of a comparison, whose checkpoints may differ."""
    return "-".join(bundle.path.parts[-2:])


def answers_file(folder: Path, bundle: Bundle) -> AnswerFile:
    """Return the file that keeps the answers of a bundle to the first questions.

    Raises:
        VisistageError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = [sha256(bundle.path / MANIFEST), MAX_TOKENS]
    return AnswerFile(folder / f"{bundle_title(bundle)}.jsonl", key)


def ask_turns(
    session: Session,
    turns: Sequence[Turns],
    kept: tuple[AnswerFile, AnswerFile],
    advance: Advance,
    stopped: threading.Event | None = None,
) -> list[Pair | None]:
    """Ask both questions of every pair greedily; None where one cannot be asked.

    Args:
        session: a loaded bundle.
        turns: asked in their order.
        kept: answers of earlier runs to first and to second questions; get those of this one.
        advance: called after each pair.
        stopped: ends the work once it is set.
    """
    greedy = replace(session.sampling, temperature=0.0)
    pairs: list[Pair | None] = []
    for turn in turns:
        if stopped is not None and stopped.is_set():
            break
        files = kept[: len(turn.samples)]
        heard = [file.find(sample) for file, sample in zip(files, turn.samples, strict=True)]
        if not all(heard):  # both again: what matters is that one comes after the other
            try:
                heard = [
                    Heard.of(
                        session.infer(
                            sample.image, sample.prompt, max_tokens=MAX_TOKENS, sampling=greedy
                        )
                    )
                    for sample in turn.samples
                ]
            except VisistageError:  # one sample's trouble is not that of the others
                pairs.append(None)
                advance(1)
                continue
            for file, sample, answer in zip(files, turn.samples, heard, strict=True):
                assert answer is not None
                file.add(sample, answer)
        first, *second = heard
        assert first is not None
        pairs.append((first, second[0] if second else None))
        advance(1)
    return pairs


def ask_bundles(
    bundles: Sequence[Bundle], turns: Sequence[Turns], folder: Path, advance: Advance
) -> list[list[Pair | None]]:
    """Ask every bundle; small ones side by side.

    Raises:
        VisistageError: a bundle that cannot run, or a file of answers that cannot be written.
    """
    small = max(bundle.manifest.weight_bytes for bundle in bundles) <= SMALL_WEIGHTS
    stopped = threading.Event()

    def ask(bundle: Bundle) -> list[Pair | None]:
        kept = (answers_file(folder, bundle), answers_file(folder / "second", bundle))
        if stopped.is_set():
            return []
        with load(bundle.path, threads=1 if small else None) as session:
            return ask_turns(session, turns, kept, advance, stopped)

    with ThreadPoolExecutor(cores() if small else 1) as pool:
        running = [pool.submit(ask, bundle) for bundle in bundles]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:  # of Ctrl-C, too: what was answered is in the files
            if not all(future.done() for future in running) or any(f.exception() for f in running):
                stopped.set()
        return [future.result() for future in running]
