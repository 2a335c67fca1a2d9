"""What a bundle takes from a checkpoint besides weights: tokenizer, template, preprocessing.

The compiler asks the runtime's own code what the prefix and the preprocessing are, so that both
always agree; these modules of the runtime need no back end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ...graphs.errors import ModelError
from ...runtime.image.preprocessing import Preprocessing
from ...runtime.text.prompt import TEXT_FILES, PromptEncoder
from ...runtime.text.template import find_template, read_tokenizer_json
from ..checkpoint.checkpoint import Checkpoint
from ..quantize.calibration_file import facts_of

REBUILT = ("LlamaTokenizer", "LlamaTokenizerFast")
"""Tokenizer classes that transformers 5 rebuilds on loading: their ids are those of the rebuilt
tokenizer, not of the file as it lies."""


@dataclass(frozen=True)
class TextFacts:
    """Facts for the manifest; ``files`` maps roles to names in the bundle."""

    prefix_ids: tuple[int, ...]
    preprocessing: dict[str, Any]
    generation: dict[str, Any]
    files: dict[str, str]


def text_facts(checkpoint: Checkpoint) -> TextFacts:
    """Read and check everything first: a build that starts must not fail on a missing template.

    Raises:
        ModelError, PromptError: naming the file that is missing or damaged.
    """
    folder = checkpoint.path
    encoder = PromptEncoder.from_files(folder)
    if encoder.image_token_id != checkpoint.config.image_token_id:
        raise ModelError(
            f"{folder}: config.json says the image token is {checkpoint.config.image_token_id}, "
            f"the tokenizer's {encoder.image_token} is {encoder.image_token_id}. "
            "Use the tokenizer files that belong to this checkpoint"
        )
    preprocessing = Preprocessing.from_files(
        _optional(folder / "processor_config.json"), _optional(folder / "preprocessor_config.json")
    )
    side = checkpoint.config.vision.image_size
    if preprocessing.output_size not in (None, (side, side)):
        raise ModelError(
            f"{folder}: pictures are preprocessed to {preprocessing.output_size}, the tower takes "
            f"{(side, side)}. Use the processor files that belong to this checkpoint"
        )
    generation = _optional(folder / "generation_config.json") or {}
    if "eos_token_id" not in generation:
        config = read_tokenizer_json(folder / "config.json")
        eos = config.get("eos_token_id") or (config.get("text_config") or {}).get("eos_token_id")
        if eos is not None:
            generation = {**generation, "eos_token_id": eos}
    return TextFacts(
        prefix_ids=tuple(prompt_encoder(checkpoint).prefix_ids()),
        preprocessing=preprocessing.to_dict(),
        generation=generation,
        files={role: name for role, name in TEXT_FILES.items() if (folder / name).is_file()},
    )


def fits(
    checkpoint: Checkpoint,
    texts: TextFacts,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, str]:
    """Return ``facts_of`` a checkpoint; ``progress`` is called with bytes of weights read."""
    paths = {role: checkpoint.path / name for role, name in texts.files.items()}
    template = find_template(
        paths,
        checkpoint.json("tokenizer_config.json") or {},
        checkpoint.json("processor_config.json") or {},
    )
    return facts_of(
        checkpoint.raw,
        checkpoint.weight_files,
        template,
        texts.prefix_ids,
        texts.preprocessing,
        progress,
    )


def write_texts(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy the text files; returns their names."""
    names = [name for name in TEXT_FILES.values() if (checkpoint.path / name).is_file()]
    for name in names:
        shutil.copyfile(checkpoint.path / name, folder / name)
    _rebuild_tokenizer(checkpoint, folder)
    return names


def prompt_encoder(checkpoint: Checkpoint) -> PromptEncoder:
    """The encoder as the bundle will have it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_texts(checkpoint, Path(folder))
        return PromptEncoder.from_files(folder)


def _rebuild_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the tokenizer that transformers really uses, where it is not the file's."""
    config = _optional(checkpoint.path / "tokenizer_config.json") or {}
    if config.get("tokenizer_class") not in REBUILT:
        return
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
    tokenizer.backend_tokenizer.save(str(folder / TEXT_FILES["tokenizer"]))


def _optional(file: Path) -> dict[str, Any] | None:
    return read_tokenizer_json(file) if file.is_file() else None
