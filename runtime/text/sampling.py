"""Logits -> the next token id: greedy, or temperature, top-k, top-p and min-p, in numpy.

The order of the steps and the resulting distribution are those of ``transformers`` (repetition
penalty, temperature, top-k, top-p, min-p). The random numbers are numpy's, so a seed repeats a run
of visistage, not a run of torch. This module knows neither tokenizers nor stages.
"""

import difflib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ...graphs.errors import ModelError, PromptError, VisistageError
from ...graphs.fields import show

logger = logging.getLogger(__name__)

# Fields of generation_config.json that change which token comes next and that we do not implement,
# by the value that switches them off, () for any empty one. Null does, too; the rest is refused.
_OFF_TEXT: dict[Any, str] = {
    1: "num_beams num_beam_groups num_return_sequences typical_p guidance_scale "
    "encoder_repetition_penalty",
    0: "penalty_alpha epsilon_cutoff eta_cutoff no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "min_length min_new_tokens token_healing",
    (): "bad_words_ids force_words_ids constraints suppress_tokens begin_suppress_tokens "
    "sequence_bias",
    None: "dola_layers top_h exponential_decay_length_penalty forced_bos_token_id "
    "forced_eos_token_id watermarking_config",
}
_MUST_BE_OFF = {name: off for off, names in _OFF_TEXT.items() for name in names.split()}
# Fields that are read here, or that do not change the choice of a token. Lengths (max_*) and stop
# strings are up to the caller.
_HARMLESS_TEXT = """
do_sample temperature top_k top_p min_p repetition_penalty renormalize_logits remove_invalid_values
bos_token_id eos_token_id pad_token_id decoder_start_token_id max_length max_new_tokens max_time
stop_strings use_cache cache_implementation cache_config return_legacy_cache early_stopping
length_penalty low_memory diversity_penalty output_attentions output_hidden_states output_scores
output_logits return_dict_in_generate transformers_version prefill_chunk_size disable_compile
compile_config use_mtp is_assistant assistant_early_exit assistant_confidence_threshold
assistant_lookbehind target_lookbehind num_assistant_tokens num_assistant_tokens_schedule
prompt_lookup_num_tokens max_matching_ngram_size generation_kwargs
"""
_HARMLESS = frozenset(_HARMLESS_TEXT.split())


@dataclass(frozen=True)
class Sampling:
    """A rule for choosing the next token; immutable and validated.

    Attributes:
        temperature: 0 is greedy (the most likely token; ties go to the lowest id). Above 0, logits
            are divided by it and a token is drawn.
        top_k: keep the k most likely tokens (ties with the k-th stay); 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1]; 1 keeps
            all.
        min_p: drop tokens less likely than this share of the best one, in [0, 1]; 0 drops none.
        repetition_penalty: above 0; logits of ids seen before are divided (positive) or multiplied
            (negative) by it. It acts on greedy choices too. 1 does nothing.
        seed: of the random numbers, at least 0; None takes a fresh one.

    Raises:
        PromptError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check = partial(_check, self)
        check("temperature", float, "0 (greedy) or above", lambda v: v >= 0)
        check("top_k", int, "a whole number, 0 (off) or above", lambda v: v >= 0)
        check("top_p", float, "in (0, 1]; 1 switches it off", lambda v: 0 < v <= 1)
        check("min_p", float, "in [0, 1]; 0 switches it off", lambda v: 0 <= v <= 1)
        check("repetition_penalty", float, "above 0; 1 switches it off", lambda v: v > 0)
        if self.seed is not None:
            check("seed", int, "a whole number, 0 or above", lambda v: v >= 0)

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any] | None, **overrides: Any
    ) -> "Sampling":
        """Read the defaults of a checkpoint's ``generation_config.json`` as transformers does.

        ``do_sample`` false or absent is greedy, and then its temperature, top_k, top_p and min_p
        are not used. With ``do_sample``, what is absent takes transformers' defaults (temperature
        1, top_k 50, top_p 1). ``seed`` never comes from a checkpoint. Unknown fields are reported
        as a warning in the log.

        Args:
            config: the parsed file; None is an empty one.
            **overrides: fields of this class that the caller sets; None leaves the checkpoint's.

        Raises:
            PromptError: the file asks for something that would change the output and is not
                implemented (beam search, n-gram bans, ...), or a value is out of range.
        """
        config = dict(config or {})
        for name, off in _MUST_BE_OFF.items():
            value = config.get(name)
            empty = off == () and value in ([], {})
            if value is not None and value != off and not empty:
                raise PromptError(
                    f"generation_config.json sets {name}={value!r}, which visistage does not "
                    "implement and will not ignore. Remove that field from the file, or set it "
                    "to null."
                )
        for name in sorted(set(config) - _HARMLESS - set(_MUST_BE_OFF)):
            if config[name] is not None and not name.startswith("_"):
                near = difflib.get_close_matches(name, _HARMLESS, n=1)
                hint = f" (did it mean {near[0]}?)" if near else ""
                text = "generation_config.json: unknown field %s is not used%s"
                logger.warning(text, name if name.isidentifier() else show(name), hint)

        def read(name: str, default: Any) -> Any:
            return default if config.get(name) is None else config[name]

        fields: dict[str, Any] = {"repetition_penalty": read("repetition_penalty", 1.0)}
        if read("do_sample", False):
            fields["temperature"] = read("temperature", 1.0)
            fields["top_k"] = read("top_k", 50)
            fields["top_p"] = read("top_p", 1.0)
            fields["min_p"] = read("min_p", 0.0)
        return cls(**fields).with_given(overrides)

    def with_given(self, given: Mapping[str, Any]) -> "Sampling":
        """Return these settings with those of ``given`` that are not None.

        Raises:
            PromptError: a value outside its range.
        """
        return replace(self, **{name: v for name, v in given.items() if v is not None})

    @property
    def greedy(self) -> bool:
        """Return whether no random number is drawn."""
        return self.temperature == 0

    def rng(self) -> np.random.Generator:
        """Return a fresh generator for one answer; the same seed gives the same draws."""
        return np.random.default_rng(self.seed)

    def probabilities(self, logits: np.ndarray, history: Sequence[int] = ()) -> np.ndarray:
        """Return the distribution that the next token is drawn from: (V,) float64, sums to 1.

        For a greedy choice it is 1 at the chosen id. Arguments and errors as in ``choose``.
        """
        scores = self.penalised(logits, history)
        if self.greedy:
            one_hot = np.zeros(scores.size)
            one_hot[int(np.argmax(scores))] = 1.0
            return one_hot
        scores = scores.astype(np.float64)
        # Subtracting first keeps a tiny temperature from overflowing.
        scores = (scores - scores.max()) / self.temperature
        if 0 < self.top_k < scores.size:
            kth = np.partition(scores, scores.size - self.top_k)[scores.size - self.top_k]
            scores[scores < kth] = -np.inf
        if self.top_p < 1:
            rising = np.argsort(scores, kind="stable")
            mass = np.cumsum(_softmax(scores[rising]))
            dropped = mass <= 1 - self.top_p
            dropped[-1] = False
            scores[rising[dropped]] = -np.inf
        if self.min_p > 0:
            likely = _softmax(scores)
            scores[likely < self.min_p * likely.max()] = -np.inf
        return _softmax(scores)

    def penalised(self, logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        """Return the logits themselves; in FP64, and a copy, where the penalty changes any."""
        scores = np.asarray(logits)
        if scores.ndim != 1 or scores.size == 0:
            raise TypeError(f"logits must have shape (V,), got {np.shape(logits)}")
        best = scores.max()
        if not math.isfinite(best):
            kind = "NaN" if math.isnan(best) else "only -inf" if best < 0 else "inf"
            raise ModelError(
                f"the model returned {kind} among its logits; a number was expected for each of "
                f"{scores.size} tokens. FP16 overflow is the usual cause: rebuild with "
                "--precision fp32, or run 'visistage verify' on the bundle."
            )
        if self.repetition_penalty != 1 and len(history):
            scores = scores.astype(np.float64)
            seen = np.unique(np.asarray(history, dtype=np.int64))
            seen = seen[(seen >= 0) & (seen < scores.size)]
            old = scores[seen]
            scores[seen] = np.where(
                old < 0, old * self.repetition_penalty, old / self.repetition_penalty
            )
        return scores


def choose(
    logits: np.ndarray,
    sampling: Sampling,
    history: Sequence[int] = (),
    rng: np.random.Generator | None = None,
) -> int:
    """Choose the next token id.

    Args:
        logits: (V,) float, as the last stage returns them for one sequence.
        sampling: how to choose.
        history: every id before this one, prompt included (for the repetition penalty).
        rng: from ``sampling.rng()``, kept by the caller over one answer; not needed when greedy.

    Raises:
        ModelError: NaN or +inf among the logits, or nothing but -inf.
    """
    if sampling.greedy:
        return int(np.argmax(sampling.penalised(logits, history)))
    if rng is None:
        raise TypeError("choose() needs rng= when temperature is above 0: sampling.rng()")
    total = np.cumsum(sampling.probabilities(logits, history))
    # Drawing below the last sum, and to the right of equal sums, never picks a dropped token.
    return int(np.searchsorted(total, rng.random() * total[-1], side="right"))


def eos_ids(*configs: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Return the ids that end an answer, ascending, from the first file that names any.

    Args:
        *configs: parsed files in order of precedence: ``generation_config.json``, then
            ``config.json`` (its ``text_config`` is looked into as well). None is skipped.

    Raises:
        ModelError: an entry that is no token id, or no file names one.
    """
    for config in configs:
        for holder in (config or {}, (config or {}).get("text_config") or {}):
            found = holder.get("eos_token_id")
            if found is None or found == []:
                continue
            ids = found if isinstance(found, (list, tuple)) else [found]
            if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
                raise ModelError(
                    f"eos_token_id is {found!r}; a token id (0 or above) or a list of them was "
                    "expected. Correct it in generation_config.json or config.json."
                )
            return tuple(sorted(set(ids)))
    raise ModelError(
        "no end-of-sequence token: neither generation_config.json nor config.json has an "
        "eos_token_id. Add one to generation_config.json, else answers would never end."
    )


def stop_strings(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the ``stop_strings`` of a ``generation_config.json``, a string or a list there."""
    found = (config or {}).get("stop_strings") or ()
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def whole_number(
    name: str, value: Any, least: int, error: type[VisistageError] = PromptError
) -> int:
    """Return ``value`` as an int.

    Raises:
        error: it is no whole number (True, 3.0 and "3" are none), or below ``least``.
    """
    fits = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not fits or not least <= value < 2**63:
        raise error(f"{name} is {show(value)}; it must be a whole number, {least} or above.")
    return int(value)


def _check(
    sampling: Sampling, name: str, kind: type, expected: str, fits: Callable[[Any], bool]
) -> None:
    value = getattr(sampling, name)
    kinds = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    try:
        known = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        known = False
    if not known or not fits(value):
        raise PromptError(f"{name} is {show(value)}; it must be {expected}.")


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
