"""A checkpoint's rules for answers, read once: how a token is chosen, and what ends an answer.

The compiler reads them before it works, the session when it loads: what one accepts, both do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...graphs.errors import ModelError
from ...graphs.fields import show
from .detokenize import checked_stops
from .sampling import Sampling, eos_ids, stop_strings


@dataclass(frozen=True)
class GenerationRules:
    """Requests of a ``generation_config.json``, checked.

    Attributes:
        sampling: how a token is chosen, unless the caller says so.
        eos: tokens that end an answer.
        stops: strings that do.
    """

    sampling: Sampling
    eos: frozenset[int]
    stops: tuple[str, ...]

    @classmethod
    def read(cls, generation: Mapping[str, Any], vocab: int) -> GenerationRules:
        """Read the parsed file; ``vocab``: of the model, whose tokens end there.

        Raises:
            PromptError: what would change answers and is not implemented, a value out of range,
                too many stop strings.
            ModelError: no end token, or none that the model can say.
        """
        sampling = Sampling.from_generation_config(generation)
        eos = eos_ids(generation)
        if min(eos) >= vocab:
            raise ModelError(
                f"eos_token_id is {show(list(eos))}, the model's token ids end at {vocab - 1}: "
                "answers would never end. Correct it in generation_config.json."
            )
        return cls(sampling, frozenset(eos), checked_stops(stop_strings(generation)))


def with_eos(generation: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``generation`` with the end tokens of ``config.json`` where it names none.

    As transformers has it in ``model.generation_config``: the outermost that is not null counts.
    """
    for holder in (generation, config, config.get("text_config") or {}):
        if holder.get("eos_token_id") not in (None, []):
            return {**generation, "eos_token_id": holder["eos_token_id"]}
    return dict(generation)
