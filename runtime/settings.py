"""The options of an answer, as callers give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

from ..graphs.errors import PromptError
from ..graphs.fields import show
from .prompt_parts import PromptPart
from .text.detokenize import checked_stops
from .text.grammar import schema_text
from .text.sampling import Sampling, whole_number
from .writing import AnswerRequest

if TYPE_CHECKING:
    from .loaded import LoadedBundle

DEFAULT_MAX_TOKENS = 128
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 1e9
MOST_DIGITS = 20


@dataclass(frozen=True)
class AnswerSettings:
    """See the module.

    Attributes:
        max_tokens: the answer's longest length in tokens.
        max_new_tokens: the same, by the name that transformers gives it.
        stop: strings that end the answer (and are not part of it), besides the checkpoint's.
        temperature: 0 takes the most likely token; this and the next ones are fields of
            ``Sampling``. None: as the checkpoint's generation config says, else greedy.
        top_p: draws from the most likely tokens of this total.
        top_k: draws from so many of them.
        min_p: drops tokens less likely than this share of the best one.
        repetition_penalty: lowers what prompt and answer hold already.
        seed: repeats a draw.
        sampling: all of these together, in place of the checkpoint's; those given count more.
        logit_bias: numbers added to the logits of token ids, at most ``MAX_BIASES`` of them.
        logprobs: how many of the most likely tokens the answer names for each of its own, with
            their log-probabilities; 0 names its own only, None nothing.
        schema: a JSON schema that the answer follows, as a mapping or as text.

    Raises:
        PromptError: a value that cannot be used.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    max_new_tokens: int | None = None
    stop: Sequence[str] | str = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    sampling: Sampling | None = None
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    schema: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        limit = whole_number("max_tokens", self.max_tokens, 1)
        if self.max_new_tokens is not None:
            if limit not in (DEFAULT_MAX_TOKENS, self.max_new_tokens):
                raise PromptError(
                    f"max_tokens is {limit} and max_new_tokens {show(self.max_new_tokens)}; they "
                    "are two names of one thing. Give one."
                )
            limit = whole_number("max_new_tokens", self.max_new_tokens, 1)
        object.__setattr__(self, "max_tokens", limit)
        object.__setattr__(self, "stop", checked_stops(self.stop))
        if self.logprobs is not None:
            count = whole_number("logprobs", self.logprobs, 0)
            if count > MAX_LOGPROBS:
                raise PromptError(f"logprobs is {count}; at most {MAX_LOGPROBS} are named.")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if self.schema is not None:
            object.__setattr__(self, "schema", schema_text(self.schema))
        if not isinstance(self.sampling, (Sampling, NoneType)):
            raise PromptError(
                f"sampling is {show(self.sampling)}; expected runtime.Sampling(temperature=0.7), "
                "or temperature=0.7 without it."
            )

    def request(
        self,
        model: LoadedBundle,
        parts: Sequence[PromptPart],
        started: float,
        preprocess_ms: float,
    ) -> AnswerRequest:
        """Return the request of an answer of ``model``, whose own settings fill the gaps.

        Raises:
            PromptError: a value outside its range, or too many stop strings.
        """
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }
        sampling = (self.sampling or model.sampling).with_given(given)
        stop = checked_stops((*self.stop, *model.stops))
        bias = self.logit_bias or {}
        vocab = model.bundle.manifest.config.text.vocab
        beyond = [id_ for id_ in bias if id_ >= vocab]
        if beyond:
            raise PromptError(f"logit_bias names token {beyond[0]}; ids end at {vocab - 1}.")
        return AnswerRequest(
            parts,
            self.max_tokens,
            stop,
            sampling,
            started,
            preprocess_ms,
            bias,
            self.logprobs,
            None if self.schema is None else model.grammars.answer(str(self.schema)),
        )


def _checked_bias(bias: Any) -> dict[int, float]:
    """Return a bias with plain numbers; ids may be text, as JSON has them."""
    if not isinstance(bias, Mapping) or len(bias) > MAX_BIASES:
        raise PromptError(
            f"logit_bias is {show(bias)}; expected at most {MAX_BIASES} numbers by token id."
        )
    checked = {}
    for name, value in bias.items():
        written = isinstance(name, str) and name.isdecimal() and len(name) < MOST_DIGITS
        id_ = whole_number("logit_bias", int(name) if written else name, 0)
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not known or not abs(value) <= MAX_BIAS:
            raise PromptError(
                f"logit_bias of token {id_} is {show(value)}; expected a number, at most "
                f"{MAX_BIAS:g} either way."
            )
        checked[id_] = float(value)
    return checked
