"""Folders and files that hold a model in another form: each is named, with what to do instead.

Known by the names of their files. Nothing is opened but small JSON that says what it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ...graphs.errors import ModelError
from ...graphs.fields import read_json, show

_OTHER = "Name the Hugging Face checkpoint (config.json, safetensors) that it was made from."
_ADAPTER = "adapter_config.json"

FORMATS = (  # pattern of a name in the folder, what it shows, the next step
    (
        _ADAPTER,
        "a LoRA adapter, which only changes another model",
        'Merge it into that model once: python -c "from peft import PeftModel; from transformers '
        "import LlavaForConditionalGeneration as M; PeftModel.from_pretrained(M.from_pretrained("
        "'{base}'), '{folder}').merge_and_unload().save_pretrained('merged')\", add the tokenizer "
        "and processor files of {base}, and name merged.",
    ),
    (
        "*.gguf",
        "weights in GGUF, the format of llama.cpp",
        f"{_OTHER} To quantise it here: --precision w4.",
    ),
    (
        "mm_projector.bin",
        "the projector alone, in the original LLaVA format",
        "Name a whole model in Hugging Face's format, such as llava-7b.",
    ),
    (
        "non_lora_trainables.bin",
        "what LoRA training changed, in the original LLaVA format",
        "Merge and convert it to Hugging Face's format, and name that folder.",
    ),
    ("quant_config.json", "weights quantised by AWQ", f"{_OTHER} Then: --precision w4."),
    ("quantize_config.json", "weights quantised by GPTQ", f"{_OTHER} Then: --precision w4."),
    ("manifest.json", "a bundle, which is built already", "Ask it: visistage infer --bundle DIR."),
    ("model_index.json", "a pipeline of diffusers, which makes images", "Try llava-7b."),
    ("*.onnx", "ONNX graphs of another exporter", _OTHER),
    ("openvino_*.xml", "OpenVINO graphs", f"{_OTHER} Then: --target openvino."),
    ("*.engine", "engines of TensorRT", _OTHER),
    ("tf_model.h5", "weights of TensorFlow", _OTHER),
    ("flax_model*.msgpack", "weights of Flax", _OTHER),
    ("consolidated.*", "weights in their authors' own format", _OTHER),
)
_QUANTISED = ("quant_config.json", "quantize_config.json")
"""Files that lie beside weights in safetensors."""

_CACHED = re.compile(r"models--([^-].*?)--(.+)")


def reject_foreign_folder(folder: Path) -> None:
    """Refuse a folder without a whole checkpoint whose files show what it is instead.

    Raises:
        ModelError: names it, and the next step.
    """
    own = [file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_")]
    whole = bool(own) and (folder / "config.json").is_file()
    for pattern, what, step in FORMATS:
        found = sorted(folder.glob(pattern))
        if found and (not whole or pattern in _QUANTISED):
            step = step.format(folder=folder, base=_base(folder) if pattern == _ADAPTER else "")
            raise ModelError(f"{folder} holds {what} ({found[0].name}), no checkpoint. {step}")
    if (folder / "config.json").exists():
        return
    for name, model, inner in _cached(folder):
        raise ModelError(
            f"{folder} is part of the hub's cache ({name}), no checkpoint. Name the model as the "
            f"hub does: {model}, or the folder {inner}."
        )
    below = sorted(file.parent for file in folder.glob("*/config.json"))
    if below:
        raise ModelError(f"{folder} has no config.json, {below[0]} has: name that folder.")


def reject_file(file: Path) -> None:
    """Refuse a file that was named instead of a folder."""
    if file.suffix == ".gguf":
        raise ModelError(f"{file} holds weights in GGUF, the format of llama.cpp. {_OTHER}")
    raise ModelError(
        f"{file} is a file, expected a checkpoint folder. Name its folder: {file.parent}"
    )


def _base(folder: Path) -> str:
    """Return the model that an adapter changes, as its config names it."""
    try:
        data = read_json(folder / _ADAPTER, ModelError, "")
    except ModelError:
        data = None
    base = data.get("base_model_name_or_path") if isinstance(data, dict) else None
    return show(base)[1:-1] if isinstance(base, str) and base else "BASE"


def _cached(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield what of the hub's cache a folder is: a name, the model's id there, a snapshot."""
    for place in (folder, folder.parent, *sorted(folder.glob("models--*"))):
        known = _CACHED.fullmatch(place.resolve().name)
        snapshots = sorted(place.glob("snapshots/*/config.json"))
        if known and snapshots:
            yield known[0], f"{known[1]}/{known[2]}", snapshots[-1].parent
