"""A tiny random SmolVLM, a complete Hugging Face directory, and its judge of transformers."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from . import tiny_internvl, toy
from .written import processor_of, written

CLASSES = {
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
}
VOCAB = 320
SPECIALS = {
    "<|endoftext|>": 290,
    "<|im_start|>": 291,
    "<end_of_utterance>": 292,
    "<fake_token_around_image>": 293,
    "<global-img>": 294,
    "<image>": 295,
    **{f"<row_{r}_col_{c}>": 296 + 4 * r + c for r in range(1, 5) for c in range(1, 5)},
}


def make_config(kind="smolvlm", **text):
    """The ``config.json``; ``text``: of its decoder."""
    decoder = toy.make_config(vocab=VOCAB, intermediate=96, kv_heads=2, **text)["text_config"]
    return {
        "architectures": [CLASSES[kind][1].__name__],
        "model_type": kind,
        "image_token_id": SPECIALS["<image>"],
        "scale_factor": 4,
        "tie_word_embeddings": False,
        "text_config": decoder,
        "vision_config": {
            "model_type": f"{kind}_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
    }


def make_checkpoint(path, kind="smolvlm", *, seed=0, scale=8.0, **options):
    """Write a checkpoint directory and return it."""
    data = make_config(kind, **options)
    torch.manual_seed(seed)
    config, model_class = CLASSES[kind]
    model = model_class(config(**data))
    path = written(path, model, data, SPECIALS, scale=scale)
    file = path / "preprocessor_config.json"
    steps = json.loads(file.read_text()) | {"size": {"longest_edge": 64}}
    file.write_text(json.dumps(steps))
    file = path / "processor_config.json"
    named = json.loads(file.read_text()) | {"image_seq_len": 4}  # rows of a tile
    file.write_text(json.dumps(named))
    return path


def image_processor(path):
    """The ``Pil`` processor of a checkpoint."""
    return processor_of(SmolVLMImageProcessorPil, path)


class Judge(tiny_internvl.Judge):
    """The checkpoint in the hands of transformers. Its processor asks for a library of number
    words; the expansion of an image is its own function.
    """

    def __init__(self, path):
        self.path = Path(path)
        kind = json.loads((self.path / "config.json").read_text())["model_type"]
        self.model = (
            CLASSES[kind][1]
            .from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
            .eval()
        )
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.images = image_processor(path)

    def inputs(self, messages, images):
        template = (self.path / "chat_template.jinja").read_text()
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        first, *rest = text.split("<image>")
        pixels = []
        for image, behind in zip(images, rest, strict=True):
            made = self.images(image, return_row_col_info=True, return_tensors="pt")
            pixels.append(made["pixel_values"][0])
            rows, columns = made["rows"][0][0], made["cols"][0][0]
            tokens = "<fake_token_around_image>", "<image>", "<global-img>"
            first += get_image_prompt_string(int(rows), int(columns), 4, *tokens) + behind
        ids = self.tokenizer(first, return_tensors="pt")
        return {**ids, "pixel_values": torch.cat(pixels)[None]}
