"""What the tensors of a LLaVA checkpoint are called, and which shapes they have.

Three spellings are in circulation. They differ in prefixes only; ours, the canonical one, is what
the graphs' modules use (LlamaForCausalLM's names for the decoder):

    published llava-hf files      transformers >= 4.52, in memory      canonical
    language_model.model.         model.language_model.                model.
    language_model.lm_head.       lm_head.                             lm_head.
    vision_tower.[vision_model.]  model.vision_tower.[vision_model.]   vision_tower.
    multi_modal_projector.        model.multi_modal_projector.         multi_modal_projector.

It refuses to know where a tensor lies.
"""

from __future__ import annotations

from ...graphs.config import ModelConfig, TextConfig, VisionConfig

Shapes = dict[str, tuple[int, ...]]

EMBEDDING = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"

_PREFIXES = (  # the longer ones first
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
_VISION_MODEL = "vision_tower.vision_model."


def canonical(name: str) -> str:
    """The canonical name of a tensor that a checkpoint calls ``name``."""
    for prefix, ours in _PREFIXES:
        if name.startswith(prefix):
            name = ours + name[len(prefix) :]
            break
    return "vision_tower." + name[len(_VISION_MODEL) :] if name.startswith(_VISION_MODEL) else name


def published_name(name: str) -> str:
    """How the published llava-hf files spell a canonical name; the inverse of ``canonical``."""
    for theirs, ours in (*_PREFIXES[:2], (_VISION_MODEL, "vision_tower.")):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def tensor_shapes(config: ModelConfig, *, whole_encoder: bool = False) -> Shapes:
    """Shape of every tensor the graphs read, by canonical name, in the model's order.

    ``whole_encoder`` adds the tower's layers behind the deepest chosen hidden state and its last
    norm, which published files hold and nobody reads.
    """
    states = config.vision.layers + 1
    depth = max(index % states for index in config.feature_layers)
    shapes = _encoder(config.vision, config.vision.layers if whole_encoder else depth)
    if whole_encoder:
        shapes |= _norm("vision_tower.post_layernorm", config.vision.hidden)
    width = config.text.hidden
    shapes |= _linear(
        "multi_modal_projector.linear_1",
        width,
        config.vision.hidden * len(config.feature_layers),
        config.projector_bias,
    )
    shapes |= _linear("multi_modal_projector.linear_2", width, width, config.projector_bias)
    return shapes | decoder_shapes(config.text)


def _encoder(vision: VisionConfig, depth: int) -> Shapes:
    width, clip = vision.hidden, vision.kind == "clip"
    at = "vision_tower.embeddings"
    shapes: Shapes = {f"{at}.class_embedding": (width,)} if clip else {}
    shapes[f"{at}.patch_embedding.weight"] = (
        width,
        vision.channels,
        vision.patch_size,
        vision.patch_size,
    )
    if not clip:
        shapes[f"{at}.patch_embedding.bias"] = (width,)
    shapes[f"{at}.position_embedding.weight"] = (vision.tokens, width)
    if clip:
        shapes |= _norm("vision_tower.pre_layrnorm", width)  # sic, in checkpoints
    for index in range(depth):
        at = f"vision_tower.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{at}.self_attn.{part}", width, width, bias=True)
        shapes |= _norm(f"{at}.layer_norm1", width)
        shapes |= _linear(f"{at}.mlp.fc1", vision.intermediate, width, bias=True)
        shapes |= _linear(f"{at}.mlp.fc2", width, vision.intermediate, bias=True)
        shapes |= _norm(f"{at}.layer_norm2", width)
    return shapes


def decoder_shapes(text: TextConfig) -> Shapes:
    """Of the decoder alone: embedding, layers, last norm, head."""
    width, queries, keys = text.hidden, text.heads * text.head_dim, text.kv_heads * text.head_dim
    shapes: Shapes = {EMBEDDING: (text.vocab, width)}
    for index in range(text.layers):
        at = f"model.layers.{index}"
        shapes |= _linear(f"{at}.self_attn.q_proj", queries, width, text.attention_bias)
        shapes |= _linear(f"{at}.self_attn.k_proj", keys, width, text.attention_bias)
        shapes |= _linear(f"{at}.self_attn.v_proj", keys, width, text.attention_bias)
        shapes |= _linear(f"{at}.self_attn.o_proj", width, queries, text.output_bias)
        shapes |= _linear(f"{at}.mlp.gate_proj", text.intermediate, width, text.mlp_bias)
        shapes |= _linear(f"{at}.mlp.up_proj", text.intermediate, width, text.mlp_bias)
        shapes |= _linear(f"{at}.mlp.down_proj", width, text.intermediate, text.mlp_bias)
        shapes[f"{at}.input_layernorm.weight"] = (width,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (width,)
    return shapes | {"model.norm.weight": (width,), HEAD_WEIGHT: (text.vocab, width)}


def _linear(at: str, outputs: int, inputs: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{at}.weight": (outputs, inputs)}
    return shapes | ({f"{at}.bias": (outputs,)} if bias else {})


def _norm(at: str, width: int) -> Shapes:
    return {f"{at}.weight": (width,), f"{at}.bias": (width,)}
