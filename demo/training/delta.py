"""Weights trained for a method as their difference from the shipped demo's, a fifth of its size.

A matrix that changed is stored as codes of four bits, two a byte, with a scale for each row; what
is new, of another shape, or no matrix, as it is. Hashes say which model a delta belongs to, and
which weights their sum must be.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MODEL = Path(__file__).parents[1] / "model"
"""The shipped demo."""

DELTAS = Path(__file__).parents[1] / "deltas"
CODES, SCALES = ".codes", ".scales"
WEIGHTS = "model.safetensors"
LARGEST = 7
"""Codes are -7 to 7."""

_PREFIXES = (  # in memory, in files
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower."),
)

Weights = dict[str, torch.Tensor]


def file_weights(model) -> Weights:
    """Return the weights of ``model`` in FP16 by their names in files."""
    found = {}
    for name, weight in model.state_dict().items():
        theirs, ours = next(pair for pair in _PREFIXES if name.startswith(pair[0]))
        found[ours + name.removeprefix(theirs)] = weight.detach().half().contiguous()
    return found


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 of names, shapes and values."""
    found = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        found.update(f"{name} {weight.dtype} {[*weight.shape]}".encode())
        found.update(weight.contiguous().numpy().tobytes())
    return found.hexdigest()


def write_delta(file: Path, base: Weights, trained: Weights, config: Mapping[str, str]) -> None:
    """Write the difference of ``trained`` from ``base``, with the fields that its config gets."""
    stored: Weights = {}
    for name, weight in trained.items():
        old = base.get(name)
        if old is not None and torch.equal(old, weight):
            continue
        if old is None or old.shape != weight.shape or weight.ndim < 2:
            stored[name] = weight
        else:
            change = weight.float() - old.float()
            scales = (change.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(2.0**-24).half()
            codes = (change / scales.float()).round().clamp(-LARGEST, LARGEST).to(torch.int8) + 8
            codes = codes.to(torch.uint8).view(len(codes), -1, 2)
            stored[name + CODES] = codes[..., 0] * 16 + codes[..., 1]
            stored[name + SCALES] = scales
    about = {
        "base": digest(base),
        "weights": digest(with_delta(base, stored)),
        "config": json.dumps(dict(config)),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, file, metadata=about)
    file.chmod(0o644)  # some versions keep it from other users


def with_delta(base: Weights, stored: Weights) -> Weights:
    """Return the weights that a delta's tensors make of ``base``, in FP16."""
    found = dict(base)
    for name, tensor in stored.items():
        if name.endswith(CODES):
            name = name.removesuffix(CODES)
            codes = torch.stack((tensor // 16, tensor % 16), -1).flatten(-2).float() - 8
            tensor = (base[name].float() + codes * stored[name + SCALES].float()).half()
        if not name.endswith(SCALES):
            found[name] = tensor
    return found


def about(file: Path) -> dict[str, str]:
    """Return what a delta says of itself: hashes of its base and of the sum, fields of config."""
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def write_checkpoint(out: Path, weights: Weights, config: Mapping[str, str]) -> None:
    """Write a checkpoint in folder ``out``: the shipped demo's files, with other weights."""
    shutil.copytree(MODEL, out, dirs_exist_ok=True)
    file = out / "config.json"
    fields = json.loads(file.read_text()) | dict(config)
    file.write_text(json.dumps(fields, indent=2) + "\n")
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    (out / WEIGHTS).chmod(0o644)


def apply(file: Path, out: Path) -> str:
    """Write the checkpoint that a delta makes of the shipped demo; return the hash of its weights.

    Raises:
        ValueError: the delta belongs to another demo, or does not give the weights that it was
            measured with.
    """
    base, said = load_file(MODEL / WEIGHTS), about(file)
    if digest(base) != said["base"]:
        raise ValueError(f"{file} was trained from another demo. Train anew, without --apply")
    weights = with_delta(base, load_file(file))
    found = digest(weights)
    if found != said["weights"]:
        raise ValueError(f"{file} gives weights of hash {found}, not of {said['weights']}")
    write_checkpoint(out, weights, json.loads(said["config"]))
    return found
