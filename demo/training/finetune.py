"""Fine-tuning of the shipped demo for a method, under the method's own forward pass.

    python -m visistage.demo.training.finetune hidrop                  train, write the delta
    python -m visistage.demo.training.finetune hidrop --minutes 5      ... a while; again to go on
    python -m visistage.demo.training.finetune hidrop --apply FOLDER   write a whole checkpoint

The decoder and the projector are trained, the vision encoder is not. SkipGPT's routers are trained
first, with all else as it is; then the decoder, with the routers as they are. Questions are those
of the demo's training, the loss is that of the answers. The state is saved, and the same command
goes on from it. Rates follow the number of images: a busy machine makes the same weights slower.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from ..heldout import held_out
from . import data_parallel
from .accuracy import prepare_test
from .batches import Band, BatchMix, normalise_pixels, stream
from .delta import DELTAS, MODEL, WEIGHTS, apply, file_weights, write_checkpoint, write_delta
from .encoder import split_weights
from .methods import ROUTERS, RULES, ForwardRule, forward, prepare, visual_features
from .muon import Optimizer
from .recipe import RECIPES, schedule
from .state import TrainState
from .tokenizer import build_tokenizer
from .train import fastest_dtype

log = logging.getLogger("visistage.demo.training")

DECODER_RATES = (0.003, 6e-4)
"""Of Muon and of AdamW, for decoder and projector."""

ROUTER_RATE = 2e-3
TEMPERATURES = (5.0, 1.0)
"""Of the routers' noise, from the first image to the last."""

RUNS, SPARSITY_WEIGHT = 0.5, 8.0
"""Share of the rows that each router is to let run at most, and the weight of what is above it."""


@dataclass(frozen=True)
class FineTune:
    """The amount of training. images: for decoder and projector; router_images: before that."""

    images: int = 1600
    router_images: int = 0
    batch: int = 8
    questions: int = 16


AMOUNTS = dict.fromkeys(RULES, FineTune()) | {
    "group": FineTune(images=1200),
    "skipgpt": FineTune(router_images=800),
}


def prefix_of(tokenizer) -> torch.Tensor:
    """Return the token ids before the image."""
    return torch.tensor(tokenizer.encode("USER: <image>").ids[:-1])


def joined_bands(bands: list[Band], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids and targets (B, Q, T) of all bands, padded alike, and each prompt's last row."""
    longest = max(band.ids.shape[2] for band in bands)
    ids, targets = (
        torch.cat([F.pad(x, (0, longest - x.shape[2]), value=value) for x in each], 1)
        for each, value in (
            ([band.ids for band in bands], pad),
            ([band.targets for band in bands], -100),
        )
    )
    return ids, targets, (targets >= 0).float().argmax(-1)


def batch_loss(model, rule: ForwardRule, batch, prefix, pad: int, temperature: float | None):
    """Return the loss of the answers, and that of routers which let more rows run than wanted."""
    features = visual_features(model, normalise_pixels(batch.pixels), rule)
    ids, targets, last = joined_bands(batch.bands, pad)
    gates: list = []
    hidden = forward(model, rule, features, prefix, ids, last, temperature, gates)
    said = targets >= 0
    loss = F.cross_entropy(model.lm_head(hidden[said]).float(), targets[said])
    run = torch.stack([gate.mean() for pair in gates for gate in pair] or [loss.new_zeros(())])
    return loss, SPARSITY_WEIGHT * (run - RUNS).clamp_min(0).square().sum()


def optimizer_of(model, phase: str, dtype: torch.dtype) -> Optimizer:
    """Return what trains the routers, or decoder and projector; all else is held."""
    model.requires_grad_(False)
    routers, others = [], []
    for name, _ in model.named_parameters():
        if "vision_tower" not in name:
            (routers if any(router in name for router in ROUTERS) else others).append(name)
    for name in routers if phase == "routers" else others:
        model.get_parameter(name).requires_grad_(True)
    if phase == "routers":
        return Optimizer([], [model.get_parameter(name) for name in routers], adam_lr=ROUTER_RATE)
    matrices, rest = (
        [weight for weight in each if weight.requires_grad]
        for each in split_weights(model, skip=("vision_tower",))
    )
    return Optimizer(matrices, rest, *DECODER_RATES, dtype=dtype)


def train(rank: int, name: str, options) -> None:
    """Train in one of the processes; the first one reports and saves."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rule, amount, tokenizer = RULES[name], options.amount, build_tokenizer()
    prefix, pad = prefix_of(tokenizer), tokenizer.token_to_id("<pad>")
    model = starting_model(rule)
    state = TrainState(model, options.state, 1)
    if options.state.exists():
        state.read()
    test = prepare_test(tokenizer, held_out(options.questions, 1)) if rank == 0 else None
    if rank == 0:
        log.info("%s: %s", name, accuracy_line(model, rule, prefix, test))
    begin = time.monotonic()
    phases = {"routers": amount.router_images, "decoder": amount.images}
    for phase, images in phases.items():
        if not images or (phase == "routers" and state.phase == "decoder"):
            continue
        optimizer = optimizer_of(model, phase, options.dtype)
        state.begin(phase, {}, {phase: optimizer})
        mix = BatchMix(amount.batch, amount.questions, weights=RECIPES["demo"].kinds)
        source = stream(mix, f"{name} {phase} {rank} {state.step}", tokenizer)
        torch.manual_seed(1000 * state.step + rank)
        losses: list[tuple[float, float]] = []
        while state.images < images:
            spent = state.images / images
            hot, cold = TEMPERATURES
            noise = hot + (cold - hot) * spent if phase == "routers" else None
            with torch.autocast("cpu", options.dtype, enabled=options.dtype != torch.float32):
                loss, over = batch_loss(model, rule, next(source), prefix, pad, noise)
            (loss + over).backward()
            data_parallel.average(optimizer.parameters)
            optimizer.step(schedule(spent, flat=0.3))
            state.advance(amount.batch * options.processes)
            losses.append((loss.item(), over.item()))
            stop = enough(begin, options.minutes)
            if rank == 0 and (state.due() or stop or state.images >= images):
                state.save()
            if rank == 0 and (state.step % 25 == 0 or stop):
                means = [sum(each) / len(losses) for each in zip(*losses, strict=True)]
                log.info(
                    "%s %5d of %d images, loss %.3f + %.3f", phase, state.images, images, *means
                )
                losses.clear()
            if stop:
                return
    if rank == 0:
        trained = file_weights(model)
        write_delta(options.out, load_file(MODEL / WEIGHTS), trained, rule.config)
        log.info("%s: %s", name, accuracy_line(model, rule, prefix, test))


def enough(begin: float, minutes: float | None) -> bool:
    """Return whether every process is to stop: the first one's clock decides."""
    over = torch.tensor([float(minutes is not None and time.monotonic() - begin > 60 * minutes)])
    data_parallel.all_reduce([over])
    return bool(over.item())


def starting_model(rule: ForwardRule):
    """Return the shipped demo in FP32, with what ``rule`` needs besides, untrained."""
    model = LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32)
    model.set_attn_implementation({"vision_config": "eager"})
    prepare(model, rule)
    return model


@torch.no_grad()
def accuracy(model, rule: ForwardRule, prefix, test, chunk: int = 70) -> float:
    """Return the share of held-out answers that are right to the last token."""
    pixels, ids, targets, _ = test
    right: list[bool] = []
    for first in range(0, len(pixels), chunk):
        part = slice(first, first + chunk)
        features = visual_features(model, normalise_pixels(pixels[part]), rule)
        last = (targets[part] >= 0).float().argmax(-1)
        best = model.lm_head(forward(model, rule, features, prefix, ids[part], last)).argmax(-1)
        right += ((best == targets[part]) | (targets[part] < 0)).all(-1)[:, 0].tolist()
    return sum(right) / len(right)


def accuracy_line(model, rule: ForwardRule, prefix, test) -> str:
    """Return the accuracy in words."""
    return f"{100 * accuracy(model, rule, prefix, test):.1f} % of {len(test[0])} held-out questions"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line; train, or write a checkpoint."""
    parser = argparse.ArgumentParser(description="Fine-tune the demo for a method.")
    parser.add_argument("method", choices=RULES)
    parser.add_argument("--minutes", type=float, help="stop then; the same command goes on")
    parser.add_argument("--images", type=int, help="for decoder and projector")
    parser.add_argument("--router-images", type=int, help="for routers, before that")
    parser.add_argument("--processes", type=int, default=2, help="processes that train together")
    parser.add_argument("--questions", type=int, default=280, help="of the tests")
    parser.add_argument("--state", type=Path, help="what the same command goes on from")
    parser.add_argument("--out", type=Path, help="file of the delta")
    parser.add_argument("--apply", type=Path, metavar="OUT", help="write a checkpoint instead")
    parser.add_argument("--untrained", action="store_true", help="of --apply: without the delta")
    options = parser.parse_args(arguments)
    options.out = options.out or DELTAS / f"{options.method}.safetensors"
    if options.apply is not None:
        if options.untrained:
            rule = RULES[options.method]
            write_checkpoint(options.apply, file_weights(starting_model(rule)), rule.config)
        else:
            print(apply(options.out, options.apply))
        return
    amount = AMOUNTS[options.method]
    options.amount = FineTune(
        amount.images if options.images is None else options.images,
        amount.router_images if options.router_images is None else options.router_images,
    )
    options.state = options.state or Path(f".cache/finetune-{options.method}.pt")
    torch.set_num_threads(1)
    options.dtype = fastest_dtype()
    data_parallel.run_parallel(train, options.processes, options.method, options)


if __name__ == "__main__":
    main()
