"""The torch chain: real prompts through torch stages, over a bundle's or a checkpoint's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...calib.samples import Sample
from ...compile.checkpoint.checkpoint import Checkpoint
from ...compile.checkpoint.names import EMBEDDING
from ...graphs.bundle import Bundle, Manifest
from ...graphs.caches import scored_layer
from ...graphs.chain.chain import Chain
from ...graphs.chain.enter import entered_rows, positioned, run_of
from ...graphs.chain.executor import Kept
from ...graphs.chain.rows import AppendedRows
from ...graphs.chain.torch_encoder import TorchEncoder
from ...graphs.chain.torch_reference import TorchExecutor
from ...graphs.contract import INVISIBLE
from ...graphs.errors import DataError, ImageError, PromptError
from ...graphs.linears import linear_groups
from ...graphs.modules.quantized import INPUT_SCALE, WEIGHT
from ...graphs.parts import STEP
from ...graphs.plan.plan import StagePlan
from ...graphs.plan.stages import Entry, Probe
from ...graphs.precision import NO_FALLBACK
from ...graphs.selectors.entry import Entered
from ...runtime.opened_image import Opened, check_picture
from .stored_graph import all_weights, quantise_module, stored_tensor
from .token_choices import ProbeReading, Selection, SelectionMargins, forced_readings
from .verify_report import require_memory

if TYPE_CHECKING:
    from ...runtime.session import Session


@dataclass(frozen=True)
class PreparedPrompt:
    """A sample as both sides take it: its image, and ids with None for the image.

    entry, entered: the plan's, and what the runtime let in of the image. A greedy choice hangs on
    every digit, so all chains make the runtime's.
    """

    sample: Sample
    opened: Opened
    parts: tuple[tuple[int, ...] | None, ...]
    entry: Entry | None
    entered: Entered


def prepare_prompts(session: Session, samples: Sequence[Sample]) -> list[PreparedPrompt]:
    """Preprocess and tokenise with the bundle's own files.

    Raises:
        DataError: naming the first sample that cannot be asked.
    """
    prompts, entry = [], session.bundle.manifest.plan.entry
    for sample in samples:
        try:
            check_picture(sample.image)
            opened = session.open(sample.image)
            encoded = session.encoder.encode(sample.prompt, 1, [opened.layout]).segments
        except (ImageError, PromptError) as error:
            raise DataError(f"{sample.name}: {error}") from None
        parts = tuple(None if part.is_image else part.ids for part in encoded)
        image = session.encode_image(opened)
        matched = None if image.matched is None else image.matched[0]
        entered = Entered(image.patches[0], matched=matched)
        prompts.append(PreparedPrompt(sample, opened, parts, entry, entered))
    return prompts


@dataclass(frozen=True)
class Trajectory:
    """A greedy answer: logits (T, V) float32 and their top-1 tokens (T,); the selection that the
    plan made for the prompt, and its margins.
    """

    logits: np.ndarray
    tokens: tuple[int, ...]
    selection: Selection
    margins: SelectionMargins


class SteeredExecutor:
    """An ``Executor`` around ``inner`` that notes what a plan's selection rests on.

    ``forced``: a selection that is made instead of the plan's own.
    """

    def __init__(self, inner: TorchExecutor, rule: Probe | None, forced: Selection | None):
        self.inner, self.rule, self.forced = inner, rule, forced
        self.scores: list[Mapping[int, float]] = []
        self.readings: dict[int, ProbeReading] = {}
        self.axes, self.ensure_slots = inner.axes, inner.ensure_slots
        self.serve, self.append = inner.serve, inner.append
        self.concatenate, self.take = inner.concatenate, inner.take

    def select(self, edge: int, feeds: Mapping[str, Any]) -> Kept:
        """Note the scores; keep what ``forced`` does where all of it is on offer."""
        kept = self.inner.select(edge, feeds)
        rows, positions, order = (feeds[name] for name in ("rows", "positions", "order"))
        offered = [int(at) for at in order[0]]
        number = len(self.scores)
        self.scores.append(dict(zip(offered, map(float, kept.scores[0]), strict=True)))
        forced = () if self.forced is None else self.forced.at_edges[number:]
        if not forced or not set(forced[0]) <= set(offered):
            return kept
        wanted = forced[0]
        at = [offered.index(position) for position in wanted]
        return Kept(rows[:, at], positions[:, at], order[:, at], kept.scores)

    def probe(self, stage, layer, *given):
        """Note the readings; return some that lead to ``forced``."""
        cosines, norms = self.inner.probe(stage, layer, *given)
        _, slot_order, _, visual_slots = given
        positions = slot_order[0, visual_slots[0]]
        seen = [(int(at), i) for i, at in enumerate(positions) if at != INVISIBLE]
        self.readings[layer] = ProbeReading(
            {at: float(cosines[0, i]) for at, i in seen}, {at: float(norms[0, i]) for at, i in seen}
        )
        if self.forced is None or self.rule is None:
            return cosines, norms
        return forced_readings(self.rule, self.forced, layer, positions, cosines, norms)


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
        self._encoders: dict[Entry | None, TorchEncoder] = {}
        self.fallback = manifest.fallback if half else NO_FALLBACK
        self.prepare: Callable[[nn.Module], None] = lambda module: None
        self.prepare_step: Callable[[nn.Module], None] | None = None
        if quantised:
            self.prepare = partial(quantise_module, manifest=manifest, kind="stage")
        if quantised and manifest.quantization.decode:
            self.prepare_step = partial(quantise_module, manifest=manifest, kind=STEP)

    @classmethod
    def stored(cls, bundle: Bundle, *, half: bool, free: int) -> TorchChain:
        """Read the weights of the bundle's graph files.

        Raises:
            ImpossibleError: more than ``free`` bytes.
        """
        manifest = bundle.manifest
        stored = all_weights(bundle)
        dtype = torch.float16 if half else torch.float32
        quantised = tuple(WEIGHT.values())
        needed = sum(
            stored.size(name) * (1 if name.endswith(quantised) else dtype.itemsize)
            for name in stored
        )
        require_memory(f"the whole model in {'FP16' if half else 'FP32'}", needed, free)
        weights = {}
        for name, array in stored.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            weights[name] = tensor if name.endswith(quantised) else tensor.to(dtype)
        for group in linear_groups(manifest.config):  # engines' layers share the first one's scale
            scales = [f"{linear}.{INPUT_SCALE}" for linear in group.linears]
            shared = next((weights[name] for name in scales if name in weights), None)
            for name in scales if shared is not None else ():
                weights.setdefault(name, shared)
        weights[EMBEDDING] = _rounded(stored_tensor(bundle, manifest.embedding), manifest, dtype)
        prefix = None
        apart = manifest.quantization.quantises or manifest.plan.fixed_calls
        if apart and manifest.prefix:
            # Shipped as computed from float weights: rounded ones would make another. And where
            # rows of a call compete, its rows were a call of their own.
            keys = stored_tensor(bundle, manifest.prefix.keys)
            values = stored_tensor(bundle, manifest.prefix.values)
            if not manifest.quantization.quantises_cache:
                keys, values = keys.to(dtype), values.to(dtype)
            prefix = keys, values
        return cls(manifest, weights, half=half, quantised=True, prefix=prefix)

    @classmethod
    def original(cls, bundle: Bundle, checkpoint: Checkpoint, *, free: int) -> TorchChain:
        """Read the checkpoint's own weights, in FP32 by way of the type of the bundle's floats.

        Raises:
            ImpossibleError: more than ``free`` bytes.
        """
        require_memory("the whole checkpoint in FP32", fp32_bytes(checkpoint), free)
        weights = {}
        for name in checkpoint.tensors:
            weights[name] = _rounded(checkpoint.load(name), bundle.manifest, torch.float32)
            checkpoint.release()
        return cls(bundle.manifest, weights, half=False, quantised=False)

    def follow(
        self, prompt: PreparedPrompt, tokens: Sequence[int], selection: Selection | None = None
    ) -> Trajectory:
        """Answer along given tokens: each row of logits is for the token that comes next there."""
        return self.answer(prompt, len(tokens), forced=tokens, selection=selection)

    @torch.no_grad()
    def answer(
        self,
        prompt: PreparedPrompt,
        steps: int,
        *,
        plan: StagePlan | None = None,
        forced: Sequence[int] | None = None,
        selection: Selection | None = None,
    ) -> Trajectory:
        """Answer a prompt greedily, beyond the end of the answer.

        Args:
            prompt: the prompt.
            steps: tokens.
            plan: instead of the bundle's.
            forced: tokens to go on with, instead of those that are answered.
            selection: instead of the plan's own.
        """
        plan = plan or self.plan
        torch_executor = TorchExecutor(
            self.config.text,
            plan,
            self.weights,
            1,
            self.fallback,
            self.prepare,
            self.prepare_step,
        )
        executor = SteeredExecutor(torch_executor, plan.probe, selection)
        chain = Chain(plan, executor, 1)
        start = self._restore_prefix(chain, torch_executor, prompt)
        segments, count = self._embed(prompt, plan, torch_executor, start)
        layout = prompt.opened.layout
        lags = [
            plan.lag_of(stop - first, advance)
            for (first, stop), advance in zip(layout.spans, layout.advance, strict=True)
        ]
        segments, lag = positioned(plan, segments, lags)
        segments = [segment for segment in segments if segment.count]
        done = chain.prefill(segments)
        logits = [done.logits[0]]
        for step in range(steps - 1):
            token = int(logits[-1].argmax()) if forced is None else forced[step]
            at = np.full((1, 1), count + step, np.int32)
            row = torch_executor.embed(torch.tensor([[token]]))
            logits.append(chain.decode(AppendedRows(False, row, at - lag, at))[0])
        kept = None
        if plan.entry is not None:
            visual = [segment.order[0] for segment in segments if segment.visual]
            kept = tuple(int(at) for at in np.concatenate(visual) if at != INVISIBLE)
        at_edges = tuple(  # a plan that decides per prompt may pad what it keeps
            tuple(int(at) for at in orders[0] if at != INVISIBLE) for orders in done.kept
        )
        if at_edges:
            kept = at_edges[-1]
        return Trajectory(
            torch.stack(logits).float().numpy(),
            tuple(int(row.argmax()) for row in logits),
            Selection.of(kept, done.decision, at_edges),
            SelectionMargins(executor.scores, plan.probe, executor.readings),
        )

    def _restore_prefix(self, chain: Chain, executor: TorchExecutor, prompt: PreparedPrompt) -> int:
        """Put the prefix into every stage where the prompt begins with it; return its rows."""
        count, head = len(self.ids), prompt.parts[0]
        if self.prefix is None or head is None or head[:count] != self.ids:
            return 0
        frozen = chain.plan.freezes("prefix") and None not in prompt.parts
        if frozen or chain.plan.prefix_rules != self.plan.prefix_rules:
            return 0  # the bundle's was made by its own plan, for an image behind it
        order = np.arange(count, dtype=np.int32)[None]
        for index in range(len(executor.caches)):
            chain.reserve(index, count)
            chain.slots[index].write(AppendedRows(False, None, order, order))
            executor.caches[index] = [
                tuple(both[layer][None].clone() for both in self.prefix)
                for layer in chain.plan.stages[index].attention_layers
            ]
            if index in executor.ahead:
                executor.ahead[index] = self.prefix[0][scored_layer(chain.plan, index)][
                    None
                ].clone()
        return count

    def _embed(
        self, prompt: PreparedPrompt, plan: StagePlan, executor: TorchExecutor, start: int
    ) -> tuple[list[AppendedRows], int]:
        """Return the rows of the prompt from row ``start`` of its first part on, part by part, and
        the next position.
        """
        segments: list[AppendedRows] = []
        sizes = [stop - first for first, stop in prompt.opened.layout.spans]
        opened, run = prompt.opened, 0
        for index, part in enumerate(prompt.parts):
            if part is None:
                pixels = torch.from_numpy(opened.pixels)
                forced = prompt.entered if plan.entry == prompt.entry is not None else None
                feeds = opened.layout.feeds
                if not run:
                    image = self._encoder(plan)(pixels, (opened.key,), forced, feeds)
                own = run_of(image, opened.layout, run)
                segments.append(entered_rows(plan, own, start, opened.layout))
                start += plan.span_of(sizes[run])
                run += 1
            else:
                rows = executor.embed(
                    torch.tensor([part if index else part[start:]], dtype=torch.long)
                )
                order = np.arange(start, start + rows.shape[1], dtype=np.int32)[None]
                start += rows.shape[1]
                prefix = None in prompt.parts[index:] and None not in prompt.parts[:index]
                segments.append(AppendedRows(False, rows, order, order, prefix=prefix))
        return [segment for segment in segments if segment.count or segment.visual], start

    def _encoder(self, plan: StagePlan) -> TorchEncoder:
        if plan.entry not in self._encoders:
            self._encoders[plan.entry] = TorchEncoder(
                self.config, plan, self.weights, self.fallback, self.prepare
            )
        return self._encoders[plan.entry]


def fp32_bytes(checkpoint: Checkpoint) -> int:
    """Return the size of all weights of a checkpoint in FP32."""
    return 4 * sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def _rounded(tensor: Tensor, manifest: Manifest, dtype: torch.dtype) -> Tensor:
    """Convert to ``dtype``, by way of the type of the bundle's floats."""
    return tensor.to(getattr(torch, manifest.dtype)).to(dtype)
