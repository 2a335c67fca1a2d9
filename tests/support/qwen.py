"""Small random models of the Qwen-VL families, lively enough to show mistakes, and their judge."""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, Qwen3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from visistage.compile.checkpoint.dummy_tokenizer import write_text_files
from visistage.graphs.families.registry import read_config
from visistage.tests.support import tiny_internvl

VOCAB = 300
SPECIALS = {
    "<|endoftext|>": 290,
    "<|im_start|>": 291,
    "<|im_end|>": 292,
    "<|vision_start|>": 293,
    "<|vision_end|>": 294,
    "<|image_pad|>": 295,
    "<|video_pad|>": 296,
}
LIMITS = {"shortest_edge": 4 * 8 * 8, "longest_edge": 24 * 8 * 8}
"""Pixels of images of 4 to 24 rows, of 8 x 8 pixels each."""


def qwen3_vl_config(**text) -> Qwen3VLConfig:
    """Sizes of a toy whose sections, heads, grids and depths all differ from each other."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
            "eos_token_id": SPECIALS["<|im_end|>"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
            }, **text,
        },
        vision_config={
            "depth": 4, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48,
            "num_heads": 2, "patch_size": 4, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        image_token_id=SPECIALS["<|image_pad|>"], video_token_id=SPECIALS["<|video_pad|>"],
        vision_start_token_id=SPECIALS["<|vision_start|>"],
        vision_end_token_id=SPECIALS["<|vision_end|>"], tie_word_embeddings=True,
        architectures=["Qwen3VLForConditionalGeneration"],
    )  # fmt: skip


SHARED = {
    "image_token_id": SPECIALS["<|image_pad|>"], "video_token_id": SPECIALS["<|video_pad|>"],
    "vision_start_token_id": SPECIALS["<|vision_start|>"],
    "vision_end_token_id": SPECIALS["<|vision_end|>"],
}  # fmt: skip
VISION = {
    "qwen2_vl": {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 4,
    },
    "qwen2_5_vl": {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48,
        "num_heads": 2, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
    },
}  # fmt: skip
CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}


def config_of(family, **text):
    """Sizes of a toy of one of the families; windows of 2 x 2 rows."""
    if family == "qwen3_vl":
        return qwen3_vl_config(**text)
    decoder = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6, "eos_token_id": SPECIALS["<|im_end|>"],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
        }, **text,
    }  # fmt: skip
    return getattr(transformers, f"{CLASSES[family]}Config")(
        text_config=decoder,
        vision_config=VISION[family],
        architectures=[f"{CLASSES[family]}ForConditionalGeneration"],
        **SHARED,
    )


def model_of(family, **text):
    """Return a random model, lively."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")
    return lively(kind(config_of(family, **text)).float()).eval()


@torch.no_grad()
def lively(model, seed=0):
    """Widen every matrix, and move norms and biases off what they start as.

    Norms by head widen scores, too: by 2.5 each they leave an attention of one key, where a
    difference doubles by layer, and what weights lose by rounding is as large as the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.add_(0.1 * noise)
            if "q_norm" in name or "k_norm" in name:
                weight.mul_(1.2)
        elif "embed" in name and "patch_embed" not in name:
            weight.mul_(10)
        else:
            weight.mul_(7)
    return model


def make_checkpoint(path, family="qwen3_vl", **text) -> Path:
    """Write a checkpoint directory and return it; ``text``: of the decoder's config."""
    path = Path(path)
    model_of(family, **text).save_pretrained(path)
    config = read_config(json.loads((path / "config.json").read_text()))
    write_text_files(path, config, SPECIALS)
    file = path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": LIMITS}))
    return path


def images_only(family):
    """Return the processor's class without one of videos, which would need torchvision."""
    base = getattr(transformers, f"{CLASSES[family]}Processor")
    return type("ImagesOnly", (base,), {"check_argument_for_proper_class": lambda *_: None})


class Judge(tiny_internvl.Judge):
    """The checkpoint in the hands of transformers."""

    def __init__(self, path):
        path = Path(path)
        family = json.loads((path / "config.json").read_text())["model_type"]
        kind = getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")
        self.model = kind.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        steps = json.loads((path / "preprocessor_config.json").read_text())
        steps.pop("image_processor_type")
        self.images = Qwen2VLImageProcessorPil(**steps)
        self.processor = images_only(family)(
            self.images,
            AutoTokenizer.from_pretrained(path),
            None,
            chat_template=(path / "chat_template.jinja").read_text(),
        )

    def inputs(self, messages, images):
        """Ids and patches of a conversation."""
        text = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return self.processor(images=images or None, text=text, return_tensors="pt")

    @torch.no_grad()
    def answer(self, messages, images, new):
        """Greedy tokens, and the logits (new, V) that they were chosen from."""
        self.model.model.rope_deltas = None  # of the prompt before
        return super().answer(messages, images, new)
