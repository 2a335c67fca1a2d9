"""Questions to one bundle or several, in turns: what each took, and in which of its parts.

Every repetition brings new pixels and a new question (cold), then a second question on the same
picture (again). Bundles take turns within a repetition, in alternating order, so that whatever else
the machine does falls on all of them alike. The first repetitions warm up and count nowhere.

Answers do not end by themselves here: all have the same number of tokens, else a model that says
less would look faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...graphs.errors import PromptError
from ...graphs.plan.call_cost import GraphCall
from .call_timer import TimedCall, observe_calls
from .fresh_prompts import ProfilePrompt, prompts
from .spread import Spread

if TYPE_CHECKING:
    from ...runtime.session import Session

FIRST_TOKEN = "first_token"
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    repetitions: that count; warm_up: that do not; tokens: of every answer, at least 2.
    """

    repetitions: int = 20
    warm_up: int = 3
    tokens: int = 32


@dataclass(frozen=True)
class TimedAnswer:
    """One answer. Times in ms; ``graphs`` up to the first token, ``steps`` by graph per token.

    later: tokens after the first; start, stop: seconds of ``time.perf_counter``, from the call to
    the last token.
    """

    later: int
    preprocess: float
    graphs: dict[str, float]
    first_token: float
    per_token: float
    steps: dict[str, float]
    total: float
    start: float
    stop: float
    events: tuple[TimedCall, ...]

    @property
    def host(self) -> float:
        """Milliseconds until the first token that no graph and no preprocessing accounts for."""
        return self.first_token - self.preprocess - sum(self.graphs.values())

    @property
    def step_host(self) -> float:
        """The same of one later token."""
        return self.per_token - sum(self.steps.values())


@dataclass
class TimedSeries:
    """The questions that one bundle answered: on new pictures, and again on the same ones."""

    cold: list[TimedAnswer] = field(default_factory=list)
    again: list[TimedAnswer] = field(default_factory=list)

    def spreads(self) -> dict[str, dict[str, Spread]]:
        """Every quantity of both kinds of question, in the order in which a prompt meets them."""
        return {"cold": _spreads(self.cold), "again": _spreads(self.again)}

    def calls(self) -> tuple[list[GraphCall], list[GraphCall], list[GraphCall]]:
        """Calls of a cold question until its first token, of a second one, and of one later token.

        Of the last repetition; a plan that decides per prompt may have made others before.
        """
        cold, again = self.cold[-1], self.again[-1]
        first = until_first_token(cold)
        last = [event.call for event in cold.events[-_step_length(cold) :]]
        return [e.call for e in first], [e.call for e in until_first_token(again)], last


def measure_bundles(
    sessions: Mapping[str, Session], settings: Settings, progress: Progress = lambda n: None
) -> dict[str, TimedSeries]:
    """Ask every session the same; returns their series by name.

    Raises:
        VisistageError: whatever a session refuses, such as more tokens than its context has.
    """
    series = {name: TimedSeries() for name in sessions}
    source = prompts()
    order = list(sessions)
    with _endless(sessions.values()):
        for round_ in range(settings.warm_up + settings.repetitions):
            prompt = next(source)
            for name in order if round_ % 2 else reversed(order):
                cold, again = time_questions(sessions[name], prompt, settings.tokens)
                if round_ >= settings.warm_up:
                    series[name].cold.append(cold)
                    series[name].again.append(again)
            progress(1)
    return series


def time_questions(
    session: Session, prompt: ProfilePrompt, tokens: int
) -> tuple[TimedAnswer, TimedAnswer]:
    """Both questions of one prompt."""
    cold = _question(session, prompt.image, prompt.first, tokens)
    image = prompt.image
    return cold, _question(session, image, prompt.second, tokens)


def _question(session: Session, image: bytes, text: str, tokens: int) -> TimedAnswer:
    with observe_calls(session.executor) as events:
        start = time.perf_counter()
        answer = session.infer(image, text, max_tokens=tokens)
        stop = time.perf_counter()
    steps = session.executor.reset_elapsed()
    timings, later = answer.timings, len(answer.tokens) - 1
    if timings.per_token_ms is None:
        raise PromptError(
            f"{session.bundle.path} ended its answer ({answer.text!r}) after one token by a stop "
            "string, so later tokens cannot be timed. Remove it from the checkpoint's "
            "generation_config.json and build again: make engines MODEL=..."
        )
    return TimedAnswer(
        later=later,
        preprocess=timings.preprocess_ms,
        graphs=timings.graphs_ms,
        first_token=timings.first_token_ms,
        per_token=timings.per_token_ms,
        steps={name: ms / later for name, ms in steps.items()},
        total=timings.total_ms,
        start=start,
        stop=stop,
        events=tuple(events),
    )


class _endless:
    """Sessions whose answers end by their length alone, for the time of a block."""

    def __init__(self, sessions: Any):
        self.sessions = list(sessions)

    def __enter__(self) -> None:
        self.ends = [session.eos for session in self.sessions]
        for session in self.sessions:
            session.eos = frozenset()

    def __exit__(self, *_) -> None:
        for session, eos in zip(self.sessions, self.ends, strict=True):
            session.eos = eos


def until_first_token(question: TimedAnswer) -> list[TimedCall]:
    """The events of a question's prefill: all but those of its later tokens."""
    return list(question.events[: len(question.events) - question.later * _step_length(question)])


def _step_length(question: TimedAnswer) -> int:
    """Calls of one later token: one of every stage."""
    return len(question.steps)


def _spreads(questions: Sequence[TimedAnswer]) -> dict[str, Spread]:
    """Of every quantity; a graph that a prompt did not need took no time."""
    graphs = list(dict.fromkeys(name for one in questions for name in one.graphs))
    steps = list(dict.fromkeys(name for one in questions for name in one.steps))
    columns: dict[str, list[float]] = {"preprocess": [q.preprocess for q in questions]}
    columns |= {name: [q.graphs.get(name, 0.0) for q in questions] for name in graphs}
    columns["host"] = [q.host for q in questions]
    columns[FIRST_TOKEN] = [q.first_token for q in questions]
    columns["per_token"] = [q.per_token for q in questions]
    columns |= {f"step.{name}": [q.steps.get(name, 0.0) for q in questions] for name in steps}
    columns["step.host"] = [q.step_host for q in questions]
    columns["total"] = [q.total for q in questions]
    return {name: Spread.of(values) for name, values in columns.items()}
