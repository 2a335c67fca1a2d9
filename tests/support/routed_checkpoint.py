"""Checkpoints of the tests with routers beside their tensors, under the released names."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from visistage.compile.checkpoint.names import router_shapes
from visistage.graphs.config import ModelConfig
from visistage.graphs.plan.routing import ROUTERS, Routing

SPARSITY = 0.25


def add_routers(path, kind, *, seed=0, wrapped=False, gain=1.0) -> Path:
    """Give the checkpoint in ``path`` random routers of a kind; ``wrapped``: layers are ``block``,
    as those who train them save it.
    """
    file = Path(path) / "model.safetensors"
    config = ModelConfig.from_hf(json.loads((Path(path) / "config.json").read_text()))
    routing = Routing(kind, sparsity=SPARSITY if ROUTERS[kind].whole_prompt else None)
    weights, generator = load_file(file), torch.Generator().manual_seed(seed)
    front = "language_model." if any(name.startswith("language_model.") for name in weights) else ""
    if wrapped:
        weights = {_wrapped(name): tensor for name, tensor in weights.items()}
    for name, shape in router_shapes(config.text, routing).items():
        noise = torch.randn(shape, generator=generator)
        weights[front + name] = gain * noise * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
    save_file(weights, file, metadata={"format": "pt"})
    return Path(path)


def _wrapped(name):
    head, layers, rest = name.partition("model.layers.")
    number, dot, own = rest.partition(".")
    return f"{head}{layers}{number}{dot}block.{own}" if layers else name
