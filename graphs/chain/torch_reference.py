"""The chain in plain torch: the reference of every executor, and an entry point.

``run`` takes weights under LlamaForCausalLM names and embeddings in which the visual rows already
stand at their spans; it stages them by a plan and returns logits and greedy tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..caches import scored_layer
from ..contract import BY_LAYER, INVISIBLE
from ..errors import ModelError, PlanError, PromptError
from ..fusion import NAMED_DEPTH, read_fusion
from ..modules.decoder import DecoderStage, direct
from ..modules.features import injected_rows
from ..modules.ops import Eager
from ..modules.quantized import CACHE_SCALES
from ..modules.routers.notes import GateNotes
from ..modules.select import Prober, Selector
from ..modules.serving import ServingStage
from ..parts import probed, whole_stages
from ..plan.plan import StagePlan
from ..plan.routing import is_router
from ..precision import NO_FALLBACK, Fp32Fallback
from ..text_config import TextConfig
from .chain import Chain
from .enter import positioned
from .executor import Kept, StageResult
from .rows import AppendedRows, last_layers
from .torch_classes import entered_patches, matched_rows, told_apart

Span = tuple[int, int]


@dataclass(frozen=True)
class ChainResult:
    """Result of ``run``.

    logits: (B, V) of the last prompt row. kept: per sample, the absolute positions of the visual
    tokens left by the last selection (all of them where nothing was selected). trigger, exit: last
    layer with all visual tokens, last layer with any; one for each sample where the plan decides
    per prompt and the batch has several. tokens: (B, max_new_tokens) greedy; step_logits: (B,
    max_new_tokens, V), those that each was chosen by. kept_at_edges: per sample, as kept, of each
    selection that took place, in their order. gates: of a plan with routers, by their names: (B,
    S + decoded rows) factors of each row at its position, 0 where it was skipped.
    """

    logits: Tensor
    kept: list[list[int]]
    trigger: int | list[int]
    exit: int | list[int]
    tokens: Tensor
    step_logits: Tensor
    kept_at_edges: list[list[list[int]]]
    gates: dict[str, Tensor] = field(default_factory=dict)


class TorchExecutor:
    """``executor.Executor`` over eager stage modules; caches are torch tensors.

    ``prepare`` changes each stage before it is given its weights (``quantized.replace_linears``,
    ``round_caches``); ``prepare_step`` another one for calls of one row, where they differ.
    """

    def __init__(
        self,
        text: TextConfig,
        plan: StagePlan,
        weights: Mapping[str, Tensor],
        batch: int,
        fallback: Fp32Fallback = NO_FALLBACK,
        prepare: Callable[[torch.nn.Module], None] = lambda stage: None,
        prepare_step: Callable[[torch.nn.Module], None] | None = None,
    ):
        self.text, self.plan, self.batch, self.fallback = text, plan, batch, fallback
        self.axes = text.rope.axes
        self.embedding = weights["model.embed_tokens.weight"]

        def loaded(prepare: Callable[[torch.nn.Module], None]) -> list[DecoderStage]:
            made = [
                DecoderStage(text, plan, part, Eager(), fallback) for part in whole_stages(plan)
            ]
            return [load_weights(stage, weights, prepare) for stage in made]

        self.stages = loaded(prepare)
        self.steps = loaded(prepare_step) if prepare_step else []
        self.serving = {
            part.stage: load_weights(ServingStage(text, plan, part, Eager()), weights, prepare)
            for part in whole_stages(plan)
            if part.serves(plan)
        }
        self.layers = [stage.attention_layers for stage in plan.stages]
        self.selectors = {
            index: Selector(edge) for index, edge in enumerate(plan.edges) if probed(plan, index)
        }
        self.prober = Prober()
        self.notes = GateNotes([*self.stages, *self.steps])
        self.caches = [
            [
                (self._empty(index, layer), self._empty(index, layer))
                for layer in stage.attention_layers
            ]
            for index, stage in enumerate(plan.stages)
        ]
        self.ahead = {  # keys of the layer behind a stage, where its edge reads them
            index: self._empty(index, stage.ahead)
            for index, stage in enumerate(self.stages)
            if stage.ahead is not None
        }

    def ensure_slots(self, stage: int, slots: int) -> int:
        """Grow to exactly ``slots``: the reference has no use for spare room."""
        held = self.caches[stage][0][0].shape[2] if self.caches[stage] else slots
        if slots <= held:
            return held

        def grown(cache: Tensor) -> Tensor:
            return torch.nn.functional.pad(cache, (0, 0, 0, slots - cache.shape[2]))

        self.caches[stage] = [(grown(key), grown(value)) for key, value in self.caches[stage]]
        if stage in self.ahead:
            self.ahead[stage] = grown(self.ahead[stage])
        return slots

    def append(
        self, stage, rows, positions, order, slot_order, write_index, by_layer, inject
    ) -> StageResult:
        """Run stage ``stage`` eagerly."""
        missing = {layer: rows.shape[1] - given.shape[1] for layer, given in inject.items()}
        self.notes.order = order
        modules = self.steps if self.steps and rows.shape[1] == 1 else self.stages
        out = modules[stage](
            rows,
            torch.from_numpy(positions),
            torch.from_numpy(order),
            torch.from_numpy(slot_order.copy()),
            torch.full((self.batch,), write_index),
            *(torch.from_numpy(by_layer[n]) if n in by_layer else None for n in BY_LAYER),
            self.caches[stage],
            {
                layer: torch.nn.functional.pad(given, (0, 0, 0, missing[layer]))
                for layer, given in inject.items()
            },
            self.ahead.get(stage),
        )
        self.caches[stage] = out.caches
        if out.ahead is not None:
            self.ahead[stage] = out.ahead
        return StageResult(out.rows, out.queries, out.logits, out.readings)

    def serve(self, stage, rows, positions, write_index, inject) -> Tensor:
        """Run the serving stage ``stage`` eagerly, and write what it returns."""
        at = torch.from_numpy(positions)
        rows, new = self.serving[stage].compose(direct, rows, at, inject)
        caches = [cache for pair in self.caches[stage] for cache in pair]
        caches += [self.ahead[stage]] if stage in self.ahead else []
        for cache, own in zip(caches, new, strict=True):
            cache[:, :, write_index : write_index + own.shape[2]] = own
        return rows

    def select(self, edge: int, feeds: Mapping[str, Any]) -> Kept:
        """Run the selector of edge ``edge`` over the cache that it reads of the stage before it."""
        layer = scored_layer(self.plan, edge)
        key, value = self.caches[edge][-1]
        scales = self.stages[edge].scales_of(layer)
        given = dict(feeds) | {"key": self.ahead.get(edge, key), "value": value}
        given |= zip(CACHE_SCALES, scales or (), strict=False)
        rows, *on_host = self.selectors[edge].of(given)
        return Kept(rows, *(values.numpy() for values in on_host))

    def probe(self, stage, layer, query, slot_order, query_order, visual_slots):
        """Read one layer of stage ``stage``."""
        key, value = self.caches[stage][self.layers[stage].index(layer)]
        readings = self.prober(
            query,
            key,
            value,
            torch.from_numpy(slot_order.copy()),
            torch.from_numpy(query_order),
            torch.from_numpy(visual_slots.copy()),
            *(self.stages[stage].scales_of(layer) or ()),
        )
        return tuple(reading.numpy() for reading in readings)

    def take(self, rows: Tensor, index: np.ndarray) -> Tensor:
        """Take rows ``index`` along Q."""
        at = torch.from_numpy(index)
        return rows[:, at] if at.ndim == 1 else rows.take_along_dim(at[..., None], 1)

    def concatenate(self, parts: Sequence[Tensor]) -> Tensor:
        """Join rows along Q."""
        return torch.cat(list(parts), dim=1)

    def embed(self, ids: Tensor) -> Tensor:
        """Return rows (B, Q, D) of token ids (B, Q)."""
        rows = torch.nn.functional.embedding(ids, self.embedding)
        return rows.float() if self.fallback.rows else rows

    def _empty(self, stage: int, layer: int) -> Tensor:
        shape = (self.batch, self.text.kv_heads, 0, self.text.head_dim)
        quantised = self.stages[stage].scales_of(layer) is not None
        return torch.zeros(shape, dtype=torch.int8 if quantised else self.embedding.dtype)


def load_weights(
    module: torch.nn.Module,
    weights: Mapping[str, Tensor],
    prepare: Callable[[torch.nn.Module], None] = lambda module: None,
) -> Any:
    """Set a stage's parameters to ``weights``, without copying them, once it is prepared; return
    the module.
    """
    prepare(module)
    names = module.state_dict().keys()
    lacking = [name for name in names if name not in weights and is_router(name)]
    if lacking:
        raise ModelError(
            f"the weights lack {lacking[0]} ({len(lacking)} tensors of routers), which the plan's "
            "routing reads. Give them under the names of docs/methods.md, or take another plan"
        )
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    chosen = {n: weights[n if n in weights else tied[n]].detach() for n in names}
    module.load_state_dict(chosen, assign=True)
    return module.requires_grad_(False)


@torch.no_grad()
def run(
    weights: Mapping[str, Tensor],
    config: Mapping,
    embeds: Tensor,
    spans: Sequence[Sequence[Span]],
    plan: StagePlan,
    max_new_tokens: int = 0,
    entered: Sequence[Sequence[Sequence[int]]] | None = None,
    features: Sequence[Tensor] | None = None,
    positions: np.ndarray | None = None,
    inject: Mapping[int, Tensor] | None = None,
) -> ChainResult:
    """Run ``plan`` over embedded prompts.

    Args:
        weights: LlamaForCausalLM parameter names to tensors, and those of a plan's routers by the
            names that they were released with (docs/methods.md, "Routed depth").
        config: a Hugging Face Llama config as a dict; with the fields of layer fusion, if it has
            some, and ``vision_config`` where that encoder has not 24 layers.
        embeds: (B, S, D) float, visual rows in place.
        spans: per sample, the (start, stop) of each image's visual rows.
        plan: its depth must be the model's; of fewer than K visual rows all are kept.
        max_new_tokens: greedy tokens to decode after the prompt.
        entered: of a plan with an entry: per sample and image, the indices of the rows within its
            span that enter, ascending. What most selectors read is not here, so the caller
            chooses; one that reads the rows and the vocabulary alone chooses where this is None.
        features: of a model that adds features within the decoder: for each of them (B, S, h), the
            encoder's, at the places of the visual rows; ``weights`` has the projectors.
        positions: (B, S) of the rows, or (B, S, A) where the model's have several; None: their
            places. Rows of the answer go on behind the last.
        inject: what is added to visual rows, (B, S, D) each, by the layer at whose input; of a
            model that projects its features to the decoder's width (``features``: of others).

    Raises:
        PlanError: the plan does not fit the model or the spans.
        PromptError: a span leaves the prompt, overlaps another, or ends it; or ``entered`` does
            not fit plan and spans.
    """
    text = _text_config(config)
    if inject:
        text = replace(text, inject=tuple(sorted(inject)))
    batch, length, _ = embeds.shape
    _check(plan, text, spans, batch, length)
    chosen = None
    if entered is None and plan.tells_apart:
        prompts = zip(embeds, spans, strict=True)
        chosen = [told_apart(plan, weights, own, runs) for own, runs in prompts]
        entered = entered_patches(chosen)
    _check_entered(plan, spans, entered)
    if plan.probe is not None and batch > 1:
        given = (weights, config, embeds, spans, plan, max_new_tokens)
        return _one_by_one(*given, entered, features, positions, inject)
    executor = TorchExecutor(text, plan, weights, batch)
    chain = Chain(plan, executor, batch)
    each: Sequence[Any] = entered or [None] * batch
    places = [_places(plan, length, *own) for own in zip(spans, each, strict=True)]
    matched = None if chosen is None else matched_rows(length, spans, chosen)
    if not inject:
        inject = injected_rows(weights, config, text, features)
    prompt = segments(embeds, spans, places, inject, matched)
    whole, lag = _placed(plan, prompt, positions, _sizes(spans))
    done = chain.prefill(whole)
    tokens, logits, chosen_by = [], done.logits, []
    following = whole[-1].order[:, -1:] + 1
    for step in range(max_new_tokens):
        tokens.append(logits.argmax(-1))
        chosen_by.append(logits)
        if step + 1 < max_new_tokens:
            at = following + step
            row = executor.embed(tokens[-1][:, None])
            logits = chain.decode(AppendedRows(False, row, at - lag, at))
    at_edges = [[_seen(kept[sample]) for kept in done.kept] for sample in range(batch)]
    kept = [
        edges[-1] if edges else _all_visual(*own)
        for edges, own in zip(at_edges, zip(spans, places, strict=True), strict=True)
    ]
    answers = torch.stack(tokens, 1) if tokens else torch.zeros((batch, 0), dtype=torch.long)
    steps = torch.stack(chosen_by, 1) if tokens else logits.new_zeros((batch, 0, logits.shape[1]))
    trigger, exit_ = last_layers(plan, done)
    gates = executor.notes.placed(length + max(0, max_new_tokens - 1))
    return ChainResult(done.logits, kept, trigger, exit_, answers, steps, at_edges, gates)


def _sizes(spans: Sequence[Sequence[Span]]) -> list[np.ndarray]:
    """Return the rows (B, 1) of each image; of samples that have fewer, 0 of the first ones."""
    most = max((len(runs) for runs in spans), default=0)
    lengths = [[0] * (most - len(runs)) + [stop - start for start, stop in runs] for runs in spans]
    return [np.array(own)[:, None] for own in zip(*lengths, strict=True)]


def _placed(
    plan: StagePlan,
    prompt: Sequence[AppendedRows],
    positions: np.ndarray | None,
    sizes: Sequence[np.ndarray],
) -> tuple[list[AppendedRows], np.ndarray]:
    """Return a prompt's segments at their positions, and by how much (B, 1) those of the answer lie
    behind its orders.
    """
    if positions is None:
        apart = plan.positions == "separate"
        return positioned(plan, prompt, [np.minimum(plan.span, own) * apart for own in sizes])
    out = []
    for part in prompt:
        own = np.where(part.order == INVISIBLE, 0, part.order)
        index = own.reshape(own.shape + (1,) * (positions.ndim - 2))
        at = np.take_along_axis(positions, index, 1).astype(np.int32)
        out.append(replace(part, positions=at))
    last = positions[:, -1:].reshape(len(positions), 1, -1).max(-1)
    return out, prompt[-1].order[:, -1:] - last


def _text_config(config: Mapping) -> TextConfig:
    """Read the decoder's config, with the layers at whose input features are added."""
    text = TextConfig.from_hf(dict(config))
    depth = config.get("vision_config", {}).get("num_hidden_layers", NAMED_DEPTH)
    return replace(text, inject=read_fusion(config, depth, text.layers).layers)


def _one_by_one(
    weights, config, embeds, spans, plan, max_new_tokens, entered, features, positions, inject
) -> ChainResult:
    """Run prompts that may go different ways through the stages."""
    results = []
    for i in range(len(spans)):
        one = slice(i, i + 1)
        own = entered and entered[one]
        added = features and [whole[one] for whole in features]
        at = None if positions is None else positions[one]
        into = inject and {layer: whole[one] for layer, whole in inject.items()}
        arguments = (embeds[one], spans[one], plan, max_new_tokens, own, added, at, into)
        results.append(run(weights, config, *arguments))
    return ChainResult(
        torch.cat([result.logits for result in results]),
        [result.kept[0] for result in results],
        [result.trigger for result in results],  # type: ignore[misc]
        [result.exit for result in results],  # type: ignore[misc]
        torch.cat([result.tokens for result in results]),
        torch.cat([result.step_logits for result in results]),
        [result.kept_at_edges[0] for result in results],
        {name: torch.cat([r.gates[name] for r in results]) for name in results[0].gates},
    )


def segments(
    embeds: Tensor,
    spans: Sequence[Sequence[Span]],
    places: Sequence[np.ndarray] | None = None,
    inject: Mapping[int, Tensor] = MappingProxyType({}),
    matched: np.ndarray | None = None,
) -> list[AppendedRows]:
    """Cut each prompt into text, image, text, ...; align the samples by left padding.

    Samples with fewer images get calls that are padding from end to end.

    places: by sample, the position (S,) of each row, -1 where it does not enter; by default all
        rows enter, at their own places.
    inject: (B, S, D) that are added to visual rows, by layer.
    matched: (B, S) bool, the visual rows that the entry's selector matched.
    """
    batch, length, _ = embeds.shape
    if places is None:
        places = [np.arange(length)] * batch
    images = max((len(runs) for runs in spans), default=0)
    cuts = []
    for runs in spans:
        # Missing images are empty spans at the end of the first text, so the question stays last.
        padded = [(runs[0][0] if runs else 0,) * 2] * (images - len(runs)) + list(runs)
        edges = [0, *(at for span in padded for at in span), length]
        cuts.append(list(pairwise(edges)))
    out = []
    for index in range(2 * images + 1):
        pieces = [
            [at for at in range(*sample[index]) if own[at] >= 0]
            for sample, own in zip(cuts, places, strict=True)
        ]
        count = max(map(len, pieces))
        if count == 0:
            continue
        order = np.full((batch, count), INVISIBLE, np.int32)
        for sample, piece in enumerate(pieces):
            if piece:
                order[sample, count - len(piece) :] = places[sample][piece]
        positions = np.where(order == INVISIBLE, 0, order).astype(np.int32)
        visual, prefix = index % 2 == 1, index == 0 and images > 0
        added = {layer: _cut(whole, pieces) for layer, whole in inject.items() if visual}
        cut = _cut(embeds, pieces)
        classes = None
        if matched is not None and visual:
            classes = _cut(torch.from_numpy(matched)[..., None], pieces)[..., 0].numpy()
        out.append(AppendedRows(visual, cut, positions, order, added, prefix, classes))
    return out


def _cut(whole: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """Return rows ``pieces`` of each sample of (B, S, D), padded with zeros on the left."""
    count = max(map(len, pieces))
    rows = whole.new_zeros((len(pieces), count, whole.shape[2]))
    for sample, piece in enumerate(pieces):
        if piece:
            rows[sample, count - len(piece) :] = whole[sample, piece]
    return rows


def _places(
    plan: StagePlan, length: int, spans: Sequence[Span], entered: Sequence[Sequence[int]] | None
) -> np.ndarray:
    """Return the position of each of a prompt's rows, -1 where it does not enter."""
    enters = np.ones(length, bool)
    for (start, stop), chosen in zip(spans, entered or (), strict=False):
        enters[start:stop] = False
        enters[[start + at for at in chosen]] = True
    renumbered = plan.span != plan.visual_tokens
    places = np.cumsum(enters) - 1 if renumbered else np.arange(length)
    return np.where(enters, places, -1)


def _all_visual(spans: Sequence[Span], places: np.ndarray) -> list[int]:
    """Return the places of all visual rows that entered."""
    return [int(at) for start, stop in spans for at in places[start:stop] if at >= 0]


def _seen(order: np.ndarray) -> list[int]:
    """Return the orders (K,) of rows that are no padding."""
    return [int(at) for at in order if at != INVISIBLE]


def _check_entered(plan: StagePlan, spans, entered) -> None:
    if (plan.entry is None) != (entered is None):
        needs = "needs" if entered is None else "takes no"
        raise PromptError(
            f"plan '{plan.name}' {needs} entered: the indices of the rows of each image that "
            "enter, for each sample"
        )
    for sample, (own, chosen) in enumerate(zip(spans, entered or (), strict=False)):
        fits = len(entered) == len(spans) and len(own) == len(chosen)
        for (start, stop), index in zip(own, chosen, strict=False):
            rising = all(a < b for a, b in pairwise([-1, *index, stop - start]))
            count = len(index) == min(plan.entering, stop - start)
            if plan.tells_apart:  # fewer may be left
                count = len(index) <= plan.entering
            fits = fits and rising and count
        if not fits:
            raise PromptError(
                f"entered[{sample}]: found {list(map(list, chosen))}, expected {plan.entering} "
                "ascending indices within each image's span"
            )


def _check(plan, text, spans, batch, length) -> None:
    if plan.layers != text.layers:
        raise PlanError(
            f"plan '{plan.name}' is for {plan.layers} layers, the model has {text.layers}. "
            f"Make one that fits: preset('{plan.name}', layers={text.layers}, ...)"
        )
    if len(spans) != batch:
        raise PromptError(f"spans has {len(spans)} samples, embeds has {batch}: give one list each")
    for sample, one in enumerate(spans):
        at = 0
        for start, stop in one:
            if not at <= start < stop < length:
                raise PromptError(
                    f"spans[{sample}] holds ({start}, {stop}): spans must be ascending, disjoint, "
                    f"not empty, and end before the prompt's last row ({length - 1})"
                )
            at = stop
