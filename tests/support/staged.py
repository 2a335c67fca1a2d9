"""A checkpoint's stages in torch, in one type: the judge of FP16 ranges and of the chain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.texts import text_facts
from visistage.graphs.chain.chain import Chain
from visistage.graphs.chain.enter import entered_rows, positioned
from visistage.graphs.chain.rows import AppendedRows
from visistage.graphs.chain.torch_encoder import TorchEncoder
from visistage.graphs.chain.torch_reference import TorchExecutor
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.precision import NO_FALLBACK, Fp32Fallback
from visistage.runtime.image.image import load_image, pixel_key, preprocess
from visistage.runtime.image.preprocessing import Preprocessing

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
        self.vision = TorchEncoder(config, plan, self.weights, fallback)
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
        decoded = load_image(image)
        pixels = preprocess(decoded, self.preprocessing)
        key = pixel_key(decoded, self.preprocessing)
        segments, at = [], 0
        for part in self.encoder.encode(question, images=1).segments:
            if part.is_image:
                image = self.vision(torch.from_numpy(pixels[None]), [key])
                segments.append(entered_rows(self.plan, image, at))
                at += self.plan.span
            else:
                rows = executor.embed(torch.tensor([part.ids]))
                order = np.arange(at, at + rows.shape[1], dtype=np.int32)[None]
                at += rows.shape[1]
                opens = not segments  # an image follows
                segments.append(AppendedRows(False, rows, order, order, prefix=opens))
        segments, lag = positioned(self.plan, segments)
        out, tokens = [runner.prefill(segments).logits[0]], []
        while True:
            tokens.append(int(out[-1].argmax()) if forced is None else forced[len(tokens)])
            if len(tokens) == new:
                break
            position = np.full((1, 1), at + len(tokens) - 1, np.int32)
            rows = executor.embed(torch.tensor([tokens[-1:]]))
            out.append(runner.decode(AppendedRows(False, rows, position - lag, position))[0])
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
