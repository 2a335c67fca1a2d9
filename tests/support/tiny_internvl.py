"""A tiny random InternVL, a complete Hugging Face directory, and its judges of transformers."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from visistage.compile.checkpoint.dummy_tokenizer import write_text_files
from visistage.graphs.config import ModelConfig

VOCAB = 300
SPECIALS = {
    "<|endoftext|>": 290,
    "<|im_start|>": 291,
    "<|im_end|>": 292,
    "<img>": 293,
    "</img>": 294,
    "<IMG_CONTEXT>": 295,
    "<video>": 296,
}


def make_config(decoder="qwen2", *, layers=4, most=12, **vision):
    """The ``config.json``; ``vision``: of its encoder."""
    text = {
        "model_type": decoder,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "eos_token_id": SPECIALS["<|im_end|>"],
    }
    if decoder == "qwen2":
        text.pop("head_dim")
    encoder = {
        "model_type": "internvl_vision",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [32, 32],
        "patch_size": [8, 8],
        "attention_bias": True,
        "layer_scale_init_value": 0.5,
        **vision,
    }
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": SPECIALS["<IMG_CONTEXT>"],
        "image_seq_length": 4,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": encoder,
    }


@torch.no_grad()
def make_checkpoint(path, decoder="qwen2", *, seed=0, scale=7.0, most=12, **options):
    """Write a checkpoint directory and return it; ``most``: tiles of an image."""
    path = Path(path)
    data = make_config(decoder, **options)
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(InternVLConfig(**data)).float()
    for name, weight in model.named_parameters():
        if weight.ndim == 1 or "cls_token" in name or "position_embeddings" in name:
            spread = 0.5 if weight.ndim > 1 else 0.1
            weight.add_(torch.randn(weight.shape) * spread)
        elif "embed_tokens" not in name:
            weight.mul_(scale)
        else:
            weight.mul_(10)
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(data, indent=2))
    config = ModelConfig.from_hf(data)
    write_text_files(path, config, SPECIALS)
    file = path / "preprocessor_config.json"
    steps = json.loads(file.read_text()) | {"max_patches": most}
    file.write_text(json.dumps(steps))
    return path


class ImagesOnly(InternVLProcessor):
    """The processor without one of videos, which would need torchvision."""

    def check_argument_for_proper_class(self, *_):
        """Take what is given."""


class Judge:
    """The checkpoint in the hands of transformers."""

    def __init__(self, path):
        self.path = Path(path)
        self.model = InternVLForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        steps = json.loads((self.path / "preprocessor_config.json").read_text())
        steps.pop("image_processor_type")
        images = GotOcr2ImageProcessorPil(**steps)
        self.processor = ImagesOnly(
            images,
            AutoTokenizer.from_pretrained(path),
            None,
            image_seq_length=4,
            chat_template=(self.path / "chat_template.jinja").read_text(),
        )

    def inputs(self, messages, images):
        """Ids and pixels of a conversation."""
        text = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return self.processor(images=images or None, text=text, return_tensors="pt")

    @torch.no_grad()
    def answer(self, messages, images, new):
        """Greedy tokens, and the logits (new, V) that they were chosen from."""
        inputs = self.inputs(messages, images)
        out = self.model.generate(
            **inputs,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens, torch.cat(out.logits)
