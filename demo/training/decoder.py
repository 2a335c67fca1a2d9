"""Second phase: projector, decoder and, slowly, the vision encoder learn to answer.

Beside the answers, heads that are discarded ask what each phrase names and where things are, and
some heads of attention are taught where to look (`supervision.py`).
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F

from ..easy_vqa import easy_vqa_samples
from ..heldout import held_out
from . import data_parallel, packed
from . import recipe as r
from .accuracy import answer_accuracy, prepare_test
from .align import align_projector
from .architecture import save
from .batches import Batch, BatchMix, normalise_pixels, stream
from .encoder import encoder_weights, split_weights
from .muon import Optimizer
from .state import TrainState
from .supervision import (
    PLACES,
    FactHead,
    fact_classes,
    look_loss,
    patch_classes,
    patch_loss,
    phrase_look_loss,
    phrase_loss,
    tell_loss,
)

log = logging.getLogger("visistage.demo.training")
STAGINGS = {"dense": packed.DENSE_STAGES, "plan": packed.PLAN_STAGES}
HEAD_RATE = 3e-3


def build_heads(model, world) -> torch.nn.ModuleDict:
    """Return the heads that training asks through."""
    wide, width = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    patch = sum(patch_classes(world).values()) + PLACES
    phrase = sum(fact_classes(world).values()) + world.most + 1 + 2
    heads = {"patch": FactHead(wide, patch), "projected": FactHead(width, patch)}
    heads |= {f"phrase {layer}": FactHead(width, phrase) for layer in r.PHRASE_LAYERS}
    heads |= {f"tell {layer}": FactHead(width, 4) for layer in r.TELL_LAYERS}
    return torch.nn.ModuleDict(heads)


def warm_heads(model, heads, world, images: int = 200, steps: int = 60) -> None:
    """Fit the heads on patches to the features as they are, before these move."""
    batch = next(stream(BatchMix(images, world=world), "warm"))
    with torch.no_grad():
        features = packed.encoder_features(model, normalise_pixels(batch.pixels))[:, 1:]
        projected = model.model.multi_modal_projector(features)
    targets = batch.patches.flatten(0, 1)
    for head, rows in ((heads["patch"], features), (heads["projected"], projected)):
        adam, rows = torch.optim.Adam(head.parameters()), rows.flatten(0, 1)
        for step in range(steps):
            adam.param_groups[0]["lr"] = 0.001 + 0.019 * (1 - step / steps)
            patch_loss(head(rows), targets, world)[0].backward()
            adam.step()
            adam.zero_grad()


def batch_losses(
    model, heads, batch: Batch, prefix, spent: float, recipe: r.Recipe
) -> dict[str, torch.Tensor]:
    """Return every loss of a batch, already weighed; drawn stages and token dropout included."""
    world, bands, found = recipe.world, batch.bands, {}
    raw = packed.encoder_features(model, normalise_pixels(batch.pixels))[:, 1:]
    features = model.model.multi_modal_projector(raw)
    entering, owners = None, batch.owners
    if owners is not None and torch.rand(()).item() < recipe.dropout:
        entering = r.draw_entering(owners)
        owners = owners.gather(1, entering)
    looks: list = []
    states: list = []
    hidden = packed.forward(
        model,
        features,
        prefix,
        [band.ids for band in bands],
        r.draw_staging(),
        log=looks,
        states=states,
        entering=entering,
        close_up=torch.rand(()).item() < 0.5,
    )
    said = [band.targets >= 0 for band in bands]
    hidden = torch.cat([h[s] for h, s in zip(hidden, said, strict=True)])
    targets = torch.cat([band.targets[s] for band, s in zip(bands, said, strict=True)])
    found["answer"] = F.cross_entropy(model.lm_head(hidden).float(), targets)
    if owners is None:
        return found
    for name, rows in (("patch", raw), ("projected", features)):
        outputs = heads[name](rows).flatten(0, 1)
        found[name] = patch_loss(outputs, batch.patches.flatten(0, 1), world)[0]
    if any((band.marks[..., 0] >= 0).any() for band in bands):
        phrases = [
            phrase_loss(states[layer], bands, heads[f"phrase {layer}"], world)[0]
            for layer in r.PHRASE_LAYERS
        ]
        tells = [tell_loss(states[layer], bands, heads[f"tell {layer}"]) for layer in r.TELL_LAYERS]
        found["phrase"] = sum(phrases) / len(phrases)
        found["tell"] = sum(tells) / len(tells)
        found["phrase look"] = phrase_look_loss(looks[r.PHRASE_LOOK_LAYER], owners, bands)
        look = sum(look_loss(looks[layer], owners, bands) for layer in r.LOOK_LAYERS)
        found["look"] = (1 - spent) * look
    return {name: loss * r.WEIGHTS.get(name, 1.0) for name, loss in found.items()}


def train_decoder(model, tokenizer, state: TrainState, rank: int, recipe: r.Recipe, options):
    """Teach the model to answer; save it at the end, and whenever the state is saved."""
    world = recipe.world
    prefix = torch.tensor(tokenizer.encode("USER: <image>").ids[:-1])
    heads = build_heads(model, world)
    rates = options.rate, 1e-3
    optimizers = {
        "decoder": Optimizer(
            *split_weights(model, skip=("vision_tower",)), *rates, dtype=options.dtype
        ),
        "vision": Optimizer(
            *encoder_weights(model.model.vision_tower),
            *(rate * recipe.vision_rate for rate in rates),
            dtype=options.dtype,
        ),
        "heads": Optimizer([], [*heads.parameters()], adam_lr=HEAD_RATE),
    }
    parameters = [weight for optimizer in optimizers.values() for weight in optimizer.parameters]
    if not state.begin("decoder", {"heads": heads}, optimizers):
        if recipe.start is None:
            align_projector(model, world)
        warm_heads(model, heads, world)
        data_parallel.broadcast(model)
        data_parallel.broadcast(heads)
    asked = recipe.questions
    mix = BatchMix(recipe.batch, asked, turns=0.05, weights=recipe.kinds, world=world)
    few = BatchMix(recipe.batch, asked, things=recipe.few, world=world)
    easy = BatchMix(recipe.batch, 24, world=world, easy_vqa=True)
    source, early, outside = (
        stream(composed, f"{name} {rank} {state.step}", tokenizer)
        for name, composed in (("decoder", mix), ("early", few), ("easy-VQA", easy))
    )
    tests = _prepare_tests(tokenizer, recipe, 280) if rank == 0 else {}
    torch.manual_seed(1000 * state.step + rank)
    begin, seen, reported = time.time(), 0, state.images
    losses = defaultdict(list)
    while state.images < recipe.images:
        spent = state.images / recipe.images
        if torch.rand(()).item() < recipe.easy_vqa:
            batch = next(outside)
        else:
            batch = next(early if torch.rand(()).item() < 0.6 * (1 - spent / 0.4) else source)
        with torch.autocast("cpu", options.dtype, enabled=options.dtype != torch.float32):
            found = batch_losses(model, heads, batch, prefix, spent, recipe)
        sum(found.values()).backward()
        data_parallel.average(parameters)
        for optimizer in optimizers.values():
            optimizer.step(r.schedule(spent))
        seen += recipe.batch * options.processes
        state.advance(recipe.batch * options.processes)
        if rank:
            continue
        if batch.owners is None:
            found["easy-VQA"] = found.pop("answer")
        for name, loss in found.items():
            losses[name].append(loss.item())
        if state.step % 25 == 0:
            words = " ".join(f"{name} {np.mean(values):.3f}" for name, values in losses.items())
            log.info("images %6d %.1f/s %s", state.images, seen / (time.time() - begin), words)
            losses.clear()
        if state.images - reported >= options.report:
            reported = state.images
            _report(model, prefix, tests)
        if state.due():
            state.save()
            save(model, tokenizer, options.out, world)
    if rank == 0:
        state.save()
        save(model, tokenizer, options.out, world)
        _report(model, prefix, _prepare_tests(tokenizer, recipe, options.questions, seed=0))


def _prepare_tests(tokenizer, recipe: r.Recipe, count: int, seed: int = 1):
    tests = {"held out": prepare_test(tokenizer, held_out(count, seed, world=recipe.world))}
    if recipe.easy_vqa:
        tests["easy-VQA"] = prepare_test(tokenizer, easy_vqa_samples(count))
    return tests


def _report(model, prefix, tests) -> None:
    for test, prepared in tests.items():
        for name, staging in STAGINGS.items():
            table = answer_accuracy(model, prefix, prepared, staging)
            words = " ".join(f"{kind} {100 * share:.1f}" for kind, share in sorted(table.items()))
            log.info("  %s, %s: %s", test, name, words)
