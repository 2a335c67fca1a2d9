"""Accuracy during training: held-out questions, one an image, greedy, to the last token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch

from ..heldout import HeldOutSample
from . import packed
from .batches import encode_rows, normalise_pixels

Test = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]


def prepare_test(tokenizer, samples: Iterable[HeldOutSample]) -> Test:
    """Return pixels, ids, targets and kinds of `samples`, one question per image."""
    samples = list(samples)
    pixels = torch.from_numpy(np.stack([np.asarray(s.image).transpose(2, 0, 1) for s in samples]))
    texts = [f"{s.prompt.split('<image>')[1]} {s.answer}</s>" for s in samples]
    rows = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    ids, targets = encode_rows(rows, tokenizer, len(samples))
    return pixels, ids, targets, [s.kind for s in samples]


@torch.no_grad()
def answer_accuracy(
    model, prefix: torch.Tensor, test: Test, staging=packed.DENSE_STAGES, rows: int = 14_400
) -> dict[str, float]:
    """Return the share of answers that are right to the last token, by kind and "all".

    `rows` is the number of visual tokens that are computed at once.
    """
    pixels, ids, targets, kinds = test
    right: list[bool] = []
    chunk = max(1, rows // model.config.image_seq_length)
    for lo in range(0, len(kinds), chunk):
        part = slice(lo, lo + chunk)
        features = packed.visual_features(model, normalise_pixels(pixels[part]))
        last = (targets[part, 0] >= 0).float().argmax(-1)
        hidden = packed.forward(model, features, prefix, [ids[part]], staging, last)[0]
        best = model.lm_head(hidden).argmax(-1)
        right += ((best == targets[part]) | (targets[part] < 0)).all(-1)[:, 0].tolist()
    table = defaultdict(list)
    for kind, hit in zip(kinds, right, strict=True):
        table[kind].append(hit)
        table["all"].append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in table.items()}
