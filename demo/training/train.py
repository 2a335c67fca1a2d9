"""Training of the demo model.

    python -m visistage.demo.training.train --minutes 60 --out demo/model

First the vision encoder learns what each patch shows, from the renderer; then projector and decoder
learn to answer, with the vision encoder fixed at first. The row that answers is also taught where
to look. The learning rate follows the clock, so more minutes make a better model. The state is
saved, and `--resume` continues from it.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..heldout import held_out
from . import data_parallel, packed
from .align import align_projector
from .architecture import build_model, save
from .batches import BatchMix, encode_rows, normalise_pixels, stream
from .muon import Optimizer
from .supervision import PATCH_OUTPUTS, look_loss, patch_loss
from .tokenizer import build_tokenizer

WEIGHTS = (1.0, 1.0, 1.5, 1.25, 1.0, 1.0, 1.0)  # how often each of KINDS is asked
LOOK_LAYERS = (2, 3)  # where the row that answers is taught where to look
log = logging.getLogger("visistage.demo.training.train")


def schedule(spent: float, warm: float = 0.02, flat: float = 0.45) -> float:
    """Return the learning-rate factor at the share `spent` of the time: rise, stay, fall to 0."""
    if spent < warm:
        return spent / warm
    if spent < flat:
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (spent - flat) / (1 - flat)))


def split_weights(module, skip=()):
    """Return the parameters of `module` as (matrices for Muon, others for AdamW)."""
    matrices, others = [], []
    for name, weight in module.named_parameters():
        if not weight.requires_grad or any(s in name for s in skip):
            continue
        inner = weight.ndim == 2 and not any(s in name for s in ("embed", "lm_head"))
        (matrices if inner else others).append(weight)
    return matrices, others


def _encoder_weights(vision_encoder):
    last = f"layers.{vision_encoder.config.num_hidden_layers - 1}."
    return split_weights(vision_encoder, skip=(last, "post_layernorm"))


def pretrain_encoder(model, rank: int, options) -> None:
    """Teach the vision encoder what each patch shows, through a linear head that is discarded."""
    vision_encoder = model.model.vision_tower
    minutes = options.tower_minutes
    head = torch.nn.Linear(vision_encoder.config.hidden_size, PATCH_OUTPUTS)
    matrices, others = _encoder_weights(vision_encoder)
    optimizer = Optimizer(matrices, [*others, *head.parameters()], muon_lr=options.tower_lr)
    data_parallel.broadcast(head)
    begin, spent, step, images = time.time(), 0.0, 0, 0
    source = stream(BatchMix(32 // options.processes), f"tower {rank}")
    while spent < 1:
        pixels, targets = next(source)
        outputs = head(packed.encoder_features(model, normalise_pixels(pixels))[:, 1:])
        loss, right = patch_loss(outputs.flatten(0, 1), targets.flatten(0, 1))
        loss.backward()
        spent = data_parallel.average(optimizer.parameters, (time.time() - begin) / 60 / minutes)
        optimizer.step(schedule(spent))
        step, images = step + 1, images + len(pixels) * options.processes
        if step % 50 == 0 and rank == 0:
            rate = images / (time.time() - begin)
            words = " ".join(f"{k} {v:.3f}" for k, v in right.items())
            log.info(
                "vision encoder %5d %.0f images/s loss %.3f %s", step, rate, loss.item(), words
            )


def prepare_test(tokenizer, count: int, seed: int = 1):
    """Return pixels, rows and kinds of `count` held-out samples, one question per image."""
    samples = list(held_out(count, seed))
    pixels = torch.from_numpy(np.stack([np.asarray(s.image).transpose(2, 0, 1) for s in samples]))
    texts = [f"{s.prompt.split('<image>')[1]} {s.answer}</s>" for s in samples]
    rows = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    ids, targets = encode_rows(rows, tokenizer, len(samples))
    return pixels, ids, targets, [s.kind for s in samples]


@torch.no_grad()
def answer_accuracy(
    model, prefix, test, staging=packed.DENSE_STAGES, chunk: int = 100
) -> dict[str, float]:
    """Return the share of answers that are right to the last token, by kind and "all"."""
    pixels, ids, targets, kinds = test
    right = []
    for lo in range(0, len(kinds), chunk):
        part = slice(lo, lo + chunk)
        features = packed.visual_features(model, normalise_pixels(pixels[part]))
        last = (targets[part, 0] >= 0).float().argmax(-1)
        hidden = packed.forward(model, features, prefix, [ids[part]], staging, last)[0]
        best = model.lm_head(hidden).argmax(-1)
        right += ((best == targets[part]) | (targets[part] < 0)).all(-1)[:, 0].tolist()
    table = defaultdict(list)
    for kind, hit in zip(kinds, right, strict=True):
        table[kind].append(hit)
        table["all"].append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in table.items()}


def draw_staging() -> packed.TrainStages:
    """Draw how the next batch sees its image: dense, or in stages as compiled plans do."""
    draw = torch.rand(()).item()
    if draw < 0.3:
        return packed.DENSE_STAGES
    if draw < 0.7:
        return packed.TrainStages(blind=2, last=4)
    return packed.TrainStages(blind=2, select_after=4, keep=16, last=6)


def train_decoder(model, tokenizer, rank: int, options) -> None:
    """Teach projector and decoder to answer; the vision encoder is fixed until `--thaw`."""
    state = options.state
    vision_encoder = model.model.vision_tower
    vision_encoder.requires_grad_(False)
    prefix = torch.tensor(tokenizer.encode("USER: <image>").ids[:-1])
    test = prepare_test(tokenizer, 280)
    optimizer = Optimizer(*split_weights(model), muon_lr=options.lr, adam_lr=options.adam_lr)
    vision_encoder.requires_grad_(True)
    thawing = Optimizer(*_encoder_weights(vision_encoder), options.lr / 5, options.adam_lr / 5)
    done, step = 0.0, 0
    kept = torch.load(state, weights_only=True) if options.resume and state.exists() else {}
    if kept.get("optimizer"):
        optimizer.load_state_dict(kept["optimizer"])
        thawing.load_state_dict(kept["thawing"])
        done, step = (0.0 if options.fresh else kept["minutes"]), kept["step"]
    else:
        align_projector(model)
        data_parallel.broadcast(model)
    begin, reported, saved, seen = time.time(), time.time(), time.time(), 0
    losses, looked = [], []
    images, spent = options.pictures // options.processes, done / options.minutes
    easy = BatchMix(images, options.questions, fewest=1, most=3)
    early = stream(easy, f"early {rank} {step}")
    source = stream(
        BatchMix(images, options.questions, turns=0.1, weights=WEIGHTS), f"decoder {rank} {step}"
    )
    torch.manual_seed(1000 * step + rank)
    while spent < 1:
        pixels, owners, asked = next(
            early if torch.rand(()).item() < options.easy * (1 - spent / 0.4) else source
        )
        thawed = spent > options.thaw
        with torch.set_grad_enabled(thawed):
            seen_by = packed.encoder_features(model, normalise_pixels(pixels))[:, 1:]
        features = model.model.multi_modal_projector(seen_by)
        suffixes, targets, wanted = zip(*asked, strict=True)
        looks: list = []
        staging = draw_staging()
        hidden = packed.forward(model, features, prefix, suffixes, staging, log=looks)
        hidden = torch.cat([h[t >= 0] for h, t in zip(hidden, targets, strict=True)])
        targets = torch.cat([t[t >= 0] for t in targets])
        loss = F.cross_entropy(model.lm_head(hidden), targets)
        losses.append(loss.item())
        if any(w.any() for w in wanted):
            look = sum(look_loss(looks[layer], owners, asked) for layer in LOOK_LAYERS)
            loss = loss + options.look * (1 - spent) * look
            looked.append(look.item() / len(LOOK_LAYERS))
        loss.backward()
        minutes = (time.time() - begin) / 60 + done
        trained = optimizer.parameters + (thawing.parameters if thawed else [])
        spent = data_parallel.average(trained, minutes / options.minutes)
        optimizer.step(schedule(spent))
        if thawed:
            thawing.step(schedule(spent))
        step, seen = step + 1, seen + len(pixels) * options.processes
        if rank:
            continue
        if step % 25 == 0:
            rate = seen / (time.time() - begin)
            log.info(
                "step %5d %.1f%% %.1f images/s loss %.4f look %.3f",
                *(step, 100 * spent, rate, np.mean(losses), np.mean(looked)),
            )
            losses, looked = [], []
        if time.time() - reported > 60 * options.report:
            reported = time.time()
            for name, staging in (("dense", packed.DENSE_STAGES), ("plan ", packed.PLAN_STAGES)):
                table = answer_accuracy(model, prefix, test, staging)
                words = " ".join(f"{k} {v:.3f}" for k, v in table.items())
                log.info("  %s %s", name, words)
        if time.time() - saved > 60 * options.keep:
            saved = time.time()
            _keep(model, (optimizer, thawing), minutes, step, state)
            save(model, tokenizer, options.out)
    if rank:
        return
    _keep(model, (optimizer, thawing), options.minutes, step, state)
    save(model, tokenizer, options.out)
    test = prepare_test(tokenizer, 2000, seed=0)
    for name, staging in (("dense", packed.DENSE_STAGES), ("plan", packed.PLAN_STAGES)):
        log.info("final %s %s", name, answer_accuracy(model, prefix, test, staging))


def _keep(model, optimizers, minutes: float, step: int, state: Path) -> None:
    kept = {"model": model.state_dict(), "minutes": minutes, "step": step}
    if optimizers:
        kept["optimizer"], kept["thawing"] = (o.state_dict() for o in optimizers)
    partial = state.with_suffix(".tmp")
    torch.save(kept, partial)
    os.replace(partial, state)


def main() -> None:
    """Parse the command line, train and save."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--minutes", type=float, default=60, help="time for the decoder")
    parser.add_argument(
        "--tower-minutes", type=float, default=10, help="time for the vision encoder"
    )
    parser.add_argument("--out", type=Path, default=Path("demo/model"))
    parser.add_argument("--state", type=Path, default=Path(".cache/demo-train.pt"))
    parser.add_argument("--resume", action="store_true", help="continue from --state")
    parser.add_argument("--pictures", type=int, default=12, help="images per step")
    parser.add_argument("--questions", type=int, default=16, help="questions per image")
    parser.add_argument("--lr", type=float, default=0.005, help="Muon's, for the decoder")
    parser.add_argument("--tower-lr", type=float, default=0.02, help="Muon's, vision encoder")
    parser.add_argument("--adam-lr", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument("--look", type=float, default=0.3, help="weight of the look-up's loss")
    parser.add_argument("--fresh", action="store_true", help="begin a new schedule on --resume")
    parser.add_argument("--thaw", type=float, default=0.1, help="share with fixed vision")
    parser.add_argument("--easy", type=float, default=0.6, help="share of small scenes at first")
    parser.add_argument("--report", type=float, default=5, help="minutes between tests")
    parser.add_argument("--keep", type=float, default=5, help="minutes between checkpoints")
    parser.add_argument("--processes", type=int, default=2, help="processes that train together")
    options = parser.parse_args()
    options.state.parent.mkdir(parents=True, exist_ok=True)
    data_parallel.run_parallel(_train, options.processes, options)


def _train(rank: int, options) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model, tokenizer = build_model(), build_tokenizer()
    if not (options.resume and options.state.exists()):
        pretrain_encoder(model, rank, options)
        if rank == 0:
            _keep(model, (), 0.0, 0, options.state)
    else:
        kept = torch.load(options.state, weights_only=True)
        model.load_state_dict(kept["model"])
    train_decoder(model, tokenizer, rank, options)


if __name__ == "__main__":
    main()
