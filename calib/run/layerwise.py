"""Many prompts through a plan in FP32, with the weights of one layer in memory at a time.

The chain goes prompt by prompt and needs all layers; a layer-wise run needs all prompts, of which
it keeps the rows alone:

    for each layer   read its weights once
        for each prompt   its calls of this stage, over a cache that exists no longer than this
    at an edge       the last prompt row selects, or vision leaves; where the next layer scores,
                     its beginning is read once more

``graphs.chain.chain`` defines which rows a call holds, in which order and under which gates, as for
every back end; so the logits are those of the chain. A known answer is fed behind its prompt, as
decode steps would feed it. Keys and values of the prefix come computed: its rows are never run, so
no observer sees them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...compile.checkpoint.checkpoint import Checkpoint
from ...compile.checkpoint.names import EMBEDDING
from ...compile.export.prefix import prefix_cache
from ...compile.layer_stream import Streamed, without_weights
from ...compile.planfile import check_fit
from ...compile.quantize.fake_quantized import FakeQuantised
from ...compile.quantize.fp16_ranges import dense_pieces
from ...graphs.chain.enter import run_of
from ...graphs.chain.executor import Encoded
from ...graphs.chain.torch_encoder import chosen_rows
from ...graphs.config import ModelConfig
from ...graphs.contract import ahead_of, row_readings
from ...graphs.errors import PlanError
from ...graphs.modules.decoder import Body, Head, Logits
from ...graphs.modules.encoders import make_vision
from ...graphs.modules.layer import Ahead, Linear
from ...graphs.modules.ops import Eager, Scales
from ...graphs.modules.patches import Merger
from ...graphs.modules.quantized import round_caches
from ...graphs.modules.select import Prober, Selector
from ...graphs.modules.vision import Encoder, Projection, Projector
from ...graphs.plan.plan import StagePlan
from ...graphs.progress import Advance, no_advance
from ...graphs.quantization import CacheScheme
from ...graphs.vision_contract import projects_later, vision_readings
from ..sample_prompts import SampleImage, SamplePrompt
from .prompt_state import ANSWER, ENCODER, TEXT, prompt_state


class LayerObserver:
    """An observer that ignores everything; others override what they want to see.

    Pieces come in the order in which they run: ``enter``, its calls, ``leave``. Tensors are to be
    neither changed nor kept.

    Attributes:
        reads: whether ``turns`` and ``read`` are to be called, which takes a probe of every layer.
    """

    reads = False

    def enter(self, kinds: Sequence[np.ndarray]) -> None:
        """Begin a piece; ``kinds`` has the kind of each row of each call to come, in order."""

    def call(self) -> None:
        """Begin the next of these calls. Where a layer leaves all rows as they are, the projections
        of keys and values are the only linear layers in it.
        """

    def given(self, linear: str, rows: Tensor, out: Tensor) -> None:
        """Take what a linear layer does in this call: its input (Q, K) and output."""

    def leave(self, weights: Mapping[str, Tensor]) -> None:
        """End the piece; its weights by the checkpoint's names, valid until this returns."""

    def cached(self, layer: int, keys: Tensor, values: Tensor | None) -> None:
        """Take the keys and values (G, S, d) FP32 that one prompt has cached in a layer: those of
        its prefix, of its own rows that this stage holds, and of its answer. The stage before may
        have cached the layer's keys as well, without values.
        """

    def read(self, prompt: int, layer: int, cosine: np.ndarray, norm: np.ndarray) -> None:
        """Take cosine (N,) and norm (N,), a ``select.Prober``'s view from the last row, of a layer
        without gates through which visual rows of a prompt run.
        """

    def turns(self, layer: int, cosine: np.ndarray) -> None:
        """Take the cosine (Q,) of each row of a prompt before a layer and behind it."""

    def selected(self, prompt: int, order: np.ndarray) -> None:
        """Take the orders (K,) of the tokens that a selection kept: places in the whole prompt."""

    def predicted(self, prompt: int, logits: Tensor) -> None:
        """Take the logits (1 + A, V) of the last prompt row and of each row of the answer."""


def layerwise_pieces(config: ModelConfig, prefix_ids: Sequence[int]) -> int:
    """Return how many pieces with weights ``run_layerwise`` reads."""
    return dense_pieces(config) + (config.text.layers if prefix_ids else 0)


def run_layerwise(
    checkpoint: Checkpoint,
    prompts: Sequence[SamplePrompt],
    plan: StagePlan,
    prefix_ids: Sequence[int] = (),
    *,
    observer: LayerObserver,
    fake_quantised: FakeQuantised | None = None,
    advance: Advance = no_advance,
) -> None:
    """Run all prompts, layer by layer, for an observer.

    Args:
        checkpoint: weights of any type; computed in FP32.
        prompts: the last part of each is text.
        plan: static, of the checkpoint's depth.
        prefix_ids: token ids whose keys and values are computed beforehand; a prompt that begins
            otherwise is run from its first row, as a bundle would.
        observer: sees every linear layer and cache, selections and logits.
        fake_quantised: what linear layers compute with, and what caches keep; the prefix is
            computed in float, as for every bundle, and cached like all rows. None: no rounding.
        advance: called with each of the ``layerwise_pieces(config, prefix_ids)`` pieces; of layers
            that the plan drops whole there are none, and beginnings of layers do not count.

    Raises:
        PlanError: the plan decides per prompt, or is another model's.
        PromptError: a prompt does not end in text.
        CapacityError: a prompt and its answer are longer than the model's context.
    """
    config, text = checkpoint.config, checkpoint.config.text
    if plan.probe is not None:
        raise PlanError(
            f"plan '{plan.name}' decides per prompt, so its stages see other rows each time. "
            "Calibrate a static plan, such as visipruner"
        )
    if plan.fixed_calls:
        raise PlanError(
            f"rows of plan '{plan.name}' compete within each call, and here an answer is one call. "
            "Calibrate a plan whose routers are in the exact form and read one row each"
        )
    check_fit(plan, text.layers, config.visual_tokens)

    def stream_of(module: nn.Module, advance: Advance = advance) -> Streamed:
        return Streamed(checkpoint, module, advance, (Linear,), observer.given, fake_quantised)

    visual = _visual_rows(stream_of, config, plan, prompts, observer)
    prefix = prefix_cache(checkpoint, plan, prefix_ids, advance) if prefix_ids else None
    if prefix is not None and fake_quantised is not None:
        prefix = fake_quantised.prefix(prefix)
    table = checkpoint.load(EMBEDDING)
    states = [
        prompt_state(prompt, rows, plan, table, prefix_ids, text.max_positions)
        for prompt, rows in zip(prompts, visual, strict=True)
    ]
    checkpoint.release()
    del visual  # the states hold the rows, and free them as they go

    cache = "float" if fake_quantised is None else fake_quantised.cache
    body, lm_head = without_weights(lambda: _decoder(config, plan, cache))
    stream = stream_of(nn.ModuleDict({"model": body, "lm_head": lm_head}))
    aheads = without_weights(lambda: _aheads(config, plan, cache))
    stream_ahead = stream_of(nn.ModuleDict({"model": aheads}), no_advance)
    head, prober = Head(text, Eager()), Prober()

    def kept_of(layer: int) -> tuple[Tensor | None, Scales | None]:
        saved = None if prefix is None else prefix[:, layer]
        return saved, None if fake_quantised is None else fake_quantised.scales_of(layer)

    for index, stage in enumerate(plan.stages):
        edge = plan.edges[index] if index < len(plan.edges) else None
        selector = Selector(edge) if edge is not None and edge.op == "select" else None
        ahead = ahead_of(plan, index)
        for state in states:
            state.enter(plan, index, head)
        kinds = [kind for state in states for kind in state.kinds()]
        for number in range(*stage.layers):
            for state in states:
                state.inject(number)
            if str(number) not in body.layers:  # dropped whole
                continue
            attends = number in stage.attention_layers
            gated = number in stage.gated_layers
            ends = number == stage.layers[1] - 1
            with _loaded(stream, body.layers[str(number)], observer, kinds) as run:
                for place, state in enumerate(states):
                    reads = row_readings(plan, index) if ends else ()
                    view = state.through(run, text, stage, number, *kept_of(number), reads)
                    if attends:
                        observer.cached(number, view.key[0], view.value[0])
                    if observer.reads:
                        observer.turns(number, state.turned)
                    if observer.reads and attends and not gated and state.sees:
                        observer.read(place, number, *view.read(prober))
                    if selector is not None and ahead is None and ends and state.sees:
                        observer.selected(place, state.select(plan, selector, view))
        if ahead is not None:
            with _loaded(stream_ahead, aheads.layers[str(ahead)], observer, kinds) as run:
                for place, state in enumerate(states):
                    view = state.ahead(run, text, stage, ahead, *kept_of(ahead))
                    observer.cached(ahead, view.key[0], None)
                    if selector is not None and state.sees:
                        observer.selected(place, state.select(plan, selector, view))
        for state in states:
            state.leave(drop=edge is not None and edge.op == "drop")

    kinds = [np.array([TEXT] + [ANSWER] * state.answer_rows) for state in states]
    with _loaded(stream, Logits(body.norm, lm_head), observer, kinds) as run:
        for place, state in enumerate(states):
            observer.predicted(place, run(state.last_rows()))


@contextmanager
def _loaded(
    stream: Streamed, piece: nn.Module, observer: LayerObserver, kinds: Sequence[np.ndarray]
) -> Iterator[Callable[..., Any]]:
    """Yield what runs a piece, between the observer's ``enter`` and ``leave``."""
    with stream.loaded(piece) as run:
        observer.enter(kinds)

        def call(*given: Any) -> Any:
            observer.call()
            return run(*given)

        yield call
        observer.leave(stream.loaded_weights(piece))


def _visual_rows(
    stream_of: Callable[[nn.Module], Streamed],
    config: ModelConfig,
    plan: StagePlan,
    prompts: Sequence[SamplePrompt],
    observer: LayerObserver,
) -> list[list[Encoded]]:
    """Return what enters the decoder of each image of each prompt.

    All images go through one piece of the vision encoder before the next is loaded.
    """
    runs = [[part for part in prompt.parts if isinstance(part, SampleImage)] for prompt in prompts]
    images = [part for own in runs for part in own if not part.run]

    def through(module: Encoder | Projection, *given: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        stream = stream_of(module)

        def call(piece: nn.Module, *states: Sequence[Tensor]) -> Any:
            counts = [config.vision.tokens * image.layout.tiles for image in images]
            if isinstance(piece, Projector | Merger):
                counts = [image.layout.rows for image in images]
                if config.packs:  # behind the projector
                    counts = [config.rows_of(image.layout.tiles) for image in images]
                if module is not vision:
                    counts = [min(plan.entering, rows) for rows in counts]
            kinds = [np.full(count, ENCODER) for count in counts]
            with _loaded(stream, piece, observer, kinds) as run:
                done = [run(*args) for args in zip(*states, strict=True)]
            return tuple(zip(*done, strict=True)) if isinstance(done[0], tuple) else done

        return module.compose(call, *given)

    if not images:
        return [[] for _ in prompts]
    vision = without_weights(
        lambda: make_vision(config, Eager(), readings=vision_readings(config, plan))
    )
    pixels = [torch.from_numpy(image.pixels) for image in images]
    feeds = [
        [torch.from_numpy(image.layout.feeds[name]) for image in images]
        for name in images[0].layout.feeds
    ]
    encoded = [
        chosen_rows(config, plan, outputs, [hashlib.sha256(image.pixels).hexdigest()])
        for image, *outputs in zip(images, *through(vision, pixels, *feeds), strict=True)
    ]
    if projects_later(config, plan):
        projection = without_weights(lambda: Projection(config, Eager()))
        (projected,) = through(projection, [own.rows for own in encoded])
        encoded = [own._replace(rows=rows) for rows, own in zip(projected, encoded, strict=True)]
    of_image = dict(zip((id(image.pixels) for image in images), encoded, strict=True))
    return [
        [run_of(of_image[id(part.pixels)], part.layout, part.run) for part in own] for own in runs
    ]


def _decoder(config: ModelConfig, plan: StagePlan, cache: CacheScheme) -> tuple[Body, Linear]:
    """Return all layers of all stages, over caches of one type, and the head."""
    text = config.text
    kinds = {
        layer: (mode, stage.norm, (0, 0), plan.routing_of(layer), stage.parts_of(layer))
        for stage in plan.stages
        for layer, mode in enumerate(stage.modes, start=stage.layers[0])
        if stage.parts_of(layer)
    }
    body = Body(text, Eager(), kinds, last=True)
    round_caches(body, cache)
    return body, Linear(Eager(), text.hidden, text.vocab, bias=False)


def _aheads(config: ModelConfig, plan: StagePlan, cache: CacheScheme) -> Body:
    """Return the beginnings of layers by which edges before them score."""
    body = Body(config.text, Eager(), {})
    for stage in range(len(plan.stages)):
        layer = ahead_of(plan, stage)
        if layer is not None:
            body.layers[str(layer)] = Ahead(config.text, Eager())
    round_caches(body, cache)
    return body
