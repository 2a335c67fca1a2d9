"""A tiny random LLaVA-OneVision, a Hugging Face directory, and its judge of transformers."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from . import tiny_internvl, toy
from .written import processor_of, written

SIDE = 18
"""Pixels of a tile's side: patches of 4 leave two of them out, as 384 and 14 leave six."""
SPECIALS = {
    "<|endoftext|>": 290,
    "<|im_start|>": 291,
    "<|im_end|>": 292,
    "<image>": 293,
    "<video>": 294,
}


def make_config(**text):
    """The ``config.json``; ``text``: of its decoder."""
    config = toy.make_config(
        encoder="siglip",
        encoder_heads=2,
        image_size=SIDE,
        patch=4,
        intermediate=96,
        kv_heads=2,
        vocab=300,
        model_type="qwen2",
        **text,
    )
    for name in ("image_seq_length", "bos_token_id", "eos_token_id", "pad_token_id"):
        config.pop(name)
        config["text_config"].pop(name, None)
    config["text_config"]["eos_token_id"] = SPECIALS["<|im_end|>"]
    edges = [SIDE * tiles for tiles in (1, 2, 3)]
    return config | {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": SPECIALS["<image>"],
        "video_token_index": SPECIALS["<video>"],
        "vision_feature_layer": -1,
        "vision_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": [[high, wide] for high in edges for wide in edges],
    }


def make_checkpoint(path, *, seed=5, scale=4.0, **options):
    """Write a checkpoint directory and return it."""
    data = make_config(**options)
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**data))
    return written(path, model, data, SPECIALS, scale=scale)


def image_processor(path):
    """The ``Pil`` processor of a checkpoint."""
    return processor_of(LlavaOnevisionImageProcessorPil, path)


class ImagesOnly(LlavaOnevisionProcessor):
    """The processor without one of videos, which would need torchvision."""

    def check_argument_for_proper_class(self, *_):
        """Take what is given."""


class Judge(tiny_internvl.Judge):
    """The checkpoint in the hands of transformers; images come as a flat list, and are all cut."""

    def __init__(self, path):
        self.path = Path(path)
        self.model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        steps = json.loads((self.path / "processor_config.json").read_text())
        steps.pop("processor_class")
        self.processor = ImagesOnly(
            image_processor(path),
            AutoTokenizer.from_pretrained(path),
            None,
            chat_template=(self.path / "chat_template.jinja").read_text(),
            **steps,
        )
