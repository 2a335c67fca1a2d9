"""Many prompts through a plan in FP32, with the weights of one layer in memory at a time.

The chain goes prompt by prompt and needs all layers; a walk goes layer by layer and needs all
prompts, of which it keeps the rows alone:

    for each layer   read its weights once
        for each prompt   its calls of this stage, over a cache that lives no longer than this
    at an edge       the last prompt row selects, or vision leaves

Which rows a call holds, in which order and under which gates is said by ``graphs.chain.chain``, as
for every back end; so the logits are those of the chain. A known answer is fed behind its prompt,
as decode steps would feed it. Keys and values of the prefix come computed: its rows are never run,
so nobody who watches sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...compile.checkpoint.checkpoint import Checkpoint
from ...compile.checkpoint.names import EMBEDDING
from ...compile.export.prefix import prefix_cache
from ...compile.layer_stream import without_weights
from ...compile.quantize import fp16_ranges as ranges
from ...compile.quantize.fake_quantized import FakeQuantised
from ...graphs.config import ModelConfig
from ...graphs.errors import PlanError
from ...graphs.modules.decoder import Body, Head, Linear, Logits
from ...graphs.modules.ops import Eager
from ...graphs.modules.quantized import round_caches
from ...graphs.modules.select import Prober, Selector
from ...graphs.modules.vision import Vision
from ...graphs.plan.plan import StagePlan
from ...graphs.quantization import CacheScheme
from ..sample_prompts import SamplePrompt
from .observe import ANSWER, ENCODER, TEXT, LayerObserver, ObservedStream
from .prompt_state import prompt_states

Visual = list[list[Tensor]]
"""Visual rows (1, N, D) FP32 of each picture of each prompt."""

Storing = Callable[[int, Tensor, Tensor], None]
"""Told layer, keys and values (G, S, d) FP32 that one prompt has cached there by its end: those of
its prefix, of its own rows that this stage holds, and of its answer. Not to be kept."""

Reading = Callable[[int, int, np.ndarray, np.ndarray], None]
"""Told prompt, layer, cosine (N,) and norm (N,): a ``select.Prober``'s view from the last row."""


@dataclass(frozen=True)
class LayerwiseResult:
    """What came out, by prompt.

    logits: (1 + A, V) float32 of the last prompt row and of each row of the answer; no prompt's
    where they were not wanted. kept: for each selection, the orders (K,) of the tokens it kept:
    their places in the unpruned prompt.
    """

    logits: list[Tensor]
    kept: list[list[np.ndarray]]


def layerwise_pieces(config: ModelConfig, prefix_ids: Sequence[int]) -> int:
    """How many pieces with weights ``see`` and ``run_layerwise`` read together."""
    return ranges.dense_pieces(config) + (config.text.layers if prefix_ids else 0)


def see(
    checkpoint: Checkpoint,
    prompts: Sequence[SamplePrompt],
    *,
    observer: LayerObserver | None = None,
    fake_quantised: FakeQuantised | None = None,
    progress: Callable[[int], None] = lambda pieces: None,
) -> Visual:
    """Run every picture through tower and projector, one after the other within each piece."""
    config = checkpoint.config
    module = without_weights(lambda: Vision(config, Eager()))
    stream = ObservedStream(checkpoint, module, observer, progress, fake_quantised)
    images = [
        torch.from_numpy(part)[None]
        for prompt in prompts
        for part in prompt.parts
        if isinstance(part, np.ndarray)
    ]

    def call(piece: nn.Module, *states: list[Tensor]) -> list[Tensor]:
        last = piece is module.multi_modal_projector
        kind = np.full(config.visual_tokens if last else config.vision.tokens, ENCODER)
        with stream.loaded(piece, [kind] * len(images)) as run:
            return [run(*args) for args in zip(*states, strict=True)]

    rows = iter(module.compose(call, images) if images else ())
    return [
        [next(rows) for part in prompt.parts if isinstance(part, np.ndarray)] for prompt in prompts
    ]


def run_layerwise(
    checkpoint: Checkpoint,
    prompts: Sequence[SamplePrompt],
    plan: StagePlan,
    prefix_ids: Sequence[int] = (),
    *,
    visual: Visual | None = None,
    observer: LayerObserver | None = None,
    reading: Reading | None = None,
    storing: Storing | None = None,
    fake_quantised: FakeQuantised | None = None,
    want_logits: bool = True,
    progress: Callable[[int], None] = lambda pieces: None,
) -> LayerwiseResult:
    """Run all prompts, layer by layer.

    Args:
        checkpoint: weights of any type; computed in FP32.
        prompts: the last part of each is text.
        plan: static, of the checkpoint's depth.
        prefix_ids: token ids whose keys and values are computed beforehand; a prompt that begins
            otherwise is run from its first row, as a bundle would.
        visual: what ``see`` returned for these prompts; None sees now.
        observer: shown the inputs of every linear layer, of the tower too if ``visual`` is None.
        reading: told of each layer without gates through which visual rows of a prompt run.
        storing: told of what every prompt caches in every layer.
        fake_quantised: what linear layers compute with, the tower's too if ``visual`` is None, and
        what caches keep; the prefix is computed in float, as for every bundle, and cached like all
            rows. None: nothing is rounded.
        want_logits: whether to keep them; with long answers they are large.
        progress: told of ``layerwise_pieces(config, prefix_ids)`` pieces in all, fewer with
        ``visual``.

    Raises:
        PlanError: the plan decides per prompt, or is another model's.
        PromptError: a prompt does not end in text.
        CapacityError: a prompt and its answer are longer than the model's context.
    """
    text = checkpoint.config.text
    _check(plan, checkpoint.config)
    if visual is None:
        visual = see(
            checkpoint, prompts, observer=observer, fake_quantised=fake_quantised, progress=progress
        )
    prefix = prefix_cache(checkpoint, prefix_ids, progress) if prefix_ids else None
    if prefix is not None and fake_quantised is not None:
        prefix = fake_quantised.prefix(prefix)
    table = checkpoint.load(EMBEDDING)
    everyone = prompt_states(prompts, visual, table, prefix_ids, text.max_positions)
    checkpoint.release()
    del visual  # the travellers have the rows, and let go of them

    body, lm_head = _decoder(
        checkpoint.config, plan, "float" if fake_quantised is None else fake_quantised.cache
    )
    module = nn.ModuleDict({"model": body, "lm_head": lm_head})
    stream = ObservedStream(checkpoint, module, observer, progress, fake_quantised)
    head, prober = Head(text, Eager()), Prober()
    for index, stage in enumerate(plan.stages):
        edge = plan.edges[index] if index < len(plan.edges) else None
        selector = Selector(edge) if edge is not None and edge.op == "select" else None
        for one in everyone:
            one.enter(plan, index, head)
        kinds = [kind for one in everyone for kind in one.kinds()]
        for number in range(*stage.layers):
            layer = body.layers[str(number)]
            gated = stage.gated_layers.index(number) if number in stage.gated_layers else None
            ends = number == stage.layers[1] - 1
            saved = None if prefix is None else prefix[:, number]
            scales = None if fake_quantised is None else fake_quantised.scales_of(number)
            with stream.loaded(layer, kinds) as run:
                for place, one in enumerate(everyone):
                    view = one.through(run, text, gated, saved, scales)
                    if storing is not None:
                        storing(number, view.key[0], view.value[0])
                    if reading is not None and gated is None and one.sees:
                        cosine, norm = view.read(prober)
                        reading(place, number, cosine, norm)
                    if selector is not None and ends and one.sees:
                        one.select(selector, view)
        for one in everyone:
            one.leave(drop=edge is not None and edge.op == "drop")

    kinds = [np.array([TEXT] + [ANSWER] * one.answer_rows) for one in everyone]
    logits = []
    with stream.loaded(Logits(body.norm, lm_head), kinds) as run:
        for one in everyone:
            out = run(one.last_rows())
            if want_logits:
                logits.append(out)
    return LayerwiseResult(logits, [one.kept for one in everyone])


def _decoder(config: ModelConfig, plan: StagePlan, cache: CacheScheme) -> tuple[Body, Linear]:
    """All layers of all stages, over caches of one type, and the head, without weights."""
    text = config.text
    kinds = {
        layer: (mode, stage.norm)
        for stage in plan.stages
        for layer, mode in enumerate(stage.modes, start=stage.layers[0])
    }

    def make() -> tuple[Body, Linear]:
        body = Body(text, Eager(), kinds, last=True)
        round_caches(body, cache)
        return body, Linear(Eager(), text.hidden, text.vocab, bias=False)

    return without_weights(make)


def _check(plan: StagePlan, config: ModelConfig) -> None:
    if plan.probe is not None:
        raise PlanError(
            f"plan '{plan.name}' decides per prompt, so its stages see other rows each time. "
            "Calibrate a static plan, such as visipruner"
        )
    if (plan.layers, plan.visual_tokens) != (config.text.layers, config.visual_tokens):
        raise PlanError(
            f"plan '{plan.name}' is for {plan.layers} layers and {plan.visual_tokens} visual "
            f"tokens, the model has {config.text.layers} and {config.visual_tokens}. Make one that "
            f"fits: preset('{plan.name}', {config.text.layers}, {config.visual_tokens})"
        )
