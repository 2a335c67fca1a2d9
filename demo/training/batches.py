"""Training batches, made on the fly in a process of their own: images with targets or questions."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from ..easy_vqa import EasyQuestions, question_kind
from ..questions import KINDS, Question, ask
from ..scenes import Scene, make_scene, pick, render_scene
from ..worlds import DEMO, World
from .architecture import MEAN, STD
from .supervision import fact_classes, patch_owners, patch_targets, thing_facts

NEGATED = 3
"""Ratio of draws of a negated question of easy-VQA to those of another."""


@dataclass(frozen=True)
class BatchMix:
    """The composition of a batch.

    Attributes:
        images: scenes per batch.
        questions: questions per scene; 0 gives none.
        things: least and greatest number of objects, those of `world` where None.
        few: share of scenes with one or two objects instead.
        turns: share of batches in which every row holds two turns.
        weights: how often each kind is asked.
        world: what scenes and questions are like.
        easy_vqa: images and questions of easy-VQA's training split instead.
    """

    images: int
    questions: int = 0
    things: tuple[int, int] | None = None
    few: float = 0.0
    turns: float = 0.0
    weights: tuple[float, ...] = (1.0,) * len(KINDS)
    world: World = DEMO
    easy_vqa: bool = False


@dataclass(frozen=True)
class Band:
    """Questions of about one length, Q to each of B images, padded to T tokens.

    Attributes:
        ids: (B, Q, T) token ids.
        targets: (B, Q, T) the token that follows, -100 outside the answers.
        wanted: (B, Q, most things) which things the question is about.
        marks: (B, Q, 2, 3 + facts) the phrases of the question, at most two: index of the last
            token (-1: no phrase), facts of the one thing it names (-1: none or several), how many
            things fit, and which thing it is (-1: not one).
    """

    ids: torch.Tensor
    targets: torch.Tensor
    wanted: torch.Tensor
    marks: torch.Tensor

    def speaks(self) -> torch.Tensor:
        """Return the row that gives the answer's first token, shaped as marks: (B, Q, 1, 1)."""
        return (self.targets >= 0).float().argmax(-1)[..., None, None]


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, H, W) with targets of their patches and bands of questions.

    `owners` (B, N) and `patches` (B, N, targets) are None where the renderer did not draw them.
    """

    pixels: torch.Tensor
    owners: torch.Tensor | None
    patches: torch.Tensor | None
    bands: list[Band]


_BANDS = 4  # questions are padded to the longest of their quarter


class Batches(IterableDataset):
    """An endless stream of batches by one recipe; never a held-out scene.

    `tokenizer` is needed where there are questions.
    """

    def __init__(self, mix: BatchMix, seed: str, tokenizer=None):
        self.mix, self.seed, self.tokenizer = mix, seed, tokenizer

    def __iter__(self):
        torch.set_num_threads(1)
        rng = random.Random(f"train {self.seed}")
        if self.mix.easy_vqa:
            source = EasyQuestions("train", self.mix.world.side)
            while True:
                yield self._easy(source, rng)
        while True:
            yield self._drawn(rng)

    def _drawn(self, rng: random.Random) -> Batch:
        """Return a batch of scenes."""
        mix = self.mix
        fewest, most = mix.things or (mix.world.fewest, mix.world.most)
        scenes = []
        for _ in range(mix.images):
            low, high = (1, 2) if mix.few and rng.random() < mix.few else (fewest, most)
            things = low + int(rng.random() * (high - low + 1))
            scenes.append(make_scene(rng, things=things, world=mix.world))
        pixels = np.stack([_paint(scene, rng) for scene in scenes])
        owners = [patch_owners(scene) for scene in scenes]
        targets = [patch_targets(*pair) for pair in zip(scenes, owners, strict=True)]
        return Batch(
            torch.from_numpy(pixels),
            torch.from_numpy(np.stack(owners)),
            torch.from_numpy(np.stack(targets)),
            self._questions(scenes, rng) if mix.questions else [],
        )

    def _easy(self, source: EasyQuestions, rng: random.Random) -> Batch:
        """Return a batch of easy-VQA, its questions as worded."""
        mix, rows, pixels = self.mix, [], []
        for _ in range(mix.images):
            image = pick(rng, source.images)
            pixels.append(np.asarray(source.image(image)).transpose(2, 0, 1))
            asked = source.questions[image]
            hard = [pair for pair in asked if question_kind(*pair) == "negated"]
            drawn = asked + hard * (NEGATED - 1)
            for _ in range(mix.questions):
                text, answer = pick(rng, drawn)
                rows.append((f"\n{text} ASSISTANT: {answer}</s>", None, None))
        return Batch(torch.from_numpy(np.stack(pixels)), None, None, self._bands(rows, mix.images))

    def _questions(self, scenes: list[Scene], rng: random.Random) -> list[Band]:
        turns = 2 if rng.random() < self.mix.turns else 1
        weighted = zip(KINDS, self.mix.weights, strict=True)
        kinds = [kind for kind, weight in weighted for _ in range(int(weight * 4))]
        each, rows = self.mix.questions // turns, []
        for scene in scenes:
            done = len(rows) + each
            while len(rows) < done:
                made = [ask(scene, pick(rng, kinds), rng) for _ in range(turns)]
                if all(made):
                    parts = [f"{q.text} ASSISTANT: {q.answer}</s>" for q in made]
                    rows.append(
                        ("\n" + "USER: ".join(parts), scene, made[0] if turns == 1 else None)
                    )
        return self._bands(rows, len(scenes))

    def _bands(self, rows: list[tuple[str, Scene | None, Question | None]], images: int):
        """Return bands of (text, scene, question), the same number for each of `images`.

        Where the question is None, nothing is marked.
        """
        world, each = self.mix.world, len(rows) // images
        encoded = self.tokenizer.encode_batch([row[0] for row in rows], add_special_tokens=False)
        banded: list[list[int]] = [[] for _ in range(_BANDS)]
        for first in range(0, len(rows), each):
            order = sorted(range(first, first + each), key=lambda i: len(encoded[i].ids))
            for place, index in enumerate(order):
                banded[place * _BANDS // each].append(index)
        bands = []
        for band in banded:
            wanted = np.zeros((len(band), world.most), bool)
            marks = np.full((len(band), 2, 5 + len(fact_classes(world))), -1, np.float32)
            for place, index in enumerate(band):
                _, scene, question = rows[index]
                if question:
                    wanted[place, : len(scene.things)] = [t in question.about for t in scene.things]
                    mark_phrases(marks[place], encoded[index], scene, question)
            ids, targets = encode_rows([encoded[i].ids for i in band], self.tokenizer, images)
            bands.append(
                Band(
                    ids,
                    targets,
                    torch.from_numpy(wanted).view(images, -1, world.most),
                    torch.from_numpy(marks).view(images, -1, *marks.shape[1:]),
                )
            )
        return bands


def mark_phrases(marks: np.ndarray, encoding, scene: Scene, question: Question) -> None:
    """Write the phrases of `question` into `marks` (2, 3 + facts), as `Band` has them.

    Args:
        marks: filled with -1.
        encoding: the tokens of a line break, the question's text and anything more.
        scene: what is asked about.
        question: at most two names.
    """
    facts, names = thing_facts(scene), question.names
    named = [question.about] if len(names) == 1 else [(thing,) for thing in question.about]
    for mark, name, things, find in zip(
        marks, names, named, (question.text.find, question.text.rfind), strict=False
    ):
        mark[0] = encoding.char_to_token(find(name) + len(name))  # after the line break
        mark[-2] = len(things)
        if len(things) == 1:
            which = scene.things.index(things[0])
            mark[1:-2], mark[-1] = facts[which], which


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
    draw, side = rng.random(), scene.world.side
    if draw < 0.7:
        image = render_scene(scene)
    elif draw < 0.85:
        image = render_scene(scene, 4 * side, 1).resize((side, side), resample=3)
    else:
        image = render_scene(scene, oversample=1)
    return np.asarray(image).transpose(2, 0, 1)


def normalise_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Return (B, 3, H, W) uint8 pixels normalised as the image processor does it."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def stream(mix: BatchMix, seed: str, tokenizer=None):
    """Return an iterator over batches, made in a process of their own."""
    batches = Batches(mix, seed, tokenizer)
    workers = {"num_workers": 1, "prefetch_factor": 4, "multiprocessing_context": "fork"}
    return iter(DataLoader(batches, batch_size=None, **workers))
