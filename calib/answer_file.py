"""Answers of an evaluation in a file, a line each, so that a run that ends early is not lost.

    {"digest": "0f...", "sample": "questions.jsonl:3", "text": "2", "first_token_ms": 61.2, ...}

The digest is of everything that the answer depends on: bundle and options (``key``), prompt, and
the image's file by its size and time. Lines that other runs wrote do no harm.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..graphs.errors import CapacityError, DataError
from ..graphs.fields import from_json, parse_json
from ..graphs.files import check_place
from ..graphs.parts import VISION
from .samples import Sample

if TYPE_CHECKING:
    from ..runtime import Answer

logger = logging.getLogger(__name__)

START = b'{"digest": "'
REMEDY = "Name a new file, or one that visistage evaluate wrote: --out answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class Heard:
    """An answer, as far as an evaluation needs it.

    flops_share: its visual FLOPs, of dense 1; visual_rows: cached, all layers together; encoded:
    whether the vision encoder ran for it. None where an older version kept the answer.
    """

    text: str
    first_token_ms: float
    per_token_ms: float | None
    flops_share: float | None = None
    visual_rows: int | None = None
    encoded: bool | None = None

    @classmethod
    def of(cls, answer: Answer) -> Heard:
        """Return what counts of an answer about images."""
        times, plan = answer.timings, answer.plan
        return cls(
            text=answer.text,
            first_token_ms=times.first_token_ms,
            per_token_ms=times.per_token_ms,
            flops_share=plan.visual_flops / max(plan.dense_visual_flops, 1),
            visual_rows=sum(plan.visual_tokens_per_layer),
            encoded=VISION in times.graphs_ms,
        )


@dataclass(frozen=True, kw_only=True)
class _Line(Heard):
    """A line of the file."""

    digest: str
    sample: str


class AnswerFile:
    """The file of one evaluation: ``key`` names bundle and options, as JSON.

    Raises:
        DataError: the file holds something else.
        CapacityError: it cannot be read or written.
    """

    def __init__(self, file: Path, key: Any):
        self.file, self.key, self.full = file, json.dumps(key), False
        try:
            if check_place(file) is None:
                raise DataError(f"{file} is no regular file, which answers are kept in. {REMEDY}")
            content = file.read_bytes() if file.exists() else b""
            *lines, rest = content.split(b"\n")
            self._known = dict(map(self._read, lines, range(1, len(lines) + 1)))
            if not START.startswith(rest[: len(START)]):
                self._read(rest, len(lines) + 1)
            elif rest:  # the last run was killed while it wrote
                os.truncate(file, len(content) - len(rest))
        except OSError as error:
            raise CapacityError(
                f"answers cannot be kept in {file}: {error.strerror}. {REMEDY}"
            ) from None

    def find(self, sample: Sample) -> Heard | None:
        """Return the answer to a sample, if it is known."""
        return self._known.get(self._digest(sample))

    def add(self, sample: Sample, answer: Heard) -> None:
        """Keep the answer to a sample, while there is room."""
        if self.full:
            return
        digest = self._digest(sample)
        line = json.dumps({"digest": digest, "sample": sample.name, **asdict(answer)})
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:  # the answers themselves are worth more
            logger.warning("%s keeps no more answers: %s", self.file, error.strerror)
            self.full = True

    def _read(self, line: bytes, number: int) -> tuple[str, Heard]:
        where = f"{self.file}:{number}"
        data = parse_json(line, DataError, REMEDY, where)
        found = from_json(_Line, data, DataError, REMEDY, where, defaults=True)
        heard = {field.name: getattr(found, field.name) for field in fields(Heard)}
        return found.digest, Heard(**heard)

    def _digest(self, sample: Sample) -> str:
        if isinstance(sample.image, Path):
            status = os.stat(sample.image) if os.path.exists(sample.image) else None
            shown: Any = [str(sample.image), status and [status.st_size, status.st_mtime_ns]]
        else:
            shown = hashlib.sha256(sample.image.tobytes()).hexdigest()
        return hashlib.sha256(json.dumps([self.key, sample.prompt, shown]).encode()).hexdigest()
