"""Answers a second under several callers, ours beside OpenVINO GenAI's continuous batching; ours
in the callers' process, and over a socket by the server.

    python -m visistage.bench.serving [--model llava-45m] [--rounds 5]

Callers ask one question after the other, each about a new image; an answer has ``--tokens`` tokens.
Every engine has a process and an environment of its own, gets the same questions, and has its turn
in every round, in another order each time; the first round warms up. Prompts have the same tokens
for all. Nothing is kept between questions: prefix caching is off there, the image cache here.

In the record, by number of callers: answers and tokens a second over all rounds, and percentiles of
the first token's milliseconds, from a caller's question on. ``as_alone``: the share of answers
that are, token for token, those of one caller.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import numpy as np

from .environments import OPENVINO, OWN
from .peer_models import PRECISIONS, Peer, PeerCheckpoint, bundle, openvino, plans_of
from .peers import ANSWER_SECONDS, PeerRun, questions
from .record import dry_option, save
from .runner import PeerError


@dataclass
class CrowdTally:
    """What a peer did under so many callers: seconds of its rounds, and its answers."""

    seconds: float = 0.0
    answers: list[dict[str, Any]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Return its figures."""
        first = [answer["first_ms"] for answer in self.answers]
        tokens = sum(len(answer["tokens"]) for answer in self.answers)
        return {
            "answers": len(first),
            "answers_a_second": len(first) / self.seconds,
            "tokens_a_second": tokens / self.seconds,
            "first_ms": {"p50": median(first), "p95": quantiles(first, n=20)[-1]},
        }


def batching_peers(visual_tokens: int, most: int) -> list[Peer]:
    """Return the engines that are compared, for at most so many callers."""
    peers = [
        Peer(
            "-".join(["openvino", weights, hint or "default"]),
            f"OpenVINO GenAI, {weights} weights, {hint or 'default'}",
            "openvino_batching",
            OPENVINO,
            partial(openvino, weights),
            {"precision": hint, "callers": most},
            precision=weights,
        )
        for weights, hint in product(PRECISIONS, ("f32", None))
    ]
    plans, ways = plans_of(visual_tokens).items(), {"batching": "", "http": ", over HTTP"}
    for precision, (name, plan), (way, words) in product(PRECISIONS, plans, ways.items()):
        peers.append(
            Peer(
                "-".join(["visistage", name, precision, *(["http"] if words else [])]),
                f"visistage, {plan}, {'W8A8' if precision == 'int8' else 'FP32'}{words}",
                f"ours_{way}",
                OWN,
                partial(bundle, plan, precision, "cpu"),
                {"callers": most},
                precision=precision,
                plan=plan,
            )
        )
    return peers


def ask(run: PeerRun, asked: Sequence[dict[str, str]], callers: int, new: int) -> dict[str, Any]:
    """Return what a peer answers to so many callers; nothing after a failure."""
    if run.failed is not None:
        return {}
    assert run.runner is not None
    try:
        request = {"questions": asked, "callers": callers, "new": new}
        reply = run.runner.exchange(request, ANSWER_SECONDS)
        short = [answer for answer in reply["answers"] if len(answer["tokens"]) != new]
        if short:
            raise PeerError(f"{run.peer.label}: {len(short)} answers have not {new} tokens")
        return reply
    except PeerError as error:
        run.failed = str(error)
        run.runner.close()
        return {}


def row_of(run: PeerRun, tallies: dict[int, CrowdTally], alone: int) -> dict[str, Any]:
    """Return the row of a peer; of a failed one the reason."""
    row: dict[str, Any] = {"key": run.peer.key, "label": run.peer.label, "plan": run.peer.plan}
    row |= {"precision": run.peer.precision}
    if run.failed is not None or run.ready is None:
        return row | {"failed": run.failed}
    row |= asdict(run.ready)
    for callers, tally in tallies.items():
        row[f"callers_{callers}"] = facts = tally.facts()
        pairs = zip(tally.answers, tallies[alone].answers, strict=True)
        equal = [one["tokens"] == other["tokens"] for one, other in pairs]
        facts["as_alone"] = sum(equal) / len(equal)
    return row


@click.command()
@click.option("--model", default="llava-45m", show_default=True, help="Or demo, llava-7b, ...")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--questions", "each", type=click.IntRange(2), default=32, show_default=True)
@click.option("--callers", type=click.IntRange(1), multiple=True, default=(1, 8), show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--only", multiple=True, help="Keys of engines; may be repeated.")
@click.option("--minutes", default=20.0, show_default=True, help="That each step of a setup takes.")
@dry_option
def main(model, rounds, each, callers, tokens, threads, only, minutes, dry) -> None:
    """Set up, let callers ask in turns, record."""
    subject = PeerCheckpoint.named(model, minutes)
    peers = batching_peers(subject.checkpoint.config.visual_tokens, max(callers))
    unknown = set(only) - {peer.key for peer in peers}
    if unknown:
        keys = ", ".join(peer.key for peer in peers)
        raise click.BadParameter(f"no engine {', '.join(unknown)}. There are: {keys}")
    runs = [PeerRun(peer) for peer in peers if not only or peer.key in only]
    tallies: dict[str, dict[int, CrowdTally]] = defaultdict(lambda: defaultdict(CrowdTally))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for run in runs:
            run.start(subject, threads, stack)
            click.echo(f"{run.peer.label}: {run.failed or 'ready'}", err=True)
        every = []
        for number, (image, asked) in enumerate(questions(subject, (rounds + 1) * each)):
            file = scratch / f"{number}.npy"
            np.save(file, image)
            text = asked[0]
            every.append({"image": str(file), "question": text.text, "text": text.prompt.text})
        for number in range(rounds + 1):
            own = every[number * each : (number + 1) * each]
            turn = number % len(runs)
            for run, count in product([*runs[turn:], *runs[:turn]], callers):
                reply = ask(run, own, count, tokens)
                if reply and number:
                    tally = tallies[run.peer.key][count]
                    tally.seconds += reply["seconds"]
                    tally.answers += reply["answers"]
            click.echo(f"round {number} of {rounds}", err=True)
    machine = {"key": "machine", "model": model, "rounds": rounds, "questions": each}
    machine |= {"tokens": tokens, "threads": threads}
    rows = [row_of(run, tallies[run.peer.key], min(callers)) for run in runs]
    save(f"serving-{model}", [machine, *rows], dry=dry)


if __name__ == "__main__":
    main()
