"""Training batches, made on the fly in a process of their own: images with targets or questions."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from ..questions import KINDS, ask
from ..scenes import Scene, make_scene, pick, render_scene
from .architecture import IMAGE_SIZE, MEAN, STD
from .supervision import patch_owners, patch_targets
from .tokenizer import build_tokenizer


@dataclass(frozen=True)
class BatchMix:
    """The composition of a batch.

    Attributes:
        images: scenes per batch.
        questions: questions per scene; 0 gives per-patch targets in their place.
        fewest: objects in the simplest scenes.
        most: objects in the richest scenes.
        turns: share of batches in which every row holds two turns.
        weights: how often each kind is asked.
    """

    images: int
    questions: int = 0
    fewest: int = 3
    most: int = 6
    turns: float = 0.0
    weights: tuple[float, ...] = (1.0,) * len(KINDS)


_BANDS = 4  # questions are padded to the longest of their quarter


class Batches(IterableDataset):
    """An endless stream of batches by one recipe; never a held-out scene."""

    def __init__(self, mix: BatchMix, seed: str):
        self.mix, self.seed = mix, seed
        self.tokenizer = None

    def __iter__(self):
        torch.set_num_threads(1)
        rng = random.Random(f"train {self.seed}")
        mix = self.mix
        self.tokenizer = build_tokenizer() if mix.questions else None
        while True:
            span = mix.most - mix.fewest + 1
            scenes = [
                make_scene(rng, things=mix.fewest + int(rng.random() * span))
                for _ in range(mix.images)
            ]
            pixels = np.stack([_paint(scene, rng) for scene in scenes])
            if mix.questions:
                owners = np.stack([patch_owners(scene) for scene in scenes])
                yield torch.from_numpy(pixels), owners, self._questions(scenes, rng)
            else:
                targets = np.stack([patch_targets(scene) for scene in scenes])
                yield torch.from_numpy(pixels), torch.from_numpy(targets)

    def _questions(self, scenes: list[Scene], rng: random.Random):
        """Return bands of (ids, targets, wanted): `wanted` (B, Q, 6) marks things asked about."""
        turns = 2 if rng.random() < self.mix.turns else 1
        weighted = zip(KINDS, self.mix.weights, strict=True)
        kinds = [kind for kind, weight in weighted for _ in range(int(weight * 4))]
        each = self.mix.questions // turns
        bands: list[list] = [[] for _ in range(_BANDS)]
        for scene in scenes:
            rows = []
            while len(rows) < each:
                made = [ask(scene, pick(rng, kinds), rng) for _ in range(turns)]
                if all(made):
                    parts = [f"{q.text} ASSISTANT: {q.answer}</s>" for q in made]
                    about = made[0].about if turns == 1 else ()
                    wanted = [t in about for t in scene.things] + [False] * 6
                    rows.append(("\n" + "USER: ".join(parts), wanted[:6]))
            encoded = self.tokenizer.encode_batch([r[0] for r in rows], add_special_tokens=False)
            order = sorted(range(each), key=lambda i: len(encoded[i].ids))
            for place, index in enumerate(order):
                bands[place * _BANDS // each].append((encoded[index].ids, rows[index][1]))
        made = []
        for band in bands:
            wanted = torch.tensor([row[1] for row in band]).view(len(scenes), -1, 6)
            encoded = encode_rows([row[0] for row in band], self.tokenizer, len(scenes))
            made.append((*encoded, wanted))
        return made


def encode_rows(rows: list[list[int]], tokenizer, images: int):
    """Return inputs (B, Q, T) and targets (B, Q, T) of token rows; -100 outside the answers."""
    longest = max(map(len, rows)) - 1
    ids = np.full((len(rows), longest), tokenizer.token_to_id("<pad>"), np.int64)
    targets = np.full((len(rows), longest), -100, np.int64)
    speaker, end = tokenizer.token_to_id("ĠASSISTANT"), tokenizer.token_to_id("</s>")
    for index, row in enumerate(rows):
        ids[index, : len(row) - 1] = row[:-1]
        answering = False
        for place, token in enumerate(row[:-1]):
            if place and row[place - 1] == speaker:
                answering = True
            if token == end:
                answering = False
            if answering:
                targets[index, place] = row[place + 1]
    shape = (images, -1, longest)
    return torch.from_numpy(ids).view(shape), torch.from_numpy(targets).view(shape)


def _paint(scene: Scene, rng: random.Random) -> np.ndarray:
    """Draw the image as (3, H, W) uint8: mostly as held-out images are drawn, sometimes rougher."""
    draw = rng.random()
    if draw < 0.7:
        image = render_scene(scene, IMAGE_SIZE)
    elif draw < 0.85:
        image = render_scene(scene, 4 * IMAGE_SIZE, 1).resize((IMAGE_SIZE, IMAGE_SIZE), resample=3)
    else:
        image = render_scene(scene, IMAGE_SIZE, 1)
    return np.asarray(image).transpose(2, 0, 1)


def normalise_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Return (B, 3, H, W) uint8 pixels normalised as the image processor does it."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def stream(mix: BatchMix, seed: str):
    """Return an iterator over batches, made in a process of their own."""
    return iter(DataLoader(Batches(mix, seed), batch_size=None, num_workers=1, prefetch_factor=4))
