"""Checkpoints of random models that tests write: weights that are not what they start as."""

import json
from pathlib import Path

import numpy as np
import torch
from visistage.compile.checkpoint.dummy_tokenizer import write_text_files
from visistage.graphs.config import ModelConfig
from visistage.runtime.image.image import load_image, prepare
from visistage.runtime.image.preprocessing import Preprocessing
from visistage.runtime.text.template import read_tokenizer_json


@torch.no_grad()
def written(path, model, data, specials, *, scale) -> Path:
    """Move every weight of a model, write it as a checkpoint directory and return that.

    data: its ``config.json``. specials: ids of special tokens. scale: of matrices.
    """
    path = Path(path)
    for name, weight in model.float().named_parameters():
        if weight.ndim == 1:
            weight.add_(torch.randn(weight.shape) * 0.1)
        elif "embed" not in name:
            weight.mul_(scale)
        else:
            weight.mul_(20)
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(data, indent=2))
    write_text_files(path, ModelConfig.from_hf(data), specials)
    return path


def processor_of(kind, path):
    """Return an image processor of a class of transformers, as a checkpoint describes it."""
    steps = json.loads((Path(path) / "preprocessor_config.json").read_text())
    steps.pop("image_processor_type")
    return kind(**steps)


def check_pixels(path, config, processor, image) -> None:
    """Hold the pixels that the runtime makes of an image against a processor of transformers."""
    theirs = processor(image, return_tensors="np")["pixel_values"][0]
    steps = read_tokenizer_json(Path(path) / "preprocessor_config.json")
    layout = config.layout(image.height, image.width)
    ours = prepare(load_image(image), Preprocessing.from_files(None, steps), layout)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-6
