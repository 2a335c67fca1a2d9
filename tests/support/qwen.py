"""Small random models of the Qwen-VL families, lively enough to show mistakes."""

import torch
from transformers import Qwen3VLConfig

SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}


def qwen3_vl_config(**text) -> Qwen3VLConfig:
    """Sizes of a toy whose sections, heads, grids and depths all differ from each other."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
            }, **text,
        },
        vision_config={
            "depth": 4, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48,
            "num_heads": 2, "patch_size": 4, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        image_token_id=120, video_token_id=121, vision_start_token_id=122,
        vision_end_token_id=123, tie_word_embeddings=True,
    )  # fmt: skip


@torch.no_grad()
def lively(model, seed=0):
    """Widen every matrix, and move norms and biases off what they start as."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.add_(0.1 * noise)
            if "q_norm" in name or "k_norm" in name:
                weight.mul_(2.5)
        elif "embed" in name and "patch_embed" not in name:
            weight.mul_(10)
        else:
            weight.mul_(7)
    return model
