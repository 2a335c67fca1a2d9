"""visistage beside other libraries: one checkpoint, the same images and questions, in turns.

    python -m visistage.bench.peers [--model llava-45m] [--rounds 20]

Every round shows each peer a new image with a new question (cold), then asks another question about
the same image (second), which those that keep images answer from what they kept. Peers alternate,
so that whatever else the machine does affects all alike, and start in another order each round.
Each has a process and an environment of its own; a peer that cannot be set up or stops answering is
in the record with the reason. Prompts have the same tokens for all, or the peer fails. Answers are
greedy and continue past their end, so that all are of one length.

With ``--apart`` a peer is loaded for its turns alone, one after the other: for models of which
memory holds one. It first answers a question that is not counted.

Images have the size that the vision encoder takes, so that no resampling decides. Beside every
figure is its lower bound (``lower_bound.py``), by rates measured before and after, in the same run.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import numpy as np

from ..compile.export.texts import text_facts
from ..compile.planfile import resolve_plan
from ..graphs.errors import VisistageError
from ..graphs.parts import VISION
from ..graphs.plan.call_cost import COUNTS, GraphCall, total_work, work_of
from ..graphs.plan.cost import plan_loads
from ..graphs.vision_config import PATCHES
from ..runtime.text.prompt import Prompt, PromptEncoder
from ..runtime.text.sampling import eos_ids
from .environments import ROOT, interpreter
from .lower_bound import Rates, measure_rates, milliseconds, prefill_layers, step_work
from .peer_models import REFERENCE, REPORTED, Peer, PeerCheckpoint, all_peers
from .record import dry_option, save, spread
from .runner import RUNNERS, Answered, PeerError, Ready, Runner

SERIES = 2000
"""Held-out scenes that neither evaluations nor calibrations use."""

LOAD_SECONDS = 600
ANSWER_SECONDS = 300
"""A peer that takes longer to answer is left out."""


@dataclass(frozen=True)
class PeerQuestion:
    """A question about an image, and its prompt; ``key`` is (round, cold or second)."""

    key: tuple[int, str]
    text: str
    prompt: Prompt


class PeerRun:
    """A peer during a run: its process, its answers, or the reason for having none."""

    def __init__(self, peer: Peer):
        self.peer = peer
        self.answers: dict[tuple[int, str], Answered] = {}
        self.failed: str | None = None
        self.ready: Ready | None = None
        self.loads_ms: list[float] = []
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
            self.loads_ms.append(self.ready.load_ms)
        except VisistageError as error:
            self.failed = str(error)

    def ask(
        self,
        image: Path,
        question: PeerQuestion,
        rows: int,
        new: int,
        patience: float = ANSWER_SECONDS,
    ) -> Answered | None:
        """Return an answer of ``new`` tokens to a prompt of ``rows``; None after a failure."""
        if self.failed is not None:
            return None
        assert self.runner is not None
        request = {
            "image": str(image),
            "question": question.text,
            "text": question.prompt.text,
            "new": new,
        }
        try:
            answer = self.runner.ask(request, patience)
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
    run: PeerRun,
    subject: PeerCheckpoint,
    asked: Sequence[PeerQuestion],
    rates: Rates,
    reference: PeerRun | None,
) -> dict[str, Any]:
    """Return the figures of a peer; a failed one with the reason, and what it answered before.

    Without a reference it is not said how often answers agree with it.
    """
    peer = run.peer
    row: dict[str, Any] = {"key": peer.key, "label": peer.label, "plan": peer.plan}
    if run.failed is not None:
        row["failed"] = run.failed
    if run.ready is None:
        return row
    precision = peer.precision or REPORTED.get(run.ready.about["inference precision"])
    row |= {
        "precision": precision,
        **asdict(run.ready),
        "load_ms": median(run.loads_ms or [run.ready.load_ms]),
    }
    counted = {key: answer for key, answer in run.answers.items() if key[0]}
    if not counted:
        return row
    by_kind: dict[str, list[Answered]] = defaultdict(list)
    for (_, kind), answer in counted.items():
        by_kind[kind].append(answer)
    row |= {kind: spread([answer.first_ms for answer in own]) for kind, own in by_kind.items()}
    row["per_token"] = spread([answer.per_token_ms for answer in counted.values()])
    row["peak_mib"] = max(answer.peak_mib for answer in counted.values())
    if reference is not None:
        wanted = {key: answer for key, answer in reference.answers.items() if key[0]}
        ends = eos_ids(text_facts(subject.checkpoint).generation)
        row["agreement"] = agreement(counted, wanted, ends)
    if precision is not None:
        row["floor"] = lower_bounds(peer, subject, asked, rates, precision)
    return row


def agreement(
    answers: dict[tuple[int, str], Answered],
    wanted: dict[tuple[int, str], Answered],
    ends: Collection[int] = (),
) -> dict[str, float] | None:
    """Return how long answers begin as the reference's do, and the share of equal ones.

    Once a token differs the rest answers another beginning, so only what precedes it counts; nor
    does what the reference says past its end, one of the ids ``ends``.
    """
    both = [key for key in answers if key in wanted]
    if not both:
        return None
    shares = []
    for key in both:
        tokens = wanted[key].tokens
        end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        shares.append(leading(answers[key].tokens[: end + 1], tokens[: end + 1]))
    return {
        "leading": mean(shares),
        "equal": mean(share == 1 for share in shares),
        "answers": len(both),
    }


def leading(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the share of tokens before the first that differs."""
    differs = (at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return next(differs, len(one)) / len(one)


def lower_bounds(
    peer: Peer, subject: PeerCheckpoint, asked: Sequence[PeerQuestion], rates: Rates, precision: str
) -> dict[str, float]:
    """Return the least milliseconds of this plan and precision here; means over prompts."""
    config = subject.checkpoint.config
    plan = resolve_plan(peer.plan, config.text.layers, config.visual_tokens)
    visual = [load.visual_tokens for load in plan_loads(plan)]
    blind = plan.stages[plan.blind_stages - 1].layers[1]  # where questions begin to decide
    begun, cached_layers = (0, blind) if peer.keeps else (None, None)
    found: dict[str, list[float]] = defaultdict(list)
    for question in asked:
        kind = question.key[1]
        prefix, _, rest = (len(segment.ids) for segment in question.prompt.segments)
        paid = peer.keeps and kind == "second"
        works = prefill_layers(config.text, visual, prefix, rest, cached_layers if paid else begun)
        if not paid:
            works.append(work_of(GraphCall(VISION, 0, 0), config, plan, COUNTS))
        found[kind].append(milliseconds(total_work(works), rates, precision))
        step = step_work(config.text, visual, prefix + rest)
        found["per_token"].append(milliseconds(step, rates, peer.decode or precision))
    return {kind: mean(values) for kind, values in found.items()}


@dataclass(frozen=True)
class Asking:
    """Rounds of questions: an image (H, W, 3) and two questions of each, the first to warm up."""

    subject: PeerCheckpoint
    threads: int
    tokens: int
    patience: float
    scratch: Path
    rounds: Sequence[tuple[np.ndarray, Sequence[PeerQuestion]]]

    def together(self, runs: Sequence[PeerRun]) -> None:
        """Load every peer, then ask them in turns."""
        with ExitStack() as stack:
            for run in runs:
                self._start(run, stack)
            for number in range(len(self.rounds)):
                for run in turned(runs, number):
                    self._ask(run, number, self.rounds[number][1])

    def apart(self, runs: Sequence[PeerRun]) -> None:
        """Load, warm up, ask and end one peer after the other, each round anew."""
        for number in range(1, len(self.rounds)):
            for run in turned(runs, number):
                with ExitStack() as stack:
                    self._start(run, stack)
                    self._ask(run, 0, self.rounds[0][1][:1])
                    self._ask(run, number, self.rounds[number][1])

    def _start(self, run: PeerRun, stack: ExitStack) -> None:
        if run.failed is None:
            run.start(self.subject, self.threads, stack)
        click.echo(f"{run.peer.label}: {run.failed or 'ready'}", err=True)

    def _ask(self, run: PeerRun, number: int, asked: Sequence[PeerQuestion]) -> None:
        file = self.scratch / f"{number}.npy"
        np.save(file, self.rounds[number][0])
        visual = run.peer.told or self.subject.checkpoint.config.visual_tokens
        for question in asked:
            rows = question.prompt.text_tokens + visual
            answer = run.ask(file, question, rows, self.tokens, self.patience)
            if answer is not None:
                facts = {"peer": run.peer.key, "round": number, "kind": question.key[1]}
                click.echo(json.dumps(facts | asdict(answer)))


def turned(runs: Sequence[PeerRun], number: int) -> list[PeerRun]:
    """Return the peers in a round's order: another one begins each time."""
    turn = number % len(runs)
    return [*runs[turn:], *runs[:turn]]


def questions(
    subject: PeerCheckpoint, rounds: int
) -> Iterator[tuple[np.ndarray, list[PeerQuestion]]]:
    """Yield an image (H, W, 3) uint8 and two questions about it, ``rounds`` times, none twice."""
    encoder = PromptEncoder.from_files(subject.checkpoint.path)
    scenes = subject.scenes(2 * rounds, SERIES)
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


def chosen(peers: Iterable[Peer], only: Sequence[str], *, apart: bool = False) -> list[Peer]:
    """Return those named, and the reference, which runs ``apart`` only where it is named.

    Raises:
        click.BadParameter: there is none of that name.
    """
    peers = list(peers)
    keys = [peer.key for peer in peers]
    for key in only:
        if key not in keys:
            raise click.BadParameter(f"no peer '{key}'. There are: {', '.join(keys)}")
    always = () if apart else (REFERENCE,)
    return [peer for peer in peers if not only or peer.key in (*always, *only)]


@click.command()
@click.option("--model", default="llava-45m", show_default=True, help="Or demo, llava-7b, ...")
@click.option("--rounds", type=click.IntRange(2), default=20, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--target", "targets", multiple=True, default=("cpu",), show_default=True)
@click.option("--blocks", is_flag=True, help="Weights in blocks of 8 and 4 bits, too.")
@click.option("--apart", is_flag=True, help="Load a peer for its turns alone.")
@click.option("--only", multiple=True, help="Keys of peers; may be repeated.")
@click.option(
    "--patience", default=ANSWER_SECONDS, show_default=True, help="Seconds that an answer may take."
)
@click.option("--minutes", default=20.0, show_default=True, help="That each step of a setup takes.")
@dry_option
def main(
    model, rounds, tokens, threads, targets, blocks, apart, only, patience, minutes, dry
) -> None:
    """Set up, ask in turns, record; every answer is a line of JSON on stdout."""
    subject = PeerCheckpoint.named(model, minutes)
    config = subject.checkpoint.config
    bare = config.vision.kind == PATCHES
    peers = all_peers(targets, config.visual_tokens, bare=bare, blocks=blocks)
    runs = [PeerRun(peer) for peer in chosen(peers, only, apart=apart)]
    rates = measure_rates(threads)
    every = list(questions(subject, rounds + 1))  # the first round warms up
    with tempfile.TemporaryDirectory() as scratch:
        asking = Asking(subject, threads, tokens, patience, Path(scratch), every)
        (asking.apart if apart else asking.together)(runs)
    rates = rates.best(measure_rates(threads))
    counted = [question for _, asked in every[1:] for question in asked]
    reference = next((run for run in runs if run.peer.key == REFERENCE), None)
    machine = {"key": "machine", "model": model, "rounds": rounds, "tokens": tokens}
    machine |= {"threads": threads, "rates": rates.to_dict()}
    machine["prompt_tokens"] = mean(
        question.prompt.text_tokens + config.visual_tokens for question in counted
    )
    table = [row_of(run, subject, counted, rates, reference) for run in runs]
    save(f"peers-{model}", [machine, *table], dry=dry)


if __name__ == "__main__":
    main()
