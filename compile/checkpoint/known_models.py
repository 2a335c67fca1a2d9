"""Models known by name, and the shapes that dummy weights can take: data, and how to read sizes.

The dictionaries of published models say what their ``config.json`` says; what those files leave
to transformers' defaults is spelled out where it differs from Llama-7B's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ...graphs.config import ModelConfig
from ...graphs.errors import ModelError
from ...graphs.families.family import Size
from ...graphs.families.registry import read_config, with_budget, with_canvas
from ...graphs.fields import read_json
from ...graphs.vision_config import DEFAULT_ENCODER

ALIASES: Mapping[str, str] = {
    "llava-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-next-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
    "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen3-vl-32b": "Qwen/Qwen3-VL-32B-Instruct",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
}
"""Short names of checkpoints on the hub."""

DEMO = "demo"
"""The model that comes with the package."""

OWN_MODELS: Mapping[str, str] = {DEMO: "model", "demo-576": "model-576"}
"""Models of the source repository, and their folders in ``demo``; a wheel has the first alone."""


def own_folder(model: str) -> Path:
    """Return the folder of one of ``OWN_MODELS``.

    Raises:
        ModelError: this installation lacks it.
    """
    folder = Path(__file__).resolve().parents[2] / "demo" / OWN_MODELS[model]
    if folder.is_dir():
        return folder
    place = f"demo/{folder.name}"
    if model == DEMO:
        raise ModelError(
            f"this installation lacks the demo model ({place} in the package). Reinstall "
            "visistage, or name another model: llava-7b"
        )
    raise ModelError(
        f"this installation has no model {model}: it lies in visistage's source repository "
        f"({place}), not in the package. Run this in a clone of it, or name another model: {DEMO}"
    )


@dataclass(frozen=True)
class KnownModel:
    """Shapes without weights: a ``config.json``, token ids, and a sentence on where it is from."""

    config: Mapping[str, Any]
    specials: Mapping[str, int]
    about: str


_CLIP_L_336: dict[str, Any] = {**DEFAULT_ENCODER, "projection_dim": 768, "vocab_size": 32000}
_VICUNA_7B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32064,
}
_VICUNA_13B: dict[str, Any] = {
    **_VICUNA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_LLAVA: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "ignore_index": -100,
    "image_token_index": 32000,
    "image_seq_length": 576,
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "vision_config": _CLIP_L_336,
}
_LLAVA_SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
_INTERN_VIT_300M: dict[str, Any] = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": True,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
_INTERNVL_SPECIALS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<img>": 151665,
    "</img>": 151666,
    "<IMG_CONTEXT>": 151667,
    "<video>": 151668,
}
_SMALL_SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 3, "<pad>": 4}


def _internvl3(hidden: int, wide: int, heads: int, groups: int) -> dict[str, Any]:
    """Return the ``config.json`` of an InternVL3 of 28 layers, on a Qwen2.5."""
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": _INTERNVL_SPECIALS["<IMG_CONTEXT>"],
        "image_seq_length": 256,
        "tie_word_embeddings": False,
        "vision_config": _INTERN_VIT_300M,
        "text_config": {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_hidden_layers": 28,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            "vocab_size": 151674,
        },
    }


_ONEVISION_SPECIALS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<image>": 151646,
    "<video>": 151647,
}


def _llava_onevision(
    layers: int, hidden: int, wide: int, heads: int, groups: int, vocab: int
) -> dict[str, Any]:
    """Return the ``config.json`` of a LLaVA-OneVision, on a Qwen2."""
    edges = [384 * tiles for tiles in range(1, 7)]
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": _ONEVISION_SPECIALS["<image>"],
        "video_token_index": _ONEVISION_SPECIALS["<video>"],
        "image_grid_pinpoints": [list(size) for size in product(edges, edges)],
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": hidden < 1024,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
            "tie_word_embeddings": hidden < 1024,
            "vocab_size": vocab,
        },
    }


_QWEN_SPECIALS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
_QWEN3_VISION = {  # of 2B and 4B, and what is larger than they are
    "small": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "at": [5, 11, 17]},
    "large": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "at": [8, 16, 24]},
}


def _qwen3_vl(
    layers: int, hidden: int, wide: int, heads: int, encoder: str, *, tied: bool
) -> dict[str, Any]:
    """Return the ``config.json`` of a Qwen3-VL."""
    vision = dict(_QWEN3_VISION[encoder])
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": _QWEN_SPECIALS["<|image_pad|>"],
        "video_token_id": _QWEN_SPECIALS["<|video_pad|>"],
        "vision_start_token_id": _QWEN_SPECIALS["<|vision_start|>"],
        "vision_end_token_id": _QWEN_SPECIALS["<|vision_end|>"],
        "tie_word_embeddings": tied,
        "vision_config": {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": vision.pop("at"),
            **vision,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
        },
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-06,
            "rope_theta": 5000000,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": tied,
            "vocab_size": 151936,
        },
    }


def _qwen2_5_vl(
    layers: int, hidden: int, wide: int, heads: int, groups: int, vocab: int
) -> dict[str, Any]:
    """Return the ``config.json`` of a Qwen2.5-VL, whose decoder's fields are at the root."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": _QWEN_SPECIALS["<|image_pad|>"],
        "video_token_id": _QWEN_SPECIALS["<|video_pad|>"],
        "vision_start_token_id": _QWEN_SPECIALS["<|vision_start|>"],
        "vision_end_token_id": _QWEN_SPECIALS["<|vision_end|>"],
        "tie_word_embeddings": vocab == 151936,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "vocab_size": vocab,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }


_SMALL_QWEN_SPECIALS = {name: place for place, name in enumerate(_QWEN_SPECIALS)}


def _small_qwen2_5_vl() -> dict[str, Any]:
    """Return the ``config.json`` of a Qwen2.5-VL as small as LLaVA-45m, with the same windows."""
    config = _qwen2_5_vl(12, 512, 1408, 8, 4, 416)
    vision = {
        "depth": 8,
        "hidden_size": 320,
        "intermediate_size": 896,
        "num_heads": 4,
        "out_hidden_size": 512,
        "fullatt_block_indexes": [3, 7],
    }
    ids = {
        "image_token_id": _SMALL_QWEN_SPECIALS["<|image_pad|>"],
        "video_token_id": _SMALL_QWEN_SPECIALS["<|video_pad|>"],
        "vision_start_token_id": _SMALL_QWEN_SPECIALS["<|vision_start|>"],
        "vision_end_token_id": _SMALL_QWEN_SPECIALS["<|vision_end|>"],
        "bos_token_id": _SMALL_QWEN_SPECIALS["<|endoftext|>"],
        "eos_token_id": _SMALL_QWEN_SPECIALS["<|im_end|>"],
    }
    return {
        **config,
        **ids,
        "max_position_embeddings": 4096,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "vision_config": config["vision_config"] | vision,
    }


KNOWN_MODELS: Mapping[str, KnownModel] = {
    "llava-7b": KnownModel(
        {**_LLAVA, "text_config": _VICUNA_7B},
        _LLAVA_SPECIALS,
        "llava-hf/llava-1.5-7b-hf: 7.06 billion parameters",
    ),
    "llava-13b": KnownModel(
        {**_LLAVA, "text_config": _VICUNA_13B},
        _LLAVA_SPECIALS,
        "llava-hf/llava-1.5-13b-hf: 13.35 billion parameters",
    ),
    "llava-45m": KnownModel(
        {
            **_LLAVA,
            "image_token_index": 3,
            "pad_token_id": 4,
            "text_config": {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 512,
                "intermediate_size": 1376,
                "num_hidden_layers": 12,
                "num_attention_heads": 8,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-05,
                "vocab_size": 416,
            },
            "vision_config": {
                **_CLIP_L_336,
                "hidden_size": 256,
                "intermediate_size": 1024,
                "num_hidden_layers": 7,
                "num_attention_heads": 4,
                "projection_dim": 256,
            },
        },
        _SMALL_SPECIALS,
        "no published model: 44.6 million parameters, the tokens and stages of LLaVA-1.5",
    ),
    "llava-next-7b": KnownModel(
        {
            **{name: value for name, value in _LLAVA.items() if name != "image_seq_length"},
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "text_config": {
                "model_type": "mistral",
                "architectures": ["MistralForCausalLM"],
                "intermediate_size": 14336,
                "max_position_embeddings": 32768,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000.0,
                "sliding_window": None,
                "vocab_size": 32064,
            },
        },
        _LLAVA_SPECIALS,
        "llava-hf/llava-v1.6-mistral-7b-hf: 7.57 billion parameters",
    ),
    "llava-onevision-0.5b": KnownModel(
        _llava_onevision(24, 896, 4864, 14, 2, 152000),
        _ONEVISION_SPECIALS,
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf: 0.9 billion parameters",
    ),
    "llava-onevision-7b": KnownModel(
        _llava_onevision(28, 3584, 18944, 28, 4, 152128),
        _ONEVISION_SPECIALS,
        "llava-hf/llava-onevision-qwen2-7b-ov-hf: 8.0 billion parameters",
    ),
    "internvl3-2b": KnownModel(
        _internvl3(1536, 8960, 12, 2),
        _INTERNVL_SPECIALS,
        "OpenGVLab/InternVL3-2B-hf: 2.1 billion parameters",
    ),
    "internvl3-8b": KnownModel(
        _internvl3(3584, 18944, 28, 4),
        _INTERNVL_SPECIALS,
        "OpenGVLab/InternVL3-8B-hf: 7.9 billion parameters",
    ),
    "qwen3-vl-2b": KnownModel(
        _qwen3_vl(28, 2048, 6144, 16, "small", tied=True),
        _QWEN_SPECIALS,
        "Qwen/Qwen3-VL-2B-Instruct: 2.1 billion parameters",
    ),
    "qwen3-vl-4b": KnownModel(
        _qwen3_vl(36, 2560, 9728, 32, "small", tied=True),
        _QWEN_SPECIALS,
        "Qwen/Qwen3-VL-4B-Instruct: 4.4 billion parameters",
    ),
    "qwen3-vl-8b": KnownModel(
        _qwen3_vl(36, 4096, 12288, 32, "large", tied=False),
        _QWEN_SPECIALS,
        "Qwen/Qwen3-VL-8B-Instruct: 8.8 billion parameters",
    ),
    "qwen3-vl-32b": KnownModel(
        _qwen3_vl(64, 5120, 25600, 64, "large", tied=False),
        _QWEN_SPECIALS,
        "Qwen/Qwen3-VL-32B-Instruct: 33 billion parameters",
    ),
    "qwen2.5-vl-3b": KnownModel(
        _qwen2_5_vl(36, 2048, 11008, 16, 2, 151936),
        _QWEN_SPECIALS,
        "Qwen/Qwen2.5-VL-3B-Instruct: 3.8 billion parameters",
    ),
    "qwen2.5-vl-7b": KnownModel(
        _qwen2_5_vl(28, 3584, 18944, 28, 4, 152064),
        _QWEN_SPECIALS,
        "Qwen/Qwen2.5-VL-7B-Instruct: 8.3 billion parameters",
    ),
    "qwen2.5-vl-50m": KnownModel(
        _small_qwen2_5_vl(),
        _SMALL_QWEN_SPECIALS,
        "no published model: 48.7 million parameters, the patches and windows of Qwen2.5-VL",
    ),
}
"""Models that ``--dummy-weights`` can make."""


def model_config(
    model: str, image_tokens: int | None = None, canvas: Size | None = None
) -> ModelConfig:
    """Return the sizes of a known model or of a folder with a ``config.json``.

    ``image_tokens``, ``canvas``: as ``open_checkpoint`` takes them.

    Raises:
        ModelError: an unknown model, or a config or a limit that is not supported.
    """
    return with_canvas(with_budget(_model_config(model), image_tokens), canvas)


def _model_config(model: str) -> ModelConfig:
    known = next((name for name, hub in ALIASES.items() if hub == model), model)
    if known in KNOWN_MODELS:
        return ModelConfig.from_hf(dict(KNOWN_MODELS[known].config))
    folder = own_folder(model) if model in OWN_MODELS else Path(model)
    known_names = ", ".join([*OWN_MODELS, *KNOWN_MODELS])
    remedy = f"Give a folder with the config.json of a model, or one of {known_names}."
    data = read_json(folder / "config.json", ModelError, remedy)
    return read_config(data, image_processor(folder))


def image_processor(folder: Path) -> Mapping[str, Any] | None:
    """Return what a folder says of its image processor, if anything."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            data = read_json(folder / name, ModelError, "Download it again.")
            if not isinstance(data, Mapping):
                raise ModelError(f"{folder / name} holds no JSON object. Download it again.")
            data = data.get("image_processor", {}) if name.startswith("processor") else data
            if isinstance(data, Mapping) and data:
                return data
    return None
