"""First phase: the vision encoder learns what each patch shows."""

from __future__ import annotations

import logging
import time

import torch

from . import data_parallel, packed
from .batches import BatchMix, normalise_pixels, stream
from .muon import Optimizer
from .recipe import Recipe, schedule
from .state import TrainState
from .supervision import PLACES, FactHead, patch_classes, patch_loss

log = logging.getLogger("visistage.demo.training")
IMAGES_A_STEP = 16  # of each process


def split_weights(module, skip=()):
    """Return the parameters of `module` as (matrices for Muon, others for AdamW)."""
    matrices, others = [], []
    for name, weight in module.named_parameters():
        if any(part in name for part in skip):
            continue
        inner = weight.ndim == 2 and not any(s in name for s in ("embed", "lm_head"))
        (matrices if inner else others).append(weight)
    return matrices, others


def encoder_weights(vision_encoder):
    """Return the parameters of the vision encoder's used layers, as `split_weights` does."""
    last = f"layers.{vision_encoder.config.num_hidden_layers - 1}."
    return split_weights(vision_encoder, skip=(last, "post_layernorm"))


def pretrain_encoder(model, state: TrainState, rank: int, recipe: Recipe, options) -> None:
    """Teach the vision encoder through a linear head, which is discarded."""
    world, vision_encoder = recipe.world, model.model.vision_tower
    outputs = sum(patch_classes(world).values()) + PLACES
    head = FactHead(vision_encoder.config.hidden_size, outputs)
    optimizer = Optimizer(
        *encoder_weights(vision_encoder), recipe.encoder_rate, dtype=options.dtype
    )
    teaching = Optimizer([], [*head.parameters()], adam_lr=5e-3)
    state.begin("encoder", {"head": head}, {"model": optimizer, "head": teaching})
    mix = BatchMix(IMAGES_A_STEP, few=0.15, world=world)
    source = stream(mix, f"encoder {rank} {state.step}")
    begin, seen = time.time(), 0
    while state.images < recipe.encoder_images:
        batch = next(source)
        with torch.autocast("cpu", options.dtype, enabled=options.dtype != torch.float32):
            features = packed.encoder_features(model, normalise_pixels(batch.pixels))[:, 1:]
        loss, right = patch_loss(head(features).flatten(0, 1), batch.patches.flatten(0, 1), world)
        loss.backward()
        data_parallel.average(optimizer.parameters + teaching.parameters)
        rate = schedule(state.images / recipe.encoder_images, flat=0.45)
        optimizer.step(rate)
        teaching.step(rate)
        seen += IMAGES_A_STEP * options.processes
        state.advance(IMAGES_A_STEP * options.processes)
        if rank:
            continue
        if state.step % 50 == 0:
            words = " ".join(f"{k} {v:.3f}" for k, v in right.items())
            speed = seen / (time.time() - begin)
            log.info("encoder %6d %.0f/s loss %.3f %s", state.images, speed, loss.item(), words)
        if state.due() or state.images >= recipe.encoder_images:
            state.save()
