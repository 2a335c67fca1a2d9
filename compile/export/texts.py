"""Texts that a bundle takes from a checkpoint: tokenizer, template, preprocessing.

The compiler asks the runtime's own code what the prefix and the preprocessing are, so that both
always agree; these modules of the runtime need no back end.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from ...graphs.errors import ModelError
from ...graphs.fields import show
from ...graphs.progress import Advance, no_advance
from ...runtime.image.preprocessing import Preprocessing
from ...runtime.text.generation import GenerationRules, with_eos
from ...runtime.text.prompt import TEXT_FILES, PromptEncoder
from ...runtime.text.template import find_template, read_tokenizer_json
from ..checkpoint.checkpoint import Checkpoint
from ..quantize.calibration_file import facts_of

REBUILT = ("LlamaTokenizer", "LlamaTokenizerFast")
"""Tokenizer classes that transformers 5 rebuilds on loading: their ids are those of the rebuilt
tokenizer, not of the checkpoint's file."""


@dataclass(frozen=True)
class TextFacts:
    """Texts of a checkpoint, read once; all but the last two are facts of the manifest.

    Attributes:
        files: names in the bundle, by role.
        encoder: the encoder as the bundle will have it.
        tokenizer: JSON of a rebuilt tokenizer; None where the checkpoint's own file serves.
    """

    prefix_ids: tuple[int, ...]
    preprocessing: dict[str, Any]
    generation: dict[str, Any]
    files: dict[str, str]
    encoder: PromptEncoder = field(repr=False, compare=False)
    tokenizer: str | None = field(default=None, repr=False)


def text_facts(checkpoint: Checkpoint) -> TextFacts:
    """Read and check everything first: a build that starts must not fail on a missing template.

    Raises:
        ModelError, PromptError: naming the file that is missing or damaged.
    """
    folder = checkpoint.path
    side = checkpoint.config.vision.image_size
    layout = checkpoint.config.layout(side, side)
    vocab, image = checkpoint.config.text.vocab, checkpoint.config.image_token_id
    encoder = PromptEncoder.from_files(folder, None, vocab, layout, image)
    if encoder.image_token_id != checkpoint.config.image_token_id:
        raise ModelError(
            f"{folder}: config.json says the image token is {checkpoint.config.image_token_id}, "
            f"the tokenizer's {encoder.image_token} is {encoder.image_token_id}. "
            "Use the tokenizer files that belong to this checkpoint"
        )
    preprocessing = Preprocessing.from_files(
        _optional(folder / "processor_config.json"), _optional(folder / "preprocessor_config.json")
    )
    if preprocessing.output_size not in (None, (side, side)):
        raise ModelError(
            f"{folder}: images are preprocessed to {preprocessing.output_size}, the vision encoder "
            f"takes {(side, side)}. Use the processor files that belong to this checkpoint"
        )
    generation = with_eos(_optional(folder / "generation_config.json") or {}, checkpoint.raw)
    GenerationRules.read(generation, vocab)
    files = {role: name for role, name in TEXT_FILES.items() if (folder / name).is_file()}
    tokenizer = _rebuilt_tokenizer(folder)
    if tokenizer is not None:
        with TemporaryDirectory() as copy:
            _write(folder, files, tokenizer, Path(copy))
            encoder = PromptEncoder.from_files(copy, None, vocab, layout, image)
    beyond = encoder.beyond(vocab)
    if beyond:
        first, token = beyond[0]
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise ModelError(
            f"{folder}: the tokenizer has {show(token)} as {first}{more}, the embedding has "
            f"{vocab} rows. Use the tokenizer files of these weights, or save the model "
            "again after resize_token_embeddings."
        )
    return TextFacts(
        tuple(encoder.prefix_ids()), preprocessing.to_dict(), generation, files, encoder, tokenizer
    )


def fits(
    checkpoint: Checkpoint, texts: TextFacts, progress: Advance = no_advance
) -> dict[str, str]:
    """Return ``facts_of`` a checkpoint; ``progress`` is called with bytes of weights read."""
    template = find_template(
        {role: checkpoint.path / name for role, name in texts.files.items()},
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


def write_texts(checkpoint: Checkpoint, texts: TextFacts, folder: Path) -> list[str]:
    """Copy the text files; return their names."""
    return _write(checkpoint.path, texts.files, texts.tokenizer, folder)


def _write(source: Path, files: dict[str, str], tokenizer: str | None, folder: Path) -> list[str]:
    for name in files.values():
        shutil.copyfile(source / name, folder / name)
    if tokenizer is not None:
        (folder / TEXT_FILES["tokenizer"]).write_bytes(tokenizer.encode())
    return list(files.values())


def _rebuilt_tokenizer(folder: Path) -> str | None:
    """Return the tokenizer that transformers really uses, where it is not the file's."""
    config = _optional(folder / "tokenizer_config.json") or {}
    if config.get("tokenizer_class") not in REBUILT:
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer.backend_tokenizer.to_str(pretty=True)


def _optional(file: Path) -> dict[str, Any] | None:
    return read_tokenizer_json(file) if file.is_file() else None
