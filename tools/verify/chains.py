"""The rungs of whole answers: real prompts through the torch chain and through the public runtime.

Teacher-forced: both are given the torch chain's tokens, so one early difference hides no later
one. Free-running: each goes on with its own tokens, as a user would see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...calib.samples import Sample
from ...compile.checkpoint.checkpoint import Checkpoint
from ...graphs.bundle import Bundle, Manifest
from ...graphs.chain.chain import AppendedRows, Chain
from ...graphs.chain.executor import Kept
from ...graphs.chain.torch_reference import Span, TorchExecutor, load_weights, segments
from ...graphs.contract import INVISIBLE
from ...graphs.linears import linear_groups
from ...graphs.modules.ops import Eager
from ...graphs.modules.quantized import INPUT_SCALE, WEIGHT
from ...graphs.modules.vision import Vision
from ...graphs.plan.plan import StagePlan
from ...graphs.precision import NO_FALLBACK
from .check_steps import require_memory
from .compare import Bounds
from .module_checks import STORED_TORCH_DTYPES, quantise_module, stored_tensor
from .stored_graph import all_weights, graph_files
from .tally import Tally, Trajectory
from .token_choices import ProbeReading, Selection, SelectionMargins, forced_readings
from .verify_report import CheckResult

if TYPE_CHECKING:
    from ...runtime import Session

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Asked:
    """A sample as both sides take it: pixels (1, C, H, W), and ids with None for the picture."""

    sample: Sample
    opened: Any
    pixels: Tensor
    parts: tuple[tuple[int, ...] | None, ...]


def prepare_prompts(session: Session, samples: Sequence[Sample]) -> list[Asked]:
    """Preprocess and tokenise with the bundle's own files."""
    asked = []
    for sample in samples:
        opened = session.open(sample.image)
        encoded = session.encoder.encode(sample.prompt, images=1).segments
        parts = tuple(None if part.is_image else part.ids for part in encoded)
        asked.append(Asked(sample, opened, torch.from_numpy(opened.pixels[None]), parts))
    return asked


class ForcedSelectionExecutor(TorchExecutor):
    """Remembers the grounds of the plan's choice; a ``forced_selection`` is chosen instead."""

    def __init__(
        self, text, plan, weights, batch, fallback, prepare, forced_selection: Selection | None
    ):
        super().__init__(text, plan, weights, batch, fallback, prepare)
        self.rule, self.forced_selection = plan.probe, forced_selection
        self.scores: Mapping[int, float] = {}
        self.readings: dict[int, ProbeReading] = {}

    def select(
        self, edge, probe_query, slot_order, query_order, visual_slots, rows, positions, order
    ) -> Kept:
        """As its base, but for ``forced_selection`` where all of it is on offer."""
        given = (probe_query, slot_order, query_order, visual_slots, rows, positions, order)
        kept = super().select(edge, *given)
        offered = [int(at) for at in order[0]]
        self.scores = dict(zip(offered, map(float, kept.scores[0]), strict=True))
        if self.forced_selection is None or not set(self.forced_selection.kept or ()) <= set(
            offered
        ):
            return kept
        at = [offered.index(position) for position in self.forced_selection.kept or ()]
        return Kept(rows[:, at], positions[:, at], order[:, at], kept.scores)

    def probe(self, stage, layer, query, slot_order, query_order, visual_slots):
        """As its base, but for readings that lead to ``forced_selection``."""
        given = (query, slot_order, query_order, visual_slots)
        cosines, norms = super().probe(stage, layer, *given)
        positions = slot_order[0, visual_slots[0]]
        seen = [(int(at), i) for i, at in enumerate(positions) if at != INVISIBLE]
        self.readings[layer] = ProbeReading(
            {at: float(cosines[0, i]) for at, i in seen}, {at: float(norms[0, i]) for at, i in seen}
        )
        if self.forced_selection is None:
            return cosines, norms
        return forced_readings(self.rule, self.forced_selection, layer, positions, cosines, norms)


class TorchChain:
    """The torch stages over given weights, by the names that a bundle's graphs have for them.

    ``half``: FP16 arithmetic with what the manifest widens; otherwise FP32. ``quantised``: layers
    read integers where they do so in the graphs. ``prefix``: keys and values (layers, G, P, d) of
    the manifest's prefix; None: its rows are computed like all others.
    """

    def __init__(
        self,
        manifest: Manifest,
        weights: dict[str, Tensor],
        *,
        half: bool,
        quantised: bool,
        prefix: tuple[Tensor, Tensor] | None = None,
    ):
        self.ids = manifest.prefix.ids if manifest.prefix and prefix else ()
        self.prefix = prefix
        self.config, self.plan = manifest.config, manifest.plan
        self.weights = weights
        self.fallback = manifest.fallback if half else NO_FALLBACK
        self.prepare: Callable[[nn.Module], None] = lambda module: None
        if quantised:
            self.prepare = partial(quantise_module, manifest=manifest)

    @classmethod
    def stored(cls, bundle: Bundle, *, half: bool, free: int) -> TorchChain:
        """Over the weights that the bundle's graph files hold.

        Raises:
            ImpossibleError: more than ``free`` bytes.
        """
        manifest = bundle.manifest
        stored = all_weights(bundle)
        dtype = torch.float16 if half else torch.float32
        needed = sum(
            stored.size(name) * (1 if is_quantised(name) else dtype.itemsize) for name in stored
        )
        require_memory(f"the whole model in {'FP16' if half else 'FP32'}", needed, free)
        weights = {}
        for name, array in stored.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            weights[name] = tensor if is_quantised(name) else tensor.to(dtype)
        for group in linear_groups(manifest.config):  # engines' layers share the first one's scale
            scales = [f"{linear}.{INPUT_SCALE}" for linear in group.linears]
            shared = [weights[name] for name in scales if name in weights]
            for name in scales:
                if shared and name not in weights:
                    weights[name] = shared[0]
        weights[EMBEDDING] = _rounded(stored_tensor(bundle, manifest.embedding), manifest, dtype)
        prefix = None
        if manifest.quantization.quantises and manifest.prefix:
            # Shipped as computed from float weights: rounded ones would make another.
            refs = (manifest.prefix.keys, manifest.prefix.values)
            keys, values = (stored_tensor(bundle, ref) for ref in refs)
            if not manifest.quantization.quantises_cache:
                keys, values = keys.to(dtype), values.to(dtype)
            prefix = keys, values
        return cls(manifest, weights, half=half, quantised=True, prefix=prefix)

    @classmethod
    def original(cls, bundle: Bundle, checkpoint: Checkpoint, *, free: int) -> TorchChain:
        """Over the checkpoint's own weights in FP32, none of them an integer.

        They are rounded to the type of the bundle's floats.

        Raises:
            ImpossibleError: more than ``free`` bytes.
        """
        sizes = {name: math.prod(info.shape) for name, info in checkpoint.tensors.items()}
        require_memory("the whole checkpoint in FP32", 4 * sum(sizes.values()), free)
        weights = {}
        for name in sizes:
            weights[name] = _rounded(checkpoint.load(name), bundle.manifest, torch.float32)
            checkpoint.release()
        return cls(bundle.manifest, weights, half=False, quantised=False)

    @torch.no_grad()
    def answer(self, asked: Asked, steps: int, *, plan: StagePlan | None = None) -> Trajectory:
        """Greedy tokens after a prompt, their end ignored; ``plan`` instead of the bundle's."""
        return self._run(asked, steps, plan or self.plan, None, None)

    @torch.no_grad()
    def follow(
        self, asked: Asked, tokens: Sequence[int], selection: Selection | None = None
    ) -> Trajectory:
        """The same along given tokens: each logits row is what it would have said there.

        ``selection``: what the plan shall choose, instead of its own.
        """
        return self._run(asked, len(tokens), self.plan, tokens, selection)

    def _run(
        self,
        asked: Asked,
        steps: int,
        plan: StagePlan,
        forced: Sequence[int] | None,
        forced_selection: Selection | None,
    ) -> Trajectory:
        executor = ForcedSelectionExecutor(
            self.config.text, plan, self.weights, 1, self.fallback, self.prepare, forced_selection
        )
        chain = Chain(plan, executor, 1)
        embeds, spans = self._embed(asked, executor)
        prompt = segments(embeds, [spans])
        done = chain.prefill(self._behind_prefix(chain, executor, asked, prompt))
        logits, tokens = [], []
        last = done.logits
        for step in range(steps):
            logits.append(last[0].float().numpy())
            tokens.append(int(last[0].argmax()))
            if step + 1 < steps:
                given = tokens[-1] if forced is None else forced[step]
                at = np.full((1, 1), embeds.shape[1] + step, np.int32)
                row = executor.embed(torch.tensor([[given]]))
                last = chain.decode(AppendedRows(False, row, at, at))
        kept = None
        if done.kept:  # a plan that decides per prompt may pad what it keeps
            kept = tuple(int(at) for at in done.kept[-1].order[0] if at != INVISIBLE)
        decision = done.decision
        selection = (
            Selection(kept)
            if decision is None
            else Selection(kept, decision.trigger, decision.exit)
        )
        margins = SelectionMargins(executor.scores, plan.probe, executor.readings)
        return Trajectory(np.stack(logits), tuple(tokens), selection, margins)

    def _behind_prefix(
        self, chain: Chain, executor: TorchExecutor, asked: Asked, prompt: list[AppendedRows]
    ) -> list[AppendedRows]:
        """What of ``prompt`` is left once every stage holds the prefix that it begins with."""
        count, head = len(self.ids), asked.parts[0]
        if self.prefix is None or head is None or head[:count] != self.ids:
            return prompt
        order = np.arange(count, dtype=np.int32)[None]
        for index, caches in enumerate(executor.caches):
            chain.reserve(index, count)
            chain.slots[index].write(AppendedRows(False, None, order, order))
            first = chain.plan.stages[index].layers[0]
            executor.caches[index] = [
                tuple(both[first + at][None].clone() for both in self.prefix)
                for at in range(len(caches))
            ]
        head_rows, *rest = prompt
        cut = replace(
            head_rows,
            rows=head_rows.rows[:, count:],
            positions=head_rows.positions[:, count:],
            order=head_rows.order[:, count:],
        )
        return [cut, *rest] if cut.count else rest

    def _embed(self, asked: Asked, executor: TorchExecutor) -> tuple[Tensor, list[Span]]:
        """Rows (1, S, D) of the whole prompt, and where its visual rows stand."""
        rows: list[Tensor] = []
        spans: list[Span] = []
        for part in asked.parts:
            start = sum(one.shape[1] for one in rows)
            if part is None:
                rows.append(self._vision(asked.pixels))
                spans.append((start, start + self.config.visual_tokens))
            else:
                rows.append(executor.embed(torch.tensor([part])))
        return torch.cat(rows, 1), spans

    @cached_property
    def _vision(self) -> Vision:
        vision_encoder = Vision(self.config, Eager(), self.fallback)
        self.prepare(vision_encoder)
        return load_weights(vision_encoder, self.weights)


def is_quantised(name: str) -> bool:
    """Whether a weight of this name is rounded."""
    return name.endswith(tuple(WEIGHT.values()))


def _rounded(tensor: Tensor, manifest: Manifest, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, by way of the type of the bundle's floats."""
    return tensor.to(STORED_TORCH_DTYPES[manifest.dtype]).to(dtype)


def compare_runtime(
    bundle: Bundle,
    reference: TorchChain,
    session: Session,
    asked: Sequence[Asked],
    steps: int,
    bounds: Bounds,
) -> CheckResult:
    """The runtime on ONNX Runtime against the torch chain in FP32."""
    # A checkpoint's own settings may draw at random, or punish repetition.
    greedy = replace(session.sampling, temperature=0.0, repetition_penalty=1.0)
    tally = Tally(bounds)
    for one in asked:
        want = reference.answer(one, steps)
        logits = session.score(one.opened, one.sample.prompt, want.tokens[:-1])
        answer = session.infer(one.opened, one.sample.prompt, max_tokens=steps, sampling=greedy)
        forced_run = partial(reference.follow, one, want.tokens)
        called = answer.plan.called
        selection = Selection(answer.plan.kept)
        if called is not None:
            selection = Selection(answer.plan.kept, called.trigger, called.exit)
        tally.add(one.sample.name, want, logits, selection, answer.tokens, forced_run)
    return tally.result(graph_files(bundle))


def compare_half(
    bundle: Bundle,
    reference: TorchChain,
    half: TorchChain,
    asked: Sequence[Asked],
    steps: int,
    bounds: Bounds,
) -> CheckResult:
    """The torch chain in FP16 arithmetic against the one in FP32, with and without a teacher."""
    tally = Tally(bounds)
    for one in asked:
        want = reference.answer(one, steps)
        got = half.follow(one, want.tokens)
        free = half.answer(one, steps)
        forced_run = partial(reference.follow, one, want.tokens)
        tally.add(one.sample.name, want, got.logits, got.selection, free.tokens, forced_run)
    return tally.result(graph_files(bundle))
