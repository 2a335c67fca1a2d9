"""The rungs of whole answers: real prompts through the torch chain and through the public runtime.

Teacher-forced: both are given the torch chain's tokens, so one early difference hides no later
one. Free-running: each goes on with its own tokens, as a user would see it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..calib.samples import Sample
from ..graphs.bundle import Bundle
from ..graphs.chain import Span, TorchExecutor, load_weights, segments
from ..graphs.contract import INVISIBLE
from ..graphs.ops import Eager
from ..graphs.plan import StagePlan
from ..graphs.precision import NARROW
from ..graphs.rows import Chain, Kept, Segment
from ..graphs.vision import Vision
from .choices import Choice, Grounds, Reading, gap, lead
from .compare import TOLERANCE, WHOLE_TOLERANCE, first_wrong, tensor_error
from .modules import stored_tensor
from .report import Finding, TensorError
from .steps import require_memory
from .stored_graph import StoredGraph

if TYPE_CHECKING:
    from ..runtime import Session

EMBEDDING = "model.embed_tokens.weight"

TIE = TOLERANCE["fp16"]
"""Scores of visual tokens this close, relative to the spread of all, may change places in FP16."""


@dataclass(frozen=True)
class Trajectory:
    """A greedy answer: logits (T, V) float32, their likeliest tokens (T,), what the plan chose for
    the prompt, and on what grounds.
    """

    logits: np.ndarray
    tokens: tuple[int, ...]
    choice: Choice
    grounds: Grounds


@dataclass(frozen=True)
class Asked:
    """A sample as both sides take it: pixels (1, C, H, W), and ids with None for the picture."""

    sample: Sample
    opened: Any
    pixels: Tensor
    parts: tuple[tuple[int, ...] | None, ...]


def ask(session: Session, samples: Sequence[Sample]) -> list[Asked]:
    """Preprocess and tokenise with the bundle's own files."""
    asked = []
    for sample in samples:
        opened = session.open(sample.image)
        encoded = session.encoder.encode(sample.prompt, images=1).segments
        parts = tuple(None if part.is_image else part.ids for part in encoded)
        asked.append(Asked(sample, opened, torch.from_numpy(opened.pixels[None]), parts))
    return asked


class Guided(TorchExecutor):
    """Remembers the grounds of the plan's choice; a ``guide`` is chosen instead."""

    def __init__(self, text, plan, weights, batch, widening, guide: Choice | None):
        super().__init__(text, plan, weights, batch, widening)
        self.rule, self.guide = plan.probe, guide
        self.scores: Mapping[int, float] = {}
        self.readings: dict[int, Reading] = {}

    def select(
        self, edge, probe_query, slot_order, query_order, visual_slots, rows, positions, order
    ) -> Kept:
        """As its base, but for ``guide`` where all of it is on offer."""
        given = (probe_query, slot_order, query_order, visual_slots, rows, positions, order)
        kept = super().select(edge, *given)
        offered = [int(at) for at in order[0]]
        self.scores = dict(zip(offered, map(float, kept.scores[0]), strict=True))
        if self.guide is None or not set(self.guide.kept or ()) <= set(offered):
            return kept
        at = [offered.index(position) for position in self.guide.kept or ()]
        return Kept(rows[:, at], positions[:, at], order[:, at], kept.scores)

    def probe(self, stage, layer, query, slot_order, query_order, visual_slots):
        """As its base, but for readings that lead to ``guide``."""
        given = (query, slot_order, query_order, visual_slots)
        cosines, norms = super().probe(stage, layer, *given)
        positions = slot_order[0, visual_slots[0]]
        seen = [(int(at), i) for i, at in enumerate(positions) if at != INVISIBLE]
        self.readings[layer] = Reading(
            {at: float(cosines[0, i]) for at, i in seen}, {at: float(norms[0, i]) for at, i in seen}
        )
        if self.guide is None:
            return cosines, norms
        return lead(self.rule, self.guide, layer, positions, cosines, norms)


class TorchChain:
    """The torch stages over the weights that the bundle's graph files hold.

    ``half``: FP16 arithmetic with what the manifest widens; otherwise FP32.
    """

    def __init__(self, bundle: Bundle, *, half: bool, free: int):
        manifest = bundle.manifest
        self.config, self.plan = manifest.config, manifest.plan
        self.widening = manifest.widening if half else NARROW
        stored = [StoredGraph(bundle, name) for name in manifest.graphs]
        arrays = {name: array for graph in stored for name, array in graph.weights.items()}
        itemsize = 2 if half else 4
        needed = sum(array.size for array in arrays.values()) * itemsize
        require_memory(f"the whole model in {'FP16' if half else 'FP32'}", needed, free)
        dtype = torch.float16 if half else torch.float32
        self.weights = {
            name: torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
            for name, array in arrays.items()
        }
        table = stored_tensor(bundle, bundle.manifest.embedding)
        if manifest.precision == "fp16":
            table = table.half()  # what the runtime rounds rows to
        self.weights[EMBEDDING] = table.to(dtype)

    @torch.no_grad()
    def answer(self, asked: Asked, steps: int, *, plan: StagePlan | None = None) -> Trajectory:
        """Greedy tokens after a prompt, their end ignored; ``plan`` instead of the bundle's."""
        return self._run(asked, steps, plan or self.plan, None, None)

    @torch.no_grad()
    def follow(
        self, asked: Asked, tokens: Sequence[int], choice: Choice | None = None
    ) -> Trajectory:
        """The same along given tokens: each logits row is what it would have said there.

        ``choice``: what the plan shall choose, instead of its own.
        """
        return self._run(asked, len(tokens), self.plan, tokens, choice)

    def _run(
        self,
        asked: Asked,
        steps: int,
        plan: StagePlan,
        forced: Sequence[int] | None,
        guide: Choice | None,
    ) -> Trajectory:
        executor = Guided(self.config.text, plan, self.weights, 1, self.widening, guide)
        chain = Chain(plan, executor, 1)
        embeds, spans = self._embed(asked, executor)
        done = chain.prefill(segments(embeds, [spans]))
        logits, tokens = [], []
        last = done.logits
        for step in range(steps):
            logits.append(last[0].float().numpy())
            tokens.append(int(last[0].argmax()))
            if step + 1 < steps:
                given = tokens[-1] if forced is None else forced[step]
                at = np.full((1, 1), embeds.shape[1] + step, np.int32)
                row = executor.embed(torch.tensor([[given]]))
                last = chain.decode(Segment(False, row, at, at))
        kept = None
        if done.kept:  # a plan that decides per prompt may pad what it keeps
            kept = tuple(int(at) for at in done.kept[-1].order[0] if at != INVISIBLE)
        decision = done.decision
        choice = Choice(kept) if decision is None else Choice(kept, decision.trigger, decision.exit)
        grounds = Grounds(executor.scores, plan.probe, executor.readings)
        return Trajectory(np.stack(logits), tuple(tokens), choice, grounds)

    def _embed(self, asked: Asked, executor: TorchExecutor) -> tuple[Tensor, list[Span]]:
        """Rows (1, S, D) of the whole prompt, and where its visual rows stand."""
        rows: list[Tensor] = []
        spans: list[Span] = []
        for part in asked.parts:
            start = sum(one.shape[1] for one in rows)
            if part is None:
                rows.append(self._tower(asked.pixels))
                spans.append((start, start + self.config.visual_tokens))
            else:
                rows.append(executor.embed(torch.tensor([part])))
        return torch.cat(rows, 1), spans

    @cached_property
    def _tower(self) -> Vision:
        return load_weights(Vision(self.config, Eager(), self.widening), self.weights)


def compare_runtime(
    bundle: Bundle, reference: TorchChain, session: Session, asked: Sequence[Asked], steps: int
) -> Finding:
    """The runtime on ONNX Runtime against the torch chain in FP32."""
    precision = bundle.manifest.precision
    # A checkpoint's own settings may draw at random, or punish repetition.
    greedy = replace(session.sampling, temperature=0.0, repetition_penalty=1.0)
    tally = Tally(precision)
    for one in asked:
        want = reference.answer(one, steps)
        logits = session.score(one.opened, one.sample.prompt, want.tokens[:-1])
        answer = session.infer(one.opened, one.sample.prompt, max_tokens=steps, sampling=greedy)
        guided = partial(reference.follow, one, want.tokens)
        called = answer.plan.called
        choice = Choice(answer.plan.kept)
        if called is not None:
            choice = Choice(answer.plan.kept, called.trigger, called.exit)
        tally.add(one.sample.name, want, logits, choice, answer.tokens, guided)
    files = tuple(fact.file for fact in bundle.manifest.graphs.values())
    return tally.finding(files)


def compare_half(
    bundle: Bundle, reference: TorchChain, half: TorchChain, asked: Sequence[Asked], steps: int
) -> Finding:
    """The torch chain in FP16 arithmetic against the one in FP32, with and without a teacher."""
    tally = Tally("fp16")
    for one in asked:
        want = reference.answer(one, steps)
        got = half.follow(one, want.tokens)
        free = half.answer(one, steps)
        guided = partial(reference.follow, one, want.tokens)
        tally.add(one.sample.name, want, got.logits, got.choice, free.tokens, guided)
    files = tuple(fact.file for fact in bundle.manifest.graphs.values())
    return tally.finding(files)


class Tally:
    """Counts agreement over prompts, and says what the first unexplained difference is.

    In FP32 tokens and choices are equal. In FP16 they may differ as near ties do: a token where
    the logits are within the tolerance, a visual token where another scores as much within ``TIE``,
    a probe that reads a threshold within it; then the logits are compared with those that the
    reference has for the same choice.
    """

    def __init__(self, precision: str):
        self.exact, self.tolerance = precision == "fp32", WHOLE_TOLERANCE[precision]
        self.failure = ""
        self.errors: list[TensorError] = []
        self.places = self.agreed = self.equal = self.reselected = 0
        self.divergences: dict[str, int] = {}

    def add(
        self,
        name: str,
        want: Trajectory,
        logits: np.ndarray,
        choice: Choice,
        free: tuple[int, ...],
        guided: Callable[[Choice], Trajectory],
    ) -> None:
        """Note a prompt.

        Args:
            name: of the prompt.
            want: the reference's own answer.
            logits: along its tokens.
            choice: what the plan chose.
            free: tokens without a teacher.
            guided: the reference along the same tokens, its choice given.
        """
        said = logits.argmax(-1)
        apart = [at for at, token in enumerate(want.tokens) if said[at] != token]
        self.places += len(want.tokens)
        self.agreed += len(want.tokens) - len(apart)
        first = next((at for at, token in enumerate(free) if token != want.tokens[at]), None)
        if first is None:
            self.equal += 1
        else:
            self.divergences[name] = first
        failure, reference = "", want.logits
        if choice != want.choice:
            self.reselected += 1
            apart_by = gap(want.grounds, want.choice, choice)
            if self.exact or apart_by > TIE:
                failure = f"{name}: {_difference(want.choice, choice)}, {apart_by:.2g} from a tie"
            else:
                reference = guided(choice).logits
        errors = [
            tensor_error(f"{name}: logits of the {where}", logits[steps], reference[steps])
            for where, steps in (("prompt", slice(1)), ("answer", slice(1, len(said))))
            if len(said[steps])
        ]
        self.errors += errors
        failure = failure or first_wrong(errors, self.tolerance)
        if apart and self.exact:
            failure = failure or f"{name}: token {apart[0]} of the teacher-forced answer differs"
        if first is not None and first not in apart:
            failure = failure or (
                f"{name}: the free-running answer differs at token {first}, where the "
                "teacher-forced one does not"
            )
        self.failure = self.failure or failure

    def finding(self, files: tuple[str, ...]) -> Finding:
        """All of it."""
        return Finding(
            self.failure,
            files,
            tuple(self.errors),
            {
                "teacher-forced": f"{self.agreed} of {self.places} tokens agree",
                "free-running": f"{self.equal} of {self.equal + len(self.divergences)} answers "
                "are equal to their end",
                "first divergence, by prompt": self.divergences,
                "prompts whose kept visual tokens differ": self.reselected,
            },
        )


def _difference(want: Choice, got: Choice) -> str:
    if want.trigger != got.trigger:
        return f"layer {got.trigger} called for a selection, expected {want.trigger}"
    if want.kept != got.kept:
        return "other visual tokens were kept"
    return f"vision left after layer {got.exit}, expected {want.exit}"
