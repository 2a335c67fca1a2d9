"""Tensors of a checkpoint folder: where each one is, in one safetensors file or in many shards.

Headers only are read (``graphs.safetensors_header``). Refused are pickles, quantised weights,
shards that are missing or outside the folder, and tensors that do not fit the config.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ...graphs.config import ModelConfig
from ...graphs.errors import ModelError
from ...graphs.fields import read_json
from ...graphs.plan.routing import is_router
from ...graphs.safetensors_header import TensorInfo, read_safetensors
from .names import EMBEDDING, HEAD_WEIGHT, canonical, tensor_shapes

SINGLE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 64 << 20
FLOAT_DTYPES = ("F32", "F16", "BF16")
_QUANTISED = ("I8", "U8", "I32", "I16", "F8_E4M3", "F8_E5M2", "F4")
_FILE = re.compile(r"[^/\\\0]+\.safetensors")  # in the folder itself
# Buffers that older transformers saved, and parts of vision encoders that LLaVA never reads.
_UNREAD = (".position_ids", ".rotary_emb.inv_freq", ".masked_bias")
_AGAIN = "Download it again, or save the model again with save_pretrained."


def read_tensors(folder: Path, config: ModelConfig) -> dict[str, TensorInfo]:
    """Return every tensor that ``config`` asks for, by canonical name, checked for shape and type.

    A tied model without a head of its own gets the embedding as ``lm_head.weight``. Routers are
    returned, too, unchecked: which of them are read is a plan's business (``routers.py``).

    Raises:
        ModelError: no usable weights in the folder, a damaged file, or tensors that are missing,
            unknown, quantised or of another shape; names the file and the first few tensors.
    """
    found: dict[str, TensorInfo] = {}
    spelled: dict[str, str] = {}
    for name, info in _stored(folder).items():
        ours = canonical(name, config.family)
        if ours in found:
            raise ModelError(
                f"{info.file} holds {ours} twice, as {spelled[ours]} and as {name}. Remove one, or "
                "save the model again with save_pretrained."
            )
        found[ours], spelled[ours] = info, name
    if config.text.tied and HEAD_WEIGHT not in found and EMBEDDING in found:
        found[HEAD_WEIGHT] = found[EMBEDDING]
    wanted = tensor_shapes(config)
    _check(folder, wanted, found)
    known = tensor_shapes(config, whole_encoder=True)
    unknown = [
        spelled[name]
        for name in found
        if name not in known
        and not name.endswith(_UNREAD)
        and ".head." not in name
        and not is_router(name)
    ]
    if unknown:
        raise ModelError(
            f"{folder} holds {few(unknown)} that no part of the model reads, as config.json has "
            "it: answers would differ from the checkpoint's. Check that config.json belongs to "
            "these weights, or remove the tensors and save the model again with save_pretrained."
        )
    return {name: found[name] for name in (*wanted, *filter(is_router, found))}


def read_checkpoint_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ModelError: unreadable, too large, not UTF-8 JSON, or not an object; names the file.
    """
    data = read_json(file, ModelError, "Download it again.", MAX_JSON_BYTES)
    if not isinstance(data, dict):
        raise ModelError(f"{file} holds no JSON object. Download it again.")
    return data


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return all tensors of ``file``, by their name in the file, in the order of their bytes.

    Raises:
        ModelError: the file cannot be read, is cut short, or its header contradicts itself.
    """
    return read_safetensors(file, ModelError, _AGAIN).tensors


def _stored(folder: Path) -> dict[str, TensorInfo]:
    """Return all tensors under the names in the files; transformers' own order of preference."""
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / SHARD_INDEX).is_file():
        return _shards(folder, read_checkpoint_json(folder / SHARD_INDEX).get("weight_map"))
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(files[0])
    if files:
        raise ModelError(
            f"{folder} holds {len(files)} safetensors files but no {SHARD_INDEX}, which says where "
            "each tensor is. Download it as well."
        )
    pickles = sorted(
        file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind)
    )
    if pickles:
        raise ModelError(
            f"{folder} holds pickled weights only ({pickles[0]}), which can run code when they are "
            "opened; expected model.safetensors. If you trust them, convert them once: python -c "
            "\"from transformers import LlavaForConditionalGeneration as M; M.from_pretrained('.')"
            ".save_pretrained('safe')\" in that folder"
        )
    raise ModelError(
        f"{folder} holds no weights: expected {SINGLE}, or {SHARD_INDEX} and its shards. Download "
        "them, or try without weights: --dummy-weights"
    )


def _shards(folder: Path, weight_map: Any) -> dict[str, TensorInfo]:
    index = folder / SHARD_INDEX
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map. Download it again.")
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _FILE.fullmatch(shard):
            raise ModelError(
                f"{index} says that {name} is in {shard!r}, expected the name of a file beside "
                "it. Download the index again."
            )
        if shard not in headers:
            if not (folder / shard).is_file():
                raise ModelError(
                    f"{index} names {shard}, which is not there. Download the missing shard."
                )
            headers[shard] = read_header(folder / shard)
        if name not in headers[shard]:
            raise ModelError(
                f"{index} says that {name} is in {shard}, which does not hold it. Download both "
                "again: they belong to different checkpoints."
            )
        tensors[name] = headers[shard][name]
    return tensors


def _check(folder: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, TensorInfo]) -> None:
    missing = [name for name in wanted if name not in found]
    for marker in ("qweight", "weight_scale", "absmax", "SCB", "scales"):
        if missing and any(name.endswith("." + marker) for name in found):
            _quantised(folder, f"tensors named *.{marker}")
    if missing:
        raise ModelError(
            f"{folder} lacks {few(missing)}, which its config.json asks for. Download the "
            "checkpoint again, or check that config.json belongs to it."
        )
    for name in wanted:
        if found[name].dtype in _QUANTISED:
            _quantised(folder, f"{name} as {found[name].dtype}")
        if found[name].dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{found[name].file} holds {name} as {found[name].dtype}, expected one of "
                f"{', '.join(FLOAT_DTYPES)}. Save the model again in one of those."
            )
    wrong = [name for name, shape in wanted.items() if found[name].shape != shape]
    if wrong:
        first = wrong[0]
        raise ModelError(
            f"{found[first].file} holds {first} with shape {list(found[first].shape)}, config.json "
            f"makes it {list(wanted[first])} (and {len(wrong) - 1} more such tensors). Check that "
            "config.json belongs to these weights."
        )


def _quantised(folder: Path, finding: str) -> NoReturn:
    raise ModelError(
        f"{folder} holds quantised weights ({finding}), expected {', '.join(FLOAT_DTYPES)}. Use "
        "the original checkpoint that they were made from."
    )


def few(names: Sequence[str], count: int = 3) -> str:
    """Return the first names of some tensors, and how many more there are."""
    rest = f" and {len(names) - count} more tensors" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
