"""An answer as it is written: logits in, tokens and pieces of text out, until it ends.

It knows sampling, stops and what an answer costs; who computes the logits, and when, is not its
business: a stream computes them one by one, an engine those of many answers in one call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..graphs.chain.rows import Prefilled
from ..graphs.plan.cost import Geometry
from .answer import Answer, ShownTokens, Timings, TokenLogprob, plan_facts
from .image.overlay import Grid
from .prompt_parts import PromptImage, PromptPart, image_rows
from .reuse import Context
from .text.detokenize import TextStream
from .text.grammar import Grammar, biased
from .text.sampling import Sampling, choose

if TYPE_CHECKING:
    from .loaded import LoadedBundle


@dataclass(frozen=True)
class AnswerRequest:
    """A prompt, and the options of its answer, checked.

    started: seconds of ``time.perf_counter`` at which it was asked; preprocess_ms: what its images
    took until then. bias, logprobs: as in ``AnswerSettings``. grammar: of this answer alone.
    """

    parts: Sequence[PromptPart]
    max_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling
    started: float
    preprocess_ms: float
    bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    grammar: Grammar | None = None


class AnswerWriter:
    """One answer under way.

    Attributes:
        tokens: those chosen so far.
        finish: "eos", "stop" or "length" once the answer has ended; None before.
    """

    def __init__(self, model: LoadedBundle, request: AnswerRequest):
        self._model, self._request = model, request
        self._random = request.sampling.rng()
        self._text = TextStream(model.encoder.tokenizer, request.stop)
        self._history = model.ids_of(request.parts)
        self._pieces: list[str] = []
        self._first_ms, self._graphs_ms = 0.0, dict[str, float]()
        self._logprobs: list[TokenLogprob] = []
        self.tokens: list[int] = []
        self.finish: str | None = None

    def take(self, logits: np.ndarray) -> str:
        """Choose the next token by logits (V,); return the text that is now certain, perhaps "".

        The last piece comes with the token that ends the answer.
        """
        request = self._request
        token = choose(self._allowed(logits), request.sampling, self._history, self._random)
        if not self.tokens:
            self._first_ms = self._elapsed_ms()
        if request.logprobs is not None:
            self._logprobs.append(token_logprob(self._name, logits, token, request.logprobs))
        self.tokens.append(token)
        self._history.append(token)
        piece = ""
        if token in self._model.eos:
            self.finish = "eos"
        else:
            piece = self._text.push(token)
            if self._text.stopped:
                self.finish = "stop"
            elif request.grammar is not None and self._completes(token, request.grammar):
                self.finish = "eos"
            elif len(self.tokens) == request.max_tokens:
                self.finish = "length"
        if self.finish is not None:
            piece += self._text.finish()
        if piece:
            self._pieces.append(piece)
        return piece

    def _allowed(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits, biased, of the tokens that may come next."""
        request = self._request
        if request.bias:
            logits = biased(logits, request.bias)
        return logits if request.grammar is None else request.grammar.allowed(logits)

    def _completes(self, token: int, grammar: Grammar) -> bool:
        """Take a token into the grammar; return whether nothing may follow it."""
        grammar.take(token)
        return grammar.complete

    def _name(self, token: int) -> str:
        return self._model.encoder.tokenizer.decode([token], skip_special_tokens=False)

    def note_graphs(self, graphs_ms: dict[str, float]) -> None:
        """Note the milliseconds of each graph until the first token."""
        self._graphs_ms = graphs_ms

    def answer(self, context: Context, done: Prefilled) -> Answer:
        """Return the whole, which has ended, of the prompt ``done`` that ``context`` holds."""
        assert self.finish is not None
        total_ms, later = self._elapsed_ms(), len(self.tokens) - 1
        manifest, parts = self._model.bundle.manifest, self._request.parts
        images = [part for part in parts if isinstance(part, PromptImage) and part.last]
        offered, entered = sum(image_rows(parts)), context.entered(parts)
        return Answer(
            text="".join(self._pieces).strip(),
            tokens=tuple(self.tokens),
            finish=self.finish,
            timings=Timings(
                self._request.preprocess_ms,
                self._graphs_ms,
                self._first_ms,
                (total_ms - self._first_ms) / later if later else None,
                total_ms,
            ),
            plan=plan_facts(
                manifest.plan,
                Geometry.of(manifest.config.text),
                done,
                visual_tokens=offered,
                prompt_rows=context.text_rows_of(parts) + offered,
                entered=[int(at) for positions, _ in entered for at in positions],
            ),
            shown=tuple(
                ShownTokens(
                    image.key,
                    positions,
                    patches,
                    image.layout.rows,
                    Grid.of(manifest.config, image.layout),
                )
                for image, (positions, patches) in zip(images, entered, strict=True)
            ),
            logprobs=None if self._request.logprobs is None else tuple(self._logprobs),
        )

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._request.started) * 1e3


def token_logprob(
    name: Callable[[int], str], logits: np.ndarray, token: int, count: int
) -> TokenLogprob:
    """Return the log-probability of a token under logits (V,), and the ``count`` largest.

    They are those of the model, before sampling, bias or a schema change them.
    """
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    best = np.argsort(-scores, kind="stable")[:count]
    likely = tuple(TokenLogprob(int(at), name(int(at)), float(scores[at])) for at in best)
    return TokenLogprob(token, name(token), float(scores[token]), likely)
