"""Conversion of a LLaVA folder to ``language.gguf`` and ``vision.gguf``, for llama.cpp.

    python to_gguf.py CHECKPOINT OUT f32|f16|q8_0|q4_0 SIZES

SIZES is JSON: what ``text_config`` may leave to its class.

llama.cpp's own converters know published tokenizers by hash and refuse others, so the two files are
written here with its ``gguf`` package, from a checkpoint under the published names. Byte-level BPE
with GPT-2's pattern is what both sides call "gpt-2"; the runner's prompt would show a difference.
Blocks of integers are of the decoder; the vision encoder beside them is of f16, as published files
have it. Tensors are read one by one.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

BLOCKS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
TEXT, VISION = "language_model.", "vision_tower.vision_model."
PROJECTOR = {"multi_modal_projector.linear_1": "mm.0", "multi_modal_projector.linear_2": "mm.2"}


def main(checkpoint, out, kind, sizes):
    """Write both files."""
    folder, out = Path(checkpoint), Path(out)
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"] | json.loads(sizes), config["vision_config"]
    depth, layer = vision["num_hidden_layers"], config["vision_feature_layer"]
    vision["num_hidden_layers"] = layer if layer >= 0 else depth + 1 + layer
    files = language_file(folder, text, out), vision_file(folder, vision, out)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                tensor = tensors.get_tensor(name)
                if name.startswith(TEXT):
                    add_text(files[0], text, name.removeprefix(TEXT), tensor, kind)
                else:
                    add_vision(files[1], vision, name, tensor, "f16" if kind in BLOCKS else kind)
    for writer in files:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def language_file(folder, text, out):
    """Begin the decoder's file."""
    heads = text["num_attention_heads"]
    writer = gguf.GGUFWriter(out / "language.gguf", "llama", use_temp_file=True)
    writer.add_name(folder.name)
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_dimension_count(text["head_dim"])
    writer.add_vocab_size(text["vocab_size"])
    _tokenizer(writer, folder, text["vocab_size"])
    return writer


def add_text(writer, text, name, tensor, kind):
    """Add a weight of the decoder, the rows of each head of Q and K in llama.cpp's rotary order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, text["num_hidden_layers"])
    target = names.get_name(name, (".weight",))
    if target is None:
        raise SystemExit(f"{name}: llama.cpp has no such weight")
    heads = text["num_attention_heads"]
    if ".attn_q." in target:
        tensor = _rotary(tensor, heads)
    if ".attn_k." in target:
        tensor = _rotary(tensor, text["num_key_value_heads"])
    if kind in BLOCKS and tensor.ndim > 1:
        # Published files of four bits keep the output projection wider, too.
        type_ = BLOCKS["q8_0" if target == "output.weight" else kind]
        blocks = gguf.quants.quantize(tensor.astype(np.float32), type_)
        writer.add_tensor(target, blocks, raw_dtype=type_)
        return
    writer.add_tensor(target, _typed(tensor, kind))


def vision_file(folder, vision, out):
    """Begin the file of the vision encoder, with the layers that count, and the projector."""
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    writer = gguf.GGUFWriter(out / "vision.gguf", "clip")
    writer.add_name(folder.name)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", vision.get("hidden_act", "quick_gelu") == "gelu")
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_projection_dim(vision["projection_dim"])
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_block_count(vision["num_hidden_layers"])
    writer.add_vision_attention_layernorm_eps(vision.get("layer_norm_eps", 1e-5))
    writer.add_array("clip.vision.feature_layer", [vision["num_hidden_layers"]])
    writer.add_vision_image_mean(preprocessor["image_mean"])
    writer.add_vision_image_std(preprocessor["image_std"])
    return writer


def add_vision(writer, vision, name, tensor, kind):
    """Add a weight of the vision encoder or the projector; later layers have no name there."""
    start, _, end = name.rpartition(".")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision["num_hidden_layers"])
    if start in PROJECTOR:
        target = f"{PROJECTOR[start]}.{end}"
    else:
        target = names.get_name(name, (".weight", ".bias"))
    if target is None or name.startswith(VISION + "post_layernorm"):
        return
    if "patch_embedding" in name:  # convolutions take FP16 only, which the checkpoint has
        kind = "f16"
    if "position_embedding" in name:
        kind = "f32"
    writer.add_tensor(target, _typed(tensor, kind))


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
    control = {token["id"]: token["content"] for token in data["added_tokens"]}
    named |= control
    words = [named.get(number, f"[unused{number}]") for number in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([CONTROL if n in control else NORMAL for n in range(vocabulary)])
    pairs = data["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    ids = {word: number for number, word in control.items()}
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])
    writer.add_unk_token_id(ids["<unk>"])
    writer.add_add_bos_token(True)


if __name__ == "__main__":
    main(*sys.argv[1:])
