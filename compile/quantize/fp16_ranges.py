"""Range check of FP16 builds: how far numbers reach, and what must therefore be wider.

FP16 ends at 65504. ONNX Runtime computes FP16 graphs in FP32 on a CPU, which hides an overflow; so
the build looks, in FP32, before it exports a graph:

    images ─▶ vision encoder ─▶ [prefix | visual rows | question] ─▶ every layer ─▶ logits
                     └──────────────── largest |x| of every tensor ────────────────┘

Two prompts run through the unpruned model, one layer's weights in memory at a time. The prefix is
the checkpoint's own: activations that are out of all proportion sit on its first tokens. The vision
encoder sees two whole images; of their visual rows a selection goes on at its true positions (those
that reach farthest, and an even share of the rest), because 7 billion weights times 1200 rows are
minutes on a small machine. Other prompts may reach further: ``precision.RANGE_MARGIN``.

Largest values are kept to two digits, and the decision is made from those: the same bytes wherever
the last bits of a sum fall differently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...graphs.config import ModelConfig
from ...graphs.errors import ModelError, TargetError
from ...graphs.linears import ATTENTION_OUTPUT, MLP_OUTPUT, in_decoder_layer
from ...graphs.modules.decoder import DecoderStage
from ...graphs.modules.encoders import make_vision
from ...graphs.modules.layer import Linear, Norm
from ...graphs.modules.ops import Eager
from ...graphs.modules.stem import PatchEmbedding
from ...graphs.parts import whole_stages
from ...graphs.precision import HALF_MAX, SAFE_MAX, Fp32Fallback, Reason
from ...graphs.presets.presets import preset
from ...graphs.progress import Advance, no_advance
from ...runtime.image.image import load_image, prepare
from ...runtime.image.preprocessing import Preprocessing
from ...runtime.text.prompt import PromptEncoder
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.names import EMBEDDING
from ..export.texts import TextFacts
from ..layer_stream import Streamed, without_weights

RANGES_FILE = "ranges.json"

RANGE_IMAGE = Path(__file__).parents[2] / "demo" / "pictures" / "scene-3.png"
RANGE_QUESTION = "Describe the picture in detail: how many objects are there, and where are they?"

VISUAL_ROWS = 32
"""Visual rows of each image that go through the decoder, at most: half of them the farthest."""

OBSERVED = (Linear, Norm, nn.LayerNorm, PatchEmbedding)

Ranges = dict[str, float]
"""Largest absolute value by tensor: a module of the checkpoint, and ``input``, ``output`` or (of
attention) ``scores``."""


class ObservedEager(Eager):
    """Plain torch that passes attention scores on as they are before the mask."""

    def __init__(self, observe: Callable[[Tensor], None]):
        self.observe = observe

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return ``Eager.scores``, observed."""
        scores = super().scores(q, k)
        self.observe(scores)
        return scores


class _Recorder:
    """Largest absolute values of all tensors that it was called with."""

    def __init__(self) -> None:
        self.ranges: Ranges = {}
        self.layer = ""  # of the module that was called last
        self.ops = ObservedEager(lambda scores: self.note(f"{self.layer}.self_attn scores", scores))

    def hook(self, name: str, given: Tensor, out: Tensor) -> None:
        """Note what a module puts out, and inputs: those of norms are the residual stream."""
        self.layer = name.split(".self_attn")[0]
        if "norm" in name or name.endswith((MLP_OUTPUT, "linear_1")):
            self.note(f"{name} input", given)
        self.note(f"{name} output", out)

    def note(self, tensor: str, values: Tensor) -> None:
        """Take one more tensor into account.

        Raises:
            ModelError: it holds an infinity or a NaN, in FP32.
        """
        largest = float(values.abs().max())
        if not math.isfinite(largest):
            raise ModelError(
                f"{tensor} is not finite even in FP32: the checkpoint's weights are damaged. "
                "Download or convert it again"
            )
        self.ranges[tensor] = max(largest, self.ranges.get(tensor, 0.0))


def measure_ranges(
    checkpoint: Checkpoint,
    texts: TextFacts,
    progress: Advance = no_advance,
) -> Ranges:
    """Return the largest absolute value of every tensor, rounded to two digits.

    ``progress`` counts ``dense_pieces(config)`` pieces in all.

    Raises:
        ModelError: the model is not finite in FP32.
    """
    config, recorder = checkpoint.config, _Recorder()
    vision = without_weights(lambda: make_vision(config, recorder.ops))
    vision_encoder = Streamed(checkpoint, vision, progress, OBSERVED, recorder.hook)
    pixels = range_images(config, Preprocessing.from_dict(texts.preprocessing)).chunk(2)
    side = config.vision.image_size
    feeds = [[torch.from_numpy(each)] * 2 for each in config.layout(side, side).feeds.values()]

    def both(piece: nn.Module, *states: Sequence[Tensor]) -> Any:
        with vision_encoder.loaded(piece) as run:
            done = [run(*own) for own in zip(*states, strict=True)]
        return tuple(zip(*done, strict=True)) if isinstance(done[0], tuple) else done

    visual, *features = map(torch.cat, vision.compose(both, pixels, *feeds))

    rows, order, chosen = _prompts(checkpoint, texts.encoder, visual)
    inject = {}
    for layer, added in zip(config.text.inject, features, strict=True):
        inject[layer] = torch.zeros_like(rows)
        inject[layer][:, chosen[0]] = added[:, chosen[1]]
    plan = preset("dense", config.text.layers, config.visual_tokens)
    stage = without_weights(
        lambda: DecoderStage(config.text, plan, whole_stages(plan)[0], recorder.ops)
    )
    batch, slots = order.shape
    shape = (batch, config.text.kv_heads, slots, config.text.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.text.layers)]
    decoder = Streamed(checkpoint, stage, progress, OBSERVED, recorder.hook)
    first = torch.zeros(batch, dtype=torch.int64)
    out = stage.compose(decoder, rows, order, order, order, first, None, None, caches, inject)
    recorder.note("model.norm input", out.rows)  # of which that norm sees the last row only
    return {name: float(f"{value:.2g}") for name, value in recorder.ranges.items()}


def dense_pieces(config: ModelConfig) -> int:
    """Count the pieces that ``measure_ranges`` runs: stem, layers, projectors, layers, logits."""
    more = len(config.text.inject) + config.vision.final_norm + config.packs
    return config.encoder_depth + config.text.layers + 3 + more


def decide(ranges: Mapping[str, float]) -> Fp32Fallback:
    """Decide what must be wider, of a decoder that reaches as far as ``ranges`` say.

    Raises:
        TargetError: a tensor that nothing can help in FP16; the message names it.
    """
    rows, reasons = False, []
    shifts: dict[str, dict[int, int]] = {ATTENTION_OUTPUT: {}, MLP_OUTPUT: {}}
    for tensor, largest in ranges.items():
        if largest <= SAFE_MAX:
            continue
        module, side = tensor.rsplit(" ", 1)
        layer, own = in_decoder_layer(module) or (-1, "")
        if module.startswith("model.") and "norm" in module and side == "input":
            if not rows:  # the first layer that needs it decides for all
                reasons.append(Reason(tensor, largest, "so rows travel in FP32"))
            rows = True
        elif own in shifts:
            shift = math.ceil(math.log2(largest / SAFE_MAX))
            shifts[own][layer] = max(shift, shifts[own].get(layer, 0))
            reasons.append(Reason(tensor, largest, f"so it is scaled by 2**-{shift}"))
        else:
            raise TargetError(
                f"{tensor} reaches {largest:g}, FP16 is safe up to {SAFE_MAX:g} (it ends at "
                f"{HALF_MAX:g}, other prompts may reach further), and nothing but FP32 helps "
                "there. Build with --precision fp32"
            )
    return Fp32Fallback(rows, shifts[ATTENTION_OUTPUT], shifts[MLP_OUTPUT], tuple(reasons))


def write_ranges(ranges: Ranges, folder: Path) -> list[str]:
    """Write the table into a bundle; return the file's name."""
    (folder / RANGES_FILE).write_text(json.dumps(ranges, indent=0) + "\n", encoding="utf-8")
    return [RANGES_FILE]


def read_ranges(folder: Path) -> Ranges:
    """Read what ``write_ranges`` wrote."""
    return json.loads((folder / RANGES_FILE).read_text(encoding="utf-8"))


def range_images(config: ModelConfig, preprocessing: Preprocessing) -> Tensor:
    """Draw a scene, and a checkerboard of patches, the strongest contrast there is: (2, C, H, W).

    Both have the vision encoder's own size, so that no crop or padding changes them.
    """
    side, patch = config.vision.image_size, config.vision.patch_size
    scene = load_image(RANGE_IMAGE).resize((side, side))
    down, across = np.indices((side, side)) // patch
    board = load_image(np.uint8(255) * ((down + across) % 2).astype(np.uint8))
    layout = config.layout(side, side)
    return torch.from_numpy(
        np.concatenate([prepare(image, preprocessing, layout) for image in (scene, board)])
    )


def _prompts(
    checkpoint: Checkpoint, encoder: PromptEncoder, visual: Tensor
) -> tuple[Tensor, Tensor, tuple[slice, Tensor]]:
    """Return rows (B, Q, D) of a question about each image (B, N, D), order (B, Q) int32, which of
    the rows are visual, and which of the N each of these is.
    """
    batch, count, _ = visual.shape
    table = checkpoint.load(EMBEDDING)
    half = min(count, VISUAL_ROWS // 2)
    farthest = visual.abs().amax((0, 2)).topk(half).indices
    chosen = torch.cat((torch.linspace(0, count - 1, half).round().long(), farthest)).unique()
    rows: list[Tensor] = []
    order, at = [], 0
    place = slice(0)
    for segment in encoder.encode(RANGE_QUESTION, images=1).segments:
        if segment.is_image:
            start = sum(part.shape[1] for part in rows)
            place = slice(start, start + len(chosen))
            rows.append(visual[:, chosen])
            order.append(at + chosen)
            at += count
        else:
            rows.append(table[list(segment.ids)].float().expand(batch, -1, -1))
            order.append(torch.arange(at, at + len(segment.ids)))
            at += len(segment.ids)
    whole = torch.cat(order).int().expand(batch, -1)
    return torch.cat(rows, 1), whole, (place, chosen)
