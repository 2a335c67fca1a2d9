"""Small LLaVA checkpoints, complete Hugging Face directories, made in a fraction of a second.

Random, but scaled so that greedy generation is lively (docs/design.md, "Invariants"): 20 or more
distinct tokens in 64. Otherwise every wrong implementation would "agree" on one token repeated for
ever.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from visistage.compile.checkpoint.dummy_tokenizer import write_text_files
from visistage.graphs.config import ModelConfig

SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<image>": 4}
VOCAB = 300
HALF_LAYERS = 6
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {  # canonical prefix -> prefix in the file; the first one that fits counts
    "old": {  # the published llava-hf files
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
        "vision_tower.": "vision_tower.vision_model.",
    },
    "new": {  # the module names of transformers >= 4.52
        "model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


def make_config(
    *,
    layers=4,
    hidden=64,
    heads=4,
    kv_heads=4,
    intermediate=128,
    vocab=VOCAB,
    tied=False,
    encoder="clip",
    dtype="float32",
    image_size=32,
    patch=8,
    feature_layer=-2,
    select=None,
    rope=None,
    max_positions=2048,
    encoder_layers=3,
    encoder_heads=4,
    fusion=(),
    **text,
) -> dict:
    """The ``config.json`` of a toy; ``rope`` is transformers 5's ``rope_parameters``, ``fusion``
    a strategy and a set of layers.
    """
    select = select or ("default" if encoder == "clip" else "full")
    patches = (image_size // patch) ** 2
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "image_token_index": SPECIALS["<image>"],
        "image_seq_length": patches + (encoder == "clip") - (select == "default"),
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": select,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        **dict(zip(("layer_fusing_strategy", "layer_using_strategy"), fusion, strict=False)),
        "tie_word_embeddings": tied,
        "bos_token_id": SPECIALS["<s>"],
        "eos_token_id": SPECIALS["</s>"],
        "pad_token_id": SPECIALS["<pad>"],
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": max_positions,
            "rms_norm_eps": 1e-5,
            "vocab_size": vocab,
            "tie_word_embeddings": tied,
            "bos_token_id": SPECIALS["<s>"],
            "eos_token_id": SPECIALS["</s>"],
            "pad_token_id": SPECIALS["<pad>"],
            "rope_parameters": rope or {"rope_type": "default", "rope_theta": 10000.0},
            **text,
        },
        "vision_config": {
            "model_type": f"{encoder}_vision_model",
            "num_hidden_layers": encoder_layers,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": encoder_heads,
            "image_size": image_size,
            "patch_size": patch,
            **({"vision_use_head": False} if encoder == "siglip" else {}),
        },
    }


def make_weights(config: dict, *, scale=1.0, seed=0) -> dict[str, torch.Tensor]:
    """Float32 tensors by canonical name; ``scale`` multiplies what makes generation lively."""
    parsed = ModelConfig.from_hf(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(parsed).items():
        if name == "lm_head.weight" and parsed.text.tied:
            continue
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        elif len(shape) == 1:
            weights[name] = 0.1 * noise
        elif "embed_tokens" in name:
            weights[name] = (0.1 if parsed.text.tied else 0.3) * noise
        elif "position_embedding" in name:
            weights[name] = 0.5 * noise
        else:
            spread = math.prod(shape[1:])
            weights[name] = noise * spread**-0.5 * _gain(name, scale)
    return weights


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of published files by canonical name, written out: ours must equal them."""
    vision, text = config.vision, config.text
    wide, clip = vision.hidden, vision.kind == "clip"
    shapes = {"patch_embedding.weight": (wide, 3, vision.patch_size, vision.patch_size)}
    if clip:
        shapes = {"class_embedding": (wide,), **shapes}
    else:
        shapes["patch_embedding.bias"] = (wide,)
    shapes["position_embedding.weight"] = (vision.tokens, wide)
    found = {f"vision_tower.embeddings.{name}": shape for name, shape in shapes.items()}

    def with_bias(name, out, *inputs):
        found.update({f"{name}.weight": (out, *inputs), f"{name}.bias": (out,)})

    if clip:
        with_bias("vision_tower.pre_layrnorm", wide)
    for layer in range(vision.layers):
        at = f"vision_tower.encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            with_bias(f"{at}.self_attn.{projection}", wide, wide)
        with_bias(f"{at}.layer_norm1", wide)
        with_bias(f"{at}.mlp.fc1", vision.intermediate, wide)
        with_bias(f"{at}.mlp.fc2", wide, vision.intermediate)
        with_bias(f"{at}.layer_norm2", wide)
    with_bias("vision_tower.post_layernorm", wide)
    features = wide * (len(config.feature_layers) + len(config.fusion.means))
    with_bias("multi_modal_projector.linear_1", text.hidden, features)
    with_bias("multi_modal_projector.linear_2", text.hidden, text.hidden)
    for number in range(len(config.fusion.injected)):
        with_bias(f"mm_projectors.{number}.linear_1", text.hidden, wide)
        with_bias(f"mm_projectors.{number}.linear_2", text.hidden, text.hidden)
    if not config.projector_bias:
        del found["multi_modal_projector.linear_1.bias"]
        del found["multi_modal_projector.linear_2.bias"]

    heads, kv = text.heads * text.head_dim, text.kv_heads * text.head_dim
    found["model.embed_tokens.weight"] = (text.vocab, text.hidden)
    for layer in range(text.layers):
        for name, out, inputs, bias in (
            ("self_attn.q_proj", heads, text.hidden, text.attention_bias),
            ("self_attn.k_proj", kv, text.hidden, text.attention_bias),
            ("self_attn.v_proj", kv, text.hidden, text.attention_bias),
            ("self_attn.o_proj", text.hidden, heads, text.output_bias),
            ("mlp.gate_proj", text.intermediate, text.hidden, text.mlp_bias),
            ("mlp.up_proj", text.intermediate, text.hidden, text.mlp_bias),
            ("mlp.down_proj", text.hidden, text.intermediate, text.mlp_bias),
        ):
            found[f"model.layers.{layer}.{name}.weight"] = (out, inputs)
            if bias:
                found[f"model.layers.{layer}.{name}.bias"] = (out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = (text.hidden,)
        for name in ("q_norm", "k_norm") if text.qk_norm else ():
            found[f"model.layers.{layer}.self_attn.{name}.weight"] = (text.head_dim,)
    return found | {
        "model.norm.weight": (text.hidden,),
        "lm_head.weight": (text.vocab, text.hidden),
    }


def make_checkpoint(
    path, *, layout="old", sharded=False, scale=1.0, seed=0, dtype="float32", **config
) -> Path:
    """Write a checkpoint directory and return it; ``config`` as for ``make_config``."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    data = make_config(dtype=dtype, **config)
    weights = make_weights(data, scale=scale, seed=seed)
    stored = {rename(k, layout): v.to(DTYPES[dtype]).contiguous() for k, v in weights.items()}
    (path / "config.json").write_text(json.dumps(data, indent=2))
    write_text_files(path, ModelConfig.from_hf(data), SPECIALS)
    if not sharded:
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
        return path
    parts = 3
    where = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        shard = {name: stored[name] for name in list(stored)[part::parts]}
        save_file(shard, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def scaled(factors):
    """A change of a checkpoint: tensors whose name holds the key, times the factor."""

    def change(weights):
        for part, factor in factors.items():
            hit = [name for name in weights if part in name]
            assert hit, part
            for name in hit:
                weights[name] = (weights[name].float() * factor).half()

    return change


def make_half(path, change=None):
    """An FP16 toy, so that FP16 and FP32 differ in arithmetic alone."""
    make_checkpoint(path, layers=HALF_LAYERS, kv_heads=2, dtype="float16", mlp_bias=True)
    if change is not None:
        file = path / "model.safetensors"
        weights = load_file(file)
        change(weights)
        assert all(weight.isfinite().all() for weight in weights.values())
        save_file(weights, file, metadata={"format": "pt"})
    return path


def rename(name: str, layout: str) -> str:
    """A canonical name as the layout spells it."""
    for ours, theirs in LAYOUTS[layout].items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def _gain(name, scale):
    """Attention must be sharp and the updates large, or the last token alone decides."""
    if ("q_proj" in name or "k_proj" in name) and "vision" not in name:
        return 2.0 * scale
    if name == "lm_head.weight":
        return 4.0 * scale
    return 1.0
