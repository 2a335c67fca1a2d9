"""Questions about images with right answers, from a JSONL file. Nothing is dropped silently.

    {"image": "photos/1.jpg", "prompt": "How many dogs?", "answer": "2", "type": "count"}

One object a line; ``image`` is relative to the file, ``type`` may be left out, and ``answer`` where
nothing is compared with it. Every line is checked before the first one is used. Images are opened
later, when they are asked about: a damaged one shows then.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..demo.heldout import held_out
from ..demo.worlds import WORLDS
from ..graphs.errors import DataError
from ..graphs.fields import Words, from_json, parse_json, reject

REMEDY = 'Write one object a line: {"image": "photo.jpg", "prompt": "...", "answer": "..."}'
MAX_LINE_CHARACTERS = 1 << 20
_OWN = " and ".join(f"'{model}'" for model in WORLDS)

EVALUATION_SCENES = 200
"""Held-out scenes of the demo that an evaluation asks by default."""

CALIBRATION_SCENES = 120
"""Held-out scenes of the demo that a calibration reads by default."""

CALIBRATION_SERIES = 1000
"""The series of held-out scenes that calibrates the demo. Evaluations ask series 0, and a scene of
one is not in the other (tests/calib/test_calibrate.py)."""


@dataclass(frozen=True)
class Sample:
    """One question: ``name`` says where it is from, ``image`` is a path or an image in memory.

    ``answer`` is empty where none is known.
    """

    name: str
    image: Any
    prompt: str
    answer: str
    type: str | None = None


def read_samples(
    path: str | Path, limit: int | None = None, *, answers: bool = True
) -> list[Sample]:
    """Return the first ``limit`` samples of a JSONL file, in its order; all of it is checked.

    Args:
        path: the file, or a folder that holds exactly one.
        limit: how many at most; None takes all.
        answers: whether each must have one.

    Raises:
        DataError: unreadable, empty, or a line that is no sample; names file and line.
    """
    path = samples_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"{path}: cannot read samples: {reason}. Expected UTF-8 text. {REMEDY}"
        ) from None
    samples = [
        _sample(line, f"{path}:{number}", path.parent, answers)
        # Not splitlines(): it also breaks at characters that may stand inside a JSON string.
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not samples:
        raise DataError(f"{path}: found no samples, expected one JSON object a line.")
    return samples[:limit]


def demo_samples(count: int, series: int = 0, model: str = "demo") -> list[Sample]:
    """Return held-out scenes of a model of ``WORLDS``, one question each."""
    return [
        Sample(f"scene {number}", made.image, made.question, made.answer, made.kind)
        for number, made in enumerate(held_out(count, series, world=WORLDS[model]))
    ]


def evaluation_samples(model: str, data: Path | None, count: int | None) -> list[Sample]:
    """Return the samples of ``data``, or the held-out scenes of a demo model.

    Raises:
        DataError: unusable data, or none for a model that brings none.
    """
    if data is not None:
        return read_samples(data, count)
    if model not in WORLDS:
        raise DataError(
            f"there are no questions for model '{model}' in this package, only for {_OWN}. "
            "Give a JSONL file: --data questions.jsonl"
        )
    return demo_samples(count or EVALUATION_SCENES, model=model)


def calibration_samples(
    model: str, data: Path | None, count: int | None
) -> tuple[list[Sample], tuple[str, ...]]:
    """Return samples, with answers or without, and the names of the files that they are from.

    Raises:
        DataError: unusable data, or none for a model that brings none.
    """
    if data is not None:
        return read_samples(data, count, answers=False), (samples_file(data).name,)
    if model not in WORLDS:
        raise DataError(
            f"there are no samples for model '{model}' in this package, only for {_OWN}. Give "
            "images and prompts of the kind that it will be asked: --data questions.jsonl"
        )
    samples = demo_samples(count or CALIBRATION_SCENES, CALIBRATION_SERIES, model)
    return samples, (f"{model} scenes, series {CALIBRATION_SERIES}",)


def samples_file(path: str | Path) -> Path:
    """Return ``path``, or the only JSONL file in it where it is a folder.

    Raises:
        DataError: a folder with none, or with several.
    """
    path = Path(path)
    if not os.path.isdir(path):
        return path
    found = sorted(file.name for file in path.glob("*.jsonl"))
    if len(found) != 1:
        names = f": {', '.join(found[:5])}" if found else ""
        raise DataError(
            f"{path}: cannot read samples: found {len(found)} files *.jsonl{names}, expected "
            "exactly one. Name the file: --data questions.jsonl"
        )
    return path / found[0]


def reject_unreadable(unreadable: Sequence[tuple[str, str]]) -> NoReturn:
    """Raise the error for samples of which none can be used."""
    first = ", the first because: {}: {}".format(*unreadable[0]) if unreadable else ""
    raise DataError(
        f"none of {len(unreadable)} samples could be read{first}. "
        "Give samples with images that can be opened, and prompts that can be asked."
    )


def normalise_answer(answer: str) -> str:
    """Return the form in which two answers are compared.

    Case, white space at the ends and its amount do not count, nor does punctuation, except where it
    makes another number: a sign before a digit, a point or colon between two. ``"Bottom-right."``
    equals ``"bottom right"``, ``"3.5"`` does not equal ``"35"``.
    """
    text = unicodedata.normalize("NFKC", answer).casefold()
    kept = [
        " " if _is_punctuation(character) and not _in_number(text, at) else character
        for at, character in enumerate(text)
    ]
    return " ".join("".join(kept).split())


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def _in_number(text: str, at: int) -> bool:
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    if not after.isdigit():
        return False
    if text[at] in ".,:":
        return before.isdigit()
    return text[at] == "-" and not before.isalnum()


@dataclass(frozen=True)
class _Line:
    """The keys of a line."""

    image: str
    prompt: str
    answer: str = ""
    type: str = ""


def _sample(line: str, where: str, folder: Path, answers: bool) -> Sample:
    if len(line) > MAX_LINE_CHARACTERS:
        raise DataError(
            f"{where}: found {len(line)} characters, expected at most {MAX_LINE_CHARACTERS}. "
            "Is this a JSONL file of samples?"
        )
    data = parse_json(line, DataError, REMEDY, where)
    found = from_json(_Line, data, DataError, REMEDY, where, defaults=True)
    if answers and "answer" not in data:
        reject(f"{where}: answer", Words("nothing"), "a value", DataError, REMEDY)
    for key, value in data.items():
        if not value.strip():
            reject(f"{where}: {key}", value, "text that is not empty", DataError, REMEDY)
    if found.answer and not normalise_answer(found.answer):
        raise DataError(
            f"{where}: answer {found.answer!r} is punctuation only, which is left out when "
            "answers are compared. Ask for a word or a number."
        )
    return Sample(where, folder / found.image, found.prompt, found.answer, found.type or None)
