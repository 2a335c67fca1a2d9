"""Ours beside the best of others: one checkpoint, the same pictures and questions, in turns.

    python -m visistage.bench.peers [--model llava-45m] [--rounds 20]

Every round shows each peer a picture that none has seen, with a new question (cold), then asks
another question about the same picture (second), which those that keep pictures answer from what
they kept. Peers alternate, so that whatever else the machine does falls on all of them alike, and
start in another order each round. One process each, in an environment of its own; whoever cannot be
set up or stops answering is in the record with the reason. Prompts have the same tokens for all, or
the peer fails. Answers are greedy and go on past their end, so that all are of one length.

Pictures have the size that the tower takes: nobody's resampling decides. Beside every figure stands
its lower bound (``lower_bound.py``), by rates that were measured before and after, in the same run.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
import numpy as np

from ..compile.export.texts import text_facts
from ..compile.planfile import resolve_plan
from ..demo.heldout import held_out
from ..graphs.errors import VisistageError
from ..graphs.plan.call_cost import COUNTS, vision_work
from ..graphs.plan.cost import plan_loads
from ..runtime.text.prompt import Prompt, PromptEncoder
from ..runtime.text.sampling import eos_ids
from .answers import agreement
from .environments import ROOT, interpreter
from .lower_bound import Rates, measure_rates, milliseconds, prefill_work, step_work
from .peer_models import REFERENCE, REPORTED, Peer, PeerCheckpoint, all_peers
from .record import dry_option, save, spread
from .runner import RUNNERS, Answered, PeerError, Ready, Runner

SERIES = 2000
"""Held-out scenes that neither evaluations nor calibrations use."""

ANSWER_SECONDS, LOAD_SECONDS = 300, 600


@dataclass(frozen=True)
class PeerQuestion:
    """What is asked about a picture, and its prompt; ``key`` is (round, cold or second)."""

    key: tuple[int, str]
    text: str
    prompt: Prompt


class Stand:
    """One peer during a run: its process, what it answered, or why it does not."""

    def __init__(self, peer: Peer):
        self.peer = peer
        self.answers: dict[tuple[int, str], Answered] = {}
        self.failed: str | None = None
        self.ready: Ready | None = None
        self.runner: Runner | None = None

    def start(self, subject: PeerCheckpoint, threads: int, stack: ExitStack) -> None:
        """Set up and load; a failure is kept as the reason."""
        peer = self.peer
        try:
            python = interpreter(peer.environment, subject.minutes)
            model = peer.model(subject)
            settings = {"model": str(model), "threads": threads, **peer.settings}
            self.runner = stack.enter_context(
                Runner(
                    peer.label,
                    [str(python), str(RUNNERS / f"{peer.script}.py"), json.dumps(settings)],
                    ROOT / "logs" / f"{peer.key}.log",
                    {
                        **peer.environment.variables,
                        "OMP_NUM_THREADS": str(threads),
                        "OMP_WAIT_POLICY": "PASSIVE",  # idle peers must not steal a core
                    },
                )
            )
            self.ready = self.runner.ready(LOAD_SECONDS)
        except VisistageError as error:
            self.failed = str(error)

    def ask(self, picture: Path, question: PeerQuestion, rows: int, new: int) -> Answered | None:
        """One answer of ``new`` tokens to a prompt of ``rows``; None from one who has failed."""
        if self.failed is not None:
            return None
        assert self.runner is not None
        request = {
            "picture": str(picture),
            "question": question.text,
            "text": question.prompt.text,
            "new": new,
        }
        try:
            answer = self.runner.ask(request, ANSWER_SECONDS)
            check(answer, self.peer.label, rows, new)
        except PeerError as error:
            self.failed = str(error)
            self.runner.close()
            return None
        self.answers[question.key] = answer
        return answer


def check(answer: Answered, name: str, rows: int, new: int) -> None:
    """Refuse an answer to another prompt, or of another length.

    Raises:
        PeerError: saying what was expected.
    """
    if answer.prompt_tokens != rows:
        raise PeerError(
            f"{name}: its prompt had {answer.prompt_tokens} tokens, the others' has {rows}: "
            "what it measures is something else"
        )
    if len(answer.tokens) != new:
        raise PeerError(f"{name}: answered {len(answer.tokens)} tokens, expected {new}")


def row_of(
    stand: Stand,
    subject: PeerCheckpoint,
    asked: Sequence[PeerQuestion],
    rates: Rates,
    reference: Stand,
) -> dict[str, Any]:
    """One peer in numbers; a failed one with the reason, and what it answered before."""
    peer = stand.peer
    row: dict[str, Any] = {"key": peer.key, "label": peer.label, "plan": peer.plan}
    if stand.failed is not None:
        row["failed"] = stand.failed
    if stand.ready is None:
        return row
    precision = peer.precision or REPORTED.get(stand.ready.about["inference precision"])
    row |= {"precision": precision, **asdict(stand.ready)}
    counted = {key: one for key, one in stand.answers.items() if key[0]}
    if not counted:
        return row
    by_kind: dict[str, list[Answered]] = defaultdict(list)
    for (_, kind), one in counted.items():
        by_kind[kind].append(one)
    row |= {kind: spread([one.first_ms for one in heard]) for kind, heard in by_kind.items()}
    row["per_token"] = spread([one.per_token_ms for one in counted.values()])
    row["peak_mib"] = max(one.peak_mib for one in counted.values())
    wanted = {key: one for key, one in reference.answers.items() if key[0]}
    ends = eos_ids(text_facts(subject.checkpoint).generation)
    row["agreement"] = agreement(counted, wanted, ends)
    if precision is not None:
        row["floor"] = lower_bounds(peer, subject, asked, rates, precision)
    return row


def lower_bounds(
    peer: Peer, subject: PeerCheckpoint, asked: Sequence[PeerQuestion], rates: Rates, precision: str
) -> dict[str, float]:
    """Milliseconds that nothing of this plan and precision goes below here; means over prompts."""
    config = subject.checkpoint.config
    plan = resolve_plan(peer.plan, config.text.layers, config.visual_tokens)
    visual = [load.visual_tokens for load in plan_loads(plan)]
    begun, cached_layers = (0, plan.stages[0].depth) if peer.keeps else (None, None)
    found: dict[str, list[float]] = defaultdict(list)
    for question in asked:
        prefix, _, rest = (len(segment.ids) for segment in question.prompt.segments)
        cold = vision_work(config, COUNTS) + prefill_work(config.text, visual, prefix, rest, begun)
        second = (
            prefill_work(config.text, visual, prefix, rest, cached_layers) if peer.keeps else cold
        )
        work = cold if question.key[1] == "cold" else second
        found[question.key[1]].append(milliseconds(work, rates, precision))
        step = step_work(config.text, visual, prefix + rest)
        found["per_token"].append(milliseconds(step, rates, precision))
    return {kind: mean(values) for kind, values in found.items()}


def questions(
    subject: PeerCheckpoint, rounds: int
) -> Iterator[tuple[np.ndarray, list[PeerQuestion]]]:
    """A picture (H, W, 3) uint8 and two questions about it, ``rounds`` times, none twice."""
    encoder = PromptEncoder.from_files(subject.checkpoint.path)
    scenes = held_out(2 * rounds, SERIES, subject.side)
    for number in range(rounds):
        shown, other = next(scenes), next(scenes)
        texts = {"cold": shown.question, "second": other.question}
        if texts["cold"] == texts["second"]:
            texts["second"] += " Look again."
        asked = [
            PeerQuestion((number, kind), text, encoder.encode(text, images=1))
            for kind, text in texts.items()
        ]
        yield np.asarray(shown.image.convert("RGB")), asked


def chosen(peers: Iterable[Peer], only: Sequence[str]) -> list[Peer]:
    """Those named, and the reference.

    Raises:
        click.BadParameter: there is none of that name.
    """
    peers = list(peers)
    keys = [peer.key for peer in peers]
    for key in only:
        if key not in keys:
            raise click.BadParameter(f"no peer '{key}'. There are: {', '.join(keys)}")
    return [peer for peer in peers if not only or peer.key in (REFERENCE, *only)]


@click.command()
@click.option("--model", default="llava-45m", show_default=True, help="Or demo, llava-7b, ...")
@click.option("--rounds", type=click.IntRange(2), default=20, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--target", "targets", multiple=True, default=("cpu",), show_default=True)
@click.option("--only", multiple=True, help="Keys of peers; may be repeated.")
@click.option("--minutes", default=20.0, show_default=True, help="That each step of a setup takes.")
@dry_option
def main(model, rounds, tokens, threads, targets, only, minutes, dry) -> None:
    """Set up, ask in turns, record; every answer is a line of JSON on stdout."""
    subject = PeerCheckpoint.named(model, minutes)
    stands = [Stand(peer) for peer in chosen(all_peers(targets), only)]
    rates = measure_rates(threads)
    every = list(questions(subject, rounds + 1))  # the first round warms up
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for stand in stands:
            stand.start(subject, threads, stack)
            click.echo(f"{stand.peer.label}: {stand.failed or 'ready'}", err=True)
        for number, (picture, asked) in enumerate(every):
            file = scratch / f"{number}.npy"
            np.save(file, picture)
            turn = number % len(stands)
            for stand in [*stands[turn:], *stands[:turn]]:
                for question in asked:
                    rows = question.prompt.text_tokens + subject.checkpoint.config.visual_tokens
                    answer = stand.ask(file, question, rows, tokens)
                    if answer is not None:
                        facts = {"peer": stand.peer.key, "round": number, "kind": question.key[1]}
                        click.echo(json.dumps(facts | asdict(answer)))
    rates = rates.best(measure_rates(threads))
    counted = [question for _, asked in every[1:] for question in asked]
    reference = next(stand for stand in stands if stand.peer.key == REFERENCE)
    machine = {"key": "machine", "model": model, "rounds": rounds, "tokens": tokens}
    machine |= {"threads": threads, "rates": rates.to_dict()}
    machine["prompt_tokens"] = mean(
        question.prompt.text_tokens + subject.checkpoint.config.visual_tokens
        for question in counted
    )
    table = [row_of(stand, subject, counted, rates, reference) for stand in stands]
    save(f"peers-{model}", [machine, *table], dry=dry)


if __name__ == "__main__":
    main()
