"""Answers in the form of a JSON schema: which tokens may come next, by llguidance.

The library bounds what a grammar may cost; compiled grammars are kept, the last few of them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...graphs.commands import install
from ...graphs.errors import MissingDependencyError, PromptError
from ...graphs.fields import show

MAX_SCHEMA_CHARS = 64 << 10

KEPT = 32
"""Compiled grammars that are kept."""


def schema_text(schema: Any) -> str:
    """Return a JSON schema, a mapping or its text, as text.

    Raises:
        PromptError: it is no JSON object, or too long.
    """
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        if len(text) <= MAX_SCHEMA_CHARS and not isinstance(json.loads(text), dict):
            raise ValueError
    except (TypeError, ValueError, RecursionError):
        raise PromptError(
            f"schema is {show(schema)}; expected a JSON schema, an object such as "
            '{"type": "object", "properties": {...}}.'
        ) from None
    if len(text) > MAX_SCHEMA_CHARS:
        raise PromptError(
            f"the schema has {len(text)} characters; the limit is {MAX_SCHEMA_CHARS}. Shorten it."
        )
    return text


class Grammars:
    """Grammars over one tokenizer.

    Args:
        tokenizer: the file ``tokenizer.json``.
        vocab: number of logits.
        eos: ids that end an answer.

    Raises:
        MissingDependencyError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Path, vocab: int, eos: Iterable[int]):
        try:
            import llguidance
        except ImportError as error:
            raise MissingDependencyError(
                f"schema= needs llguidance, which is not installed. {install('schema')}"
            ) from error
        self._library, self.vocab = llguidance, vocab
        text = tokenizer.read_text(encoding="utf-8")
        self._tokens = llguidance.LLTokenizer(text, vocab, sorted(eos))
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def answer(self, schema: str) -> Grammar:
        """Return the grammar of a new answer.

        Raises:
            PromptError: the schema cannot be used.
        """
        matcher = self._kept.pop(schema, None)
        if matcher is None:
            matcher = self._compiled(schema)
        self._kept[schema] = matcher
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return Grammar(matcher.deep_copy(), self.vocab)

    def _compiled(self, schema: str) -> Any:
        # White space of any length could go on without end, which greedy models do.
        form: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        compiled = self._library.LLMatcher.grammar_from_json_schema(schema, overrides=form)
        matcher = self._library.LLMatcher(self._tokens, compiled, log_level=0)
        if matcher.is_error():
            reason = _first_line(matcher)
            raise PromptError(f"the schema cannot be used: {reason}. Simplify or correct it.")
        return matcher


class Grammar:
    """The place of one answer in a grammar."""

    def __init__(self, matcher: Any, vocab: int):
        self._matcher = matcher
        self._mask = np.zeros(-(-vocab // 32), np.int32)

    @property
    def complete(self) -> bool:
        """True once nothing may follow."""
        return self._matcher.is_stopped()

    def allowed(self, logits: np.ndarray) -> np.ndarray:
        """Return a copy of logits (V,) with -inf for tokens that may not come next."""
        mask = self._mask
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(logits)]
        return np.where(bits == 1, logits, -np.inf).astype(logits.dtype)

    def take(self, token: int) -> None:
        """Go on by one token."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        """Raise where the library gave up: a limit, as all its tokens were allowed."""
        if self._matcher.is_error():
            reason = _first_line(self._matcher)
            raise PromptError(f"the schema takes too much computing: {reason}. Simplify it.")


def _first_line(matcher: Any) -> str:
    return matcher.get_error().strip().partition("\n")[0].rstrip(".")


def biased(logits: np.ndarray, bias: Mapping[int, float]) -> np.ndarray:
    """Return a copy of logits (V,) with ``bias`` added to those of its ids."""
    out = logits.copy()
    ids = np.fromiter(bias, np.int64, len(bias))
    out[ids] += np.fromiter(bias.values(), out.dtype, len(bias))
    return out
