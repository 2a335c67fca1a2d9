"""Many questions, from any source, through an engine; a JSONL file of them, resumed by its lines.

    {"image": "photos/1.jpg", "prompt": "How many dogs?", "max_tokens": 20, "id": "a7"}

``image`` is a path relative to the file, a list of them, or left out; ``prompt`` a question or a
list of messages. Other keys are fields of ``AnswerSettings``; ``id`` is repeated in the result.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..graphs.errors import DataError, VisistageError
from ..graphs.fields import parse_json, show
from ..graphs.files import sync
from .answer import Answer
from .engine import Engine
from .loaded import Images, Question
from .settings import AnswerSettings
from .ticket import Ticket

MAX_LINE = 1 << 20
"""Bytes of a line."""

SETTINGS = tuple(field.name for field in fields(AnswerSettings) if field.name != "sampling")


@dataclass(frozen=True)
class BatchQuestion:
    """One question of many; ``settings`` are fields of ``AnswerSettings``."""

    image: Images
    prompt: Question
    settings: Mapping[str, Any] = field(default_factory=dict)


def infer_batch(
    engine: Engine, questions: Iterable[BatchQuestion | VisistageError]
) -> Iterator[Answer | VisistageError]:
    """Answer questions, as many at once as the engine has lanes; yield the answers in their order.

    What cannot be asked or answered gives the error in its place, as does an error among the
    questions. They are taken one by one, a few ahead of the answers, so there may be any number.
    """
    window: deque[Ticket | VisistageError] = deque()
    ahead = min(2 * engine.lanes, engine.queue)
    for question in questions:
        if len(window) >= ahead:
            yield _outcome(window.popleft())
        if isinstance(question, VisistageError):
            window.append(question)
            continue
        try:
            window.append(engine.submit(question.image, question.prompt, **question.settings))
        except VisistageError as error:
            window.append(error)
    while window:
        yield _outcome(window.popleft())


def _outcome(given: Ticket | VisistageError) -> Answer | VisistageError:
    if isinstance(given, VisistageError):
        return given
    try:
        return given.wait()
    except VisistageError as error:
        return error


class BatchFile:
    """A JSONL file of questions, and one of their results, a line each.

    A result names its line and the digest of what it answers, so that a run that was interrupted
    goes on where it ended, and one over other questions is refused.

    Args:
        source: the questions.
        out: the results; what it holds already is not asked again.

    Attributes:
        total: lines with a question.
        done: how many of them ``out`` had.

    Raises:
        DataError: a file cannot be read, or ``out`` has results of other questions.
    """

    def __init__(self, source: Path, out: Path):
        self.source, self.out = source, out
        digests = {number: _digest(line) for number, line in self._lines()}
        self.total = len(digests)
        self._known = self._results(digests)
        self.done = len(self._known)

    def run(self, engine: Engine) -> Iterator[dict[str, Any]]:
        """Ask what has no result, and write each as it comes; yield them."""
        open_lines: deque[tuple[int, str, Any]] = deque()
        questions = self._questions(open_lines)
        with self.out.open("a", encoding="utf-8", newline="\n") as stream:
            for outcome in infer_batch(engine, questions):
                number, digest, name = open_lines.popleft()
                result = {"line": number, "input": digest}
                if name is not None:
                    result["id"] = name
                if isinstance(outcome, VisistageError):
                    result |= {"error": str(outcome), "kind": type(outcome).__name__}
                else:
                    result |= outcome.to_dict()
                stream.write(json.dumps(result, ensure_ascii=False) + "\n")
                stream.flush()
                yield result
        sync(self.out)

    def _questions(
        self, open_lines: deque[tuple[int, str, Any]]
    ) -> Iterator[BatchQuestion | VisistageError]:
        for number, line in self._lines():
            if number in self._known:
                continue
            question: BatchQuestion | VisistageError
            try:
                question, name = self._question(number, line)
            except DataError as error:
                question, name = error, None
            open_lines.append((number, _digest(line), name))
            yield question

    def _question(self, number: int, line: bytes) -> tuple[BatchQuestion, Any]:
        where = f"{self.source}:{number}"
        if len(line) > MAX_LINE:
            raise DataError(f"{where} has {len(line)} bytes; the limit is {MAX_LINE}.")
        data = parse_json(line, DataError, "Write one object a line.", where)
        if not isinstance(data, dict) or "prompt" not in data:
            raise DataError(f'{where} is {show(data)}; expected {{"prompt": "...", "image": ...}}.')
        unknown = sorted({*data} - {"image", "prompt", "id", *SETTINGS})
        if unknown:
            raise DataError(
                f"{where} has the key {show(unknown[0])}; known are image, prompt, id, "
                f"{', '.join(SETTINGS)}."
            )
        image = data.get("image")
        names = image if isinstance(image, list) else [] if image is None else [image]
        if not all(isinstance(name, str) for name in names):
            raise DataError(f"{where}: image is {show(image)}; expected a path or a list of them.")
        paths = [self.source.parent / name for name in names]
        settings = {name: data[name] for name in SETTINGS if data.get(name) is not None}
        return BatchQuestion(paths, data["prompt"], settings), data.get("id")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.source.open("rb") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield number, line.strip()
        except OSError as error:
            raise DataError(
                f"{self.source}: cannot read questions: {error.strerror}. Expected one JSON object "
                'a line: {"image": "photo.jpg", "prompt": "..."}'
            ) from None

    def _results(self, digests: Mapping[int, str]) -> set[int]:
        """Return the lines that have a result; a last line that was cut off is removed."""
        if not self.out.exists():
            return set()
        known: set[int] = set()
        whole = 0
        for line in self.out.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                result = json.loads(line)
                number, digest = result["line"], result["input"]
            except (ValueError, TypeError, KeyError):
                number, digest = None, None
            if digest is None or digests.get(number) != digest:
                raise DataError(
                    f"{self.out} has results of other questions than {self.source} "
                    f"(line {len(known) + 1}). Name another file with --out, or remove it"
                )
            known.add(number)
        with self.out.open("r+b") as stream:
            stream.truncate(whole)
        return known


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:12]
