"""What FP16 costs the demo model: torch half against torch FP32, stage by stage as in a bundle.

    python -m visistage.bench.fp16 --samples 200

Teacher-forced: both are given FP32's answer token by token, so that each token is compared once. A
CPU computes ONNX graphs of FP16 in FP32; torch's half type really rounds every result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from ..calib.samples import evaluation_samples
from ..compile.checkpoint.checkpoint import open_checkpoint
from ..compile.export.texts import text_facts
from ..compile.planfile import resolve_plan
from ..compile.quantize.fp16_ranges import decide, measure_ranges
from ..graphs.chain.chain import AppendedRows, Chain
from ..graphs.chain.torch_reference import TorchExecutor, load_weights
from ..graphs.fields import to_json
from ..graphs.modules.ops import Eager
from ..graphs.modules.vision import Vision
from ..graphs.plan.plan import StagePlan
from ..graphs.precision import NO_FALLBACK, SAFE_MAX, Fp32Fallback
from ..runtime.image.image import load_image, preprocess
from ..runtime.image.preprocessing import Preprocessing
from .record import save

Question = tuple[Any, str, int]
"""A picture, what is asked, and how many tokens of answer."""


class Staged:
    """A checkpoint's stages in torch, in one type: pixels to logits, decode steps included."""

    def __init__(
        self,
        model: str | Path,
        plan: StagePlan,
        dtype: torch.dtype,
        fallback: Fp32Fallback = NO_FALLBACK,
    ):
        self.checkpoint = open_checkpoint(str(model))
        config = self.checkpoint.config
        self.plan, self.fallback = plan, fallback
        self.weights = {n: self.checkpoint.load(n).to(dtype) for n in self.checkpoint.tensors}
        self.vision = load_weights(Vision(config, Eager(), fallback), self.weights)
        texts = text_facts(self.checkpoint)
        self.encoder = texts.encoder
        self.preprocessing = Preprocessing.from_dict(texts.preprocessing)

    def executor(self) -> TorchExecutor:
        """What runs one question: its caches are empty."""
        text = self.checkpoint.config.text
        return TorchExecutor(text, self.plan, self.weights, 1, self.fallback)

    @torch.no_grad()
    def answer(
        self, image: Any, question: str, new: int, forced: Sequence[int] | None = None
    ) -> tuple[list[int], Tensor, bool]:
        """``new`` tokens, however the model would like to end: greedy, or those ``forced``.

        Returns:
            The tokens, the logits (new, V) that each was or would have been chosen from, and
            whether every cached key and value is finite.
        """
        executor = self.executor()
        runner = Chain(self.plan, executor)
        pixels = preprocess(load_image(image), self.preprocessing)
        segments, at = [], 0
        for part in self.encoder.encode(question, images=1).segments:
            if part.is_image:
                rows = self.vision(torch.from_numpy(pixels[None]))
            else:
                rows = executor.embed(torch.tensor([part.ids]))
            order = np.arange(at, at + rows.shape[1], dtype=np.int32)[None]
            segments.append(AppendedRows(part.is_image, rows, order, order))
            at += rows.shape[1]
        out, tokens = [runner.prefill(segments).logits[0]], []
        while True:
            tokens.append(int(out[-1].argmax()) if forced is None else forced[len(tokens)])
            if len(tokens) == new:
                break
            position = np.full((1, 1), at + len(tokens) - 1, np.int32)
            rows = executor.embed(torch.tensor([tokens[-1:]]))
            out.append(runner.decode(AppendedRows(False, rows, position, position))[0])
        finite = all(t.isfinite().all() for stage in executor.caches for p in stage for t in p)
        return tokens, torch.stack(out), finite


@dataclass(frozen=True)
class Compared:
    """FP16 against FP32.

    agreement: share of equal tokens. error, typical_error: the largest difference of two logits,
    and the root mean square of all, relative to the spread of FP32's. finite: no infinity or NaN
    in any logit, key or value.
    """

    tokens: int
    agreement: float
    error: float
    typical_error: float
    finite: bool


def compared(
    model: str | Path, plan: StagePlan, fallback: Fp32Fallback, asked: Iterable[Question]
) -> Compared:
    """Ask torch half, under ``fallback``, what torch FP32 answers."""
    full = Staged(model, plan, torch.float32)
    half = Staged(model, plan, torch.float16, fallback)
    equal: list[bool] = []
    worst, squares, finite = [], [], True
    for image, question, new in asked:
        tokens, wanted, _ = full.answer(image, question, new)
        _, got, cached = half.answer(image, question, new, forced=tokens)
        finite = finite and cached and bool(got.isfinite().all())
        equal += (got.argmax(-1) == wanted.argmax(-1)).tolist()
        error = (got - wanted) / wanted.std()
        worst.append(float(error.abs().max()))
        squares.append(float(error.pow(2).mean()))
    typical = (sum(squares) / len(squares)) ** 0.5
    return Compared(len(equal), sum(equal) / len(equal), max(worst), typical, finite)


@click.command()
@click.option("--samples", default=200, show_default=True)
@click.option("--tokens", default=3, show_default=True, help="Tokens of every answer.")
def main(samples: int, tokens: int) -> None:
    """Measure the demo model under two plans, and record how far its numbers reach."""
    torch.set_num_threads(1)  # a model this small gains nothing from more
    checkpoint = open_checkpoint("demo")
    config = checkpoint.config
    ranges = measure_ranges(checkpoint, text_facts(checkpoint))
    fallback = decide(ranges)
    asked = [(one.image, one.prompt, tokens) for one in evaluation_samples("demo", None, samples)]
    rows = []
    for name in ("dense", "visipruner"):
        plan = resolve_plan(name, config.text.layers, config.visual_tokens)
        found = compared("demo", plan, fallback, asked)
        rows.append({"plan": name, "questions": samples, **vars(found)})
    farthest = sorted(ranges.items(), key=lambda item: -item[1])[:8]
    rows[0] |= {"limit": SAFE_MAX, "widening": to_json(fallback), "farthest": dict(farthest)}
    save("fp16-demo", f"python -m visistage.bench.fp16 --samples {samples} --tokens {tokens}", rows)


if __name__ == "__main__":
    main()
