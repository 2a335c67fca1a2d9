"""Tokenizer, chat template and processor files for checkpoints that we make ourselves.

The tokenizer is a byte-level BPE over a few sentences, so any text has tokens and the Vicuna
system prompt has about as many as with the real one. Ids that no word claims get filler words
(``w4711``): a random model's answers are visibly nonsense instead of empty. Equal arguments give
equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ...graphs.config import ModelConfig
from ...graphs.families.registry import FAMILIES
from ...graphs.vision_config import PATCHES

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
_CORPUS = (
    SYSTEM,
    "USER: ASSISTANT: What is shown in this image? Describe the picture in detail. How many people "
    "are there? Is it a photo? Yes. No. The image shows a man and a woman, two dogs on a street.",
)
_TURNS = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% else %}{{ message['role'] | upper + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_IN_CHATML = {
    "internvl": "<IMG_CONTEXT>\\n",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
_IN_CHATML["qwen2_vl"] = _IN_CHATML["qwen2_5_vl"] = _IN_CHATML["qwen3_vl"]
"""Text of an image in a family's template."""

_UTTERANCES = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}{{ ': ' + message['content'] }}{% else %}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_SPACED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Template of LLaVA-OneVision: images, then texts, each on a line of its own."""

_TEMPLATES = {
    **{family: _CHATML.replace("IMAGE", shown) for family, shown in _IN_CHATML.items()},
    **dict.fromkeys(("smolvlm", "idefics3"), _UTTERANCES),
    "llava_onevision": _SPACED,
}
"""Templates of families that do not have LLaVA's turns."""

PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "internvit": {
        "image_processor_type": "GotOcr2ImageProcessor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "min_patches": 1,
        "max_patches": 12,
    },
    "patches": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}
TOKENS: dict[str, dict[str, str]] = {
    "llava": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "image_token": "<image>",
    },
    "internvl": {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    },
    "qwen3_vl": {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    },
}
TOKENS["llava_onevision"] = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "image_token": "<image>",
    "video_token": "<video>",
}
TOKENS["llava_next"] = TOKENS["llava"]
TOKENS["qwen2_vl"] = TOKENS["qwen2_5_vl"] = TOKENS["qwen3_vl"]
TOKENS["smolvlm"] = TOKENS["idefics3"] = {
    "bos_token": "<|im_start|>",
    "eos_token": "<end_of_utterance>",
    "pad_token": "<|endoftext|>",
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
"""Special tokens of a family, by what they are; those with "image" or "video" are of processors."""


def _is_extra(role: str) -> bool:
    return any(word in role for word in ("image", "video", "utterance"))


def chat_template(system: str = "") -> str:
    r"""Return LLaVA-1.5's template, ``USER: <image>\n... ASSISTANT:``, after ``system`` if any."""
    return f"{{{{ {json.dumps(system + ' ')} }}}}{_TURNS}" if system else _TURNS


def write_text_files(
    folder: Path, config: ModelConfig, specials: Mapping[str, int], *, system: str = ""
) -> None:
    """Write all files of a checkpoint but ``config.json`` and weights.

    Args:
        folder: an existing directory.
        config: the model; its vocabulary must hold 256 bytes and the specials.
        specials: ids of the family's special tokens, by their text.
        system: system sentence of LLaVA's chat template, empty for none.
    """
    tokenizer = _tokenizer(config.text.vocab, specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = _TEMPLATES.get(config.family) or chat_template(system)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    named = TOKENS[config.family]
    extra = {role: token for role, token in named.items() if _is_extra(role)}
    ids = {f"{role}_id": specials[token] for role, token in named.items() if role not in extra}
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{role: token for role, token in named.items() if role not in extra},
            "extra_special_tokens": extra,
            "model_max_length": config.text.max_positions,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
    )
    _write(
        folder / "generation_config.json",
        {**{role: id_ for role, id_ in ids.items() if role != "unk_token_id"}, "do_sample": False},
    )
    _write(folder / "preprocessor_config.json", _preprocessor(config))
    if config.family in _TEMPLATES:
        name = FAMILIES[config.family].architecture
        processor: dict[str, Any] = {
            "processor_class": name.replace("ForConditionalGeneration", "Processor"),
        }
        if config.shrinks:
            processor |= {
                "num_image_tokens": config.vision.tokens,
                "vision_feature_select_strategy": config.select,
                "vision_aspect_ratio": f"anyres_max_{config.limits.most}",
            }
        _write(folder / "processor_config.json", processor)
        return
    _write(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaNextProcessor" if config.packs else "LlavaProcessor",
            "patch_size": config.vision.patch_size,
            "image_token": "<image>",
            "num_additional_image_tokens": config.vision.tokens - config.vision.patches,
            "vision_feature_select_strategy": config.select,
        },
    )


def _preprocessor(config: ModelConfig) -> dict[str, Any]:
    side = config.vision.image_size
    square = {"height": side, "width": side}
    steps: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    if config.vision.kind == "clip":
        steps |= {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
    elif config.vision.kind == PATCHES:
        least, most = config.limits.least, config.limits.most
        steps |= {
            "size": {"shortest_edge": least, "longest_edge": most},
            "patch_size": config.vision.patch_size,
            "merge_size": config.vision.merge,
            "temporal_patch_size": config.vision.frames,
        }
    else:
        steps |= {"size": square}
    steps |= PROCESSORS[config.vision.kind]
    if config.projector_layers == 1:
        steps |= {
            "image_processor_type": "SmolVLMImageProcessor",
            "resample": 1,
            "size": {"longest_edge": config.limits.most},
            "max_image_size": {"longest_edge": side},
        }
    if config.packs:
        kind = "LlavaOnevision" if config.shrinks else "LlavaNext"
        steps |= {
            "image_processor_type": f"{kind}ImageProcessor",
            "image_grid_pinpoints": [list(size) for size in config.limits.sizes],
        }
    return steps


def _tokenizer(vocab: int, specials: Mapping[str, int]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(specials),
        special_tokens=[],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(_CORPUS, trainer)
    learned = json.loads(trained.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].get)

    free = (index for index in range(vocab) if index not in set(specials.values()))
    ids = {word: index for word, index in zip(words, free, strict=False)} | dict(specials)
    ids |= {f"Ġw{index}": index for index in free}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>" if "<unk>" in ids else None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    if "<s>" in specials:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", specials["<s>"])]
        )
    return tokenizer


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
