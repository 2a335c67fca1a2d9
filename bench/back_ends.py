"""Target ``openvino`` beside target ``cpu``: the same questions, in turns, in one process.

    python -m visistage.bench.back_ends [--model llava-45m] [--rounds 8]

Every round brings a new image and question (cold), the same second question (again), and that
with more tokens. One thread each, and what is counted is the processor time of the process: on a
machine that others use, too, it is the time that the work itself takes. First deciles.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from importlib import metadata
from typing import Any

import click

from ..runtime import Session, load
from .peer_models import PRECISIONS, PeerCheckpoint, bundle
from .record import save, spread

TARGETS = ("cpu", "openvino")
PLANS = ("dense", "visipruner")
SERIES = 4000
"""Held-out scenes that no other measurement uses."""

SECOND = "Is there a red circle?"


@click.command()
@click.option("--model", default="llava-45m", show_default=True)
@click.option("--rounds", default=8, show_default=True)
@click.option("--tokens", default=8, show_default=True)
def main(model: str, rounds: int, tokens: int) -> None:
    """Build, ask in turns, record."""
    subject = PeerCheckpoint.named(model)
    scenes = list(subject.scenes(1 + rounds, SERIES))
    rows: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        for plan in PLANS:
            with ExitStack() as stack:
                sessions = {
                    target: stack.enter_context(
                        load(bundle(plan, precision, target, subject), threads=1)
                    )
                    for target in TARGETS
                }
                measured = _measure(sessions, scenes, tokens)
            facts = {"plan": plan, "precision": precision, "rounds": rounds, "tokens": tokens}
            rows += [{**facts, "target": target, **times} for target, times in measured.items()]
    rows[0]["openvino"] = metadata.version("openvino")
    save(f"back-ends-{model}", rows)


def _measure(sessions: dict[str, Session], scenes: list, tokens: int) -> dict[str, dict]:
    """Return first deciles in ms by target; the first scene warms up."""
    times: dict[str, list[tuple[float, float, float]]] = {target: [] for target in sessions}
    for session in sessions.values():
        session.eos = frozenset()
    for number, scene in enumerate(scenes):
        for target in TARGETS if number % 2 else TARGETS[::-1]:
            session = sessions[target]
            cold = _ms(session, scene.image, scene.question, 1)
            again = _ms(session, scene.image, SECOND, 1)
            longer = _ms(session, scene.image, SECOND, 1 + tokens)
            times[target].append((cold, again, (longer - again) / tokens))
    names = ("cold_ms", "again_ms", "per_token_ms")
    return {
        target: {
            name: spread(values)["p10"]
            for name, values in zip(names, zip(*measured[1:], strict=True), strict=True)
        }
        for target, measured in times.items()
    }


def _ms(session: Session, image: Any, prompt: str, tokens: int) -> float:
    """Return the processor time of one answer."""
    start = time.process_time()
    session.infer(image, prompt, max_tokens=tokens)
    return (time.process_time() - start) * 1e3


if __name__ == "__main__":
    main()
