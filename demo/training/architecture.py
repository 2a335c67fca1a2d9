"""The demo model's shape as an untrained Hugging Face model, and the layout it is saved in."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ..worlds import DEMO, PATCH, World
from .tokenizer import CHAT_TEMPLATE, SPECIALS

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def build_config(world: World = DEMO) -> LlavaConfig:
    """Return the configuration: four used vision layers (and one unused), eight decoder layers.

    `world` decides the side of the images and with it the number of visual tokens.
    """
    begin, end, pad, image = (SPECIALS.index(t) for t in ("<s>", "</s>", "<pad>", "<image>"))
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=world.side,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=pad,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        image_seq_length=world.visual_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=pad,
        tie_word_embeddings=False,
    )


def build_model(world: World = DEMO, seed: int = 0) -> LlavaForConditionalGeneration:
    """Return the untrained model, every matrix drawn with a spread of 1 / sqrt(fan in)."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(world)).float()
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "embed" in name:
            if "embed" in name:
                torch.nn.init.normal_(weight, std=0.02 if "vision" in name else 0.5)
            continue
        spread = (weight[0].numel()) ** -0.5
        deep = any(part in name for part in ("o_proj", "down_proj", "out_proj", "fc2"))
        torch.nn.init.normal_(weight, std=spread * (0.25 if deep else 1.0))
    patches = model.model.vision_tower.embeddings.patch_embedding.weight
    torch.nn.init.normal_(patches, std=patches[0].numel() ** -0.5)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    return model


@torch.no_grad()
def start_from(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Take the weights of a saved model, position embeddings stretched to the grid of `model`."""
    source = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    weights = source.state_dict()
    name = "model.vision_tower.embeddings.position_embedding.weight"
    wanted = model.get_parameter(name)
    if wanted.shape != weights[name].shape:
        first, grid = weights[name][:1], weights[name][1:]
        side = round(len(grid) ** 0.5)
        grid = grid.T.reshape(1, -1, side, side)
        grid = F.interpolate(grid, size=round((len(wanted) - 1) ** 0.5), mode="bicubic")
        weights[name] = torch.cat((first, grid.flatten(2)[0].T))
    model.load_state_dict(weights)


def save(
    model: LlavaForConditionalGeneration, tokenizer: Tokenizer, out: Path, world: World = DEMO
) -> None:
    """Write `out` in the layout of a Hugging Face LLaVA checkpoint, weights in FP16."""
    out.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        padding_side="left",
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": world.side},
        crop_size={"height": world.side, "width": world.side},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        max_new_tokens=16,
        do_sample=False,
    )
    half = build_model(world)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # some versions keep it from other users
    processor.save_pretrained(out)
    images.save_pretrained(out)
