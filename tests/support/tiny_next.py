"""A tiny random LLaVA-NeXT, a complete Hugging Face directory, and its judge of transformers."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from . import tiny_internvl, toy
from .written import processor_of, written

SIZES = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def make_config(**text):
    """The ``config.json``; ``text``: of its decoder. (For heads of 8 TensorRT has no kernel.)"""
    sizes = {"image_size": 16, "patch": 4, "intermediate": 96, "kv_heads": 2, "encoder_heads": 2}
    config = toy.make_config(**sizes, **text)
    config.pop("image_seq_length")
    return config | {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": SIZES,
    }


def make_checkpoint(path, *, seed=0, scale=8.0, **options):
    """Write a checkpoint directory and return it."""
    data = make_config(**options)
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**data))
    return written(path, model, data, toy.SPECIALS, scale=scale)


def image_processor(path):
    """The ``Pil`` processor of a checkpoint."""
    return processor_of(LlavaNextImageProcessorPil, path)


class Judge(tiny_internvl.Judge):
    """The checkpoint in the hands of transformers."""

    def __init__(self, path):
        self.path = Path(path)
        self.model = LlavaNextForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = LlavaNextProcessor(
            image_processor(path),
            AutoTokenizer.from_pretrained(path),
            patch_size=4,
            vision_feature_select_strategy="default",
            chat_template=(self.path / "chat_template.jinja").read_text(),
            image_token="<image>",
            num_additional_image_tokens=1,
        )
