"""A LLaVA folder becomes ``language.gguf`` and ``vision.gguf``; in llama.cpp's environment.

    python to_gguf.py CHECKPOINT OUT f32|f16

llama.cpp's own converters know published tokenizers by hash and refuse others, so the two files are
written here with its ``gguf`` package, under the names that ``llama.cpp`` reads. Byte-level BPE
with GPT-2's pattern is what both sides call "gpt-2"; the runner's prompt would show a difference.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

TEXT = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VISION_ENCODER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL


def main(checkpoint, out, kind):
    """Write both files."""
    folder, out = Path(checkpoint), Path(out)
    config = json.loads((folder / "config.json").read_text())
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    tensors = {_canonical(name): tensor for name, tensor in tensors.items()}
    language(folder, config, tensors, out / "language.gguf", kind)
    vision(folder, config, tensors, out / "vision.gguf", kind)


def language(folder, config, tensors, file, kind):
    """The decoder, with the rows of each head of Q and K in llama.cpp's rotary order."""
    text = config["text_config"]
    heads = text["num_attention_heads"]
    groups = text.get("num_key_value_heads") or heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(folder.name)
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_dimension_count(text.get("head_dim") or text["hidden_size"] // heads)
    writer.add_vocab_size(text["vocab_size"])
    _tokenizer(writer, folder, text["vocab_size"])

    def add(name, tensor):
        writer.add_tensor(f"{name}.weight", _typed(tensor, kind))

    add("token_embd", tensors["model.language_model.embed_tokens.weight"])
    add("output_norm", tensors["model.language_model.norm.weight"])
    add("output", tensors["lm_head.weight"])
    for layer in range(text["num_hidden_layers"]):
        for theirs, name in TEXT.items():
            tensor = tensors[f"model.language_model.layers.{layer}.{theirs}.weight"]
            if name in ("attn_q", "attn_k"):
                tensor = _rotary(tensor, heads if name == "attn_q" else groups)
            add(f"blk.{layer}.{name}", tensor)
    _write(writer)


def vision(folder, config, tensors, file, kind):
    """The layers of the tower that count, and the projector."""
    tower = config["vision_config"]
    depth, layer = tower["num_hidden_layers"], config["vision_feature_layer"]
    last = layer if layer >= 0 else depth + 1 + layer
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    writer = gguf.GGUFWriter(file, "clip")
    writer.add_name(folder.name)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", tower.get("hidden_act", "quick_gelu") == "gelu")
    for key, value in {
        "image_size": tower["image_size"],
        "patch_size": tower["patch_size"],
        "embedding_length": tower["hidden_size"],
        "feed_forward_length": tower["intermediate_size"],
        "projection_dim": tower["projection_dim"],
        "attention.head_count": tower["num_attention_heads"],
        "block_count": last,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32(
        "clip.vision.attention.layer_norm_epsilon", tower.get("layer_norm_eps", 1e-5)
    )
    writer.add_array("clip.vision.feature_layer", [last])
    writer.add_array("clip.vision.image_mean", preprocessor["image_mean"])
    writer.add_array("clip.vision.image_std", preprocessor["image_std"])

    start = "model.vision_tower."
    embeddings = start + "embeddings."
    # Convolutions take FP16 only, which is what the checkpoint has.
    patches = tensors[embeddings + "patch_embedding.weight"].astype(np.float16)
    writer.add_tensor("v.patch_embd.weight", patches)
    writer.add_tensor("v.class_embd", _typed(tensors[embeddings + "class_embedding"], kind))
    positions = tensors[embeddings + "position_embedding.weight"].astype(np.float32)
    writer.add_tensor("v.position_embd.weight", positions)
    for end in ("weight", "bias"):
        add = writer.add_tensor
        add(f"v.pre_ln.{end}", _typed(tensors[f"{start}pre_layrnorm.{end}"], kind))
        for number in range(last):
            for theirs, name in VISION_ENCODER.items():
                tensor = tensors[f"{start}encoder.layers.{number}.{theirs}.{end}"]
                add(f"v.blk.{number}.{name}.{end}", _typed(tensor, kind))
        for theirs, number in (("linear_1", 0), ("linear_2", 2)):
            tensor = tensors[f"model.multi_modal_projector.{theirs}.{end}"]
            add(f"mm.{number}.{end}", _typed(tensor, kind))
    _write(writer)


def _canonical(name):
    """The names that transformers 5 gives to what older checkpoints call otherwise."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    if not name.startswith(("model.", "lm_head")):
        name = f"model.{name}"
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def _rotary(weight, heads):
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def _typed(tensor, kind):
    """Matrices as asked, vectors always FP32."""
    half = kind == "f16" and tensor.ndim > 1
    return np.ascontiguousarray(tensor.astype(np.float16 if half else np.float32))


def _tokenizer(writer, folder, vocabulary):
    data = json.loads((folder / "tokenizer.json").read_text())
    if data["model"]["type"] != "BPE":
        raise SystemExit(f"{folder}: the tokenizer is {data['model']['type']}, expected BPE")
    named = {number: word for word, number in data["model"]["vocab"].items()}
    control = {one["id"]: one["content"] for one in data["added_tokens"]}
    named |= control
    words = [named.get(number, f"[unused{number}]") for number in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([CONTROL if n in control else NORMAL for n in range(vocabulary)])
    pairs = data["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in pairs])
    ids = {word: number for number, word in control.items()}
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])
    writer.add_unk_token_id(ids["<unk>"])
    writer.add_add_bos_token(True)


def _write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
