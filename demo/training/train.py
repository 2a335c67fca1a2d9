"""Training of a demo model, by one command.

    python -m visistage.demo.training.train             demo, from nothing
    python -m visistage.demo.training.train demo-576    demo-576, from demo

First the vision encoder learns what each patch shows, from the renderer; then projector, decoder
and vision encoder learn to answer. The learning rate follows the number of images. The state is
saved, and `--resume` continues from it, beyond the recipe's end where `--images` says more.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import data_parallel
from .architecture import build_model, start_from
from .decoder import train_decoder
from .encoder import pretrain_encoder
from .recipe import RECIPES
from .state import TrainState
from .tokenizer import build_tokenizer


def fastest_dtype() -> torch.dtype:
    """Return BF16 where this CPU multiplies matrices faster in it, FP32 elsewhere."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.randn(512, 512).to(dtype)
        one @ one
        begin = time.perf_counter()
        for _ in range(20):
            one @ one
        seconds[dtype] = time.perf_counter() - begin
    return min(seconds, key=seconds.get)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train and save."""
    parser = argparse.ArgumentParser(description="Train a demo model.")
    parser.add_argument("model", choices=RECIPES, default="demo", nargs="?", help="which one")
    parser.add_argument("--images", type=int, help="for everything")
    parser.add_argument("--encoder-images", type=int, help="for the vision encoder alone")
    parser.add_argument("--start", type=Path, help="folder of a model to start from")
    parser.add_argument("--out", type=Path, help="folder of the model")
    parser.add_argument("--state", type=Path, help="what --resume continues from")
    parser.add_argument("--resume", action="store_true", help="continue from --state")
    parser.add_argument("--rate", type=float, default=0.005, help="Muon's, for the decoder")
    parser.add_argument("--processes", type=int, default=2, help="processes that train together")
    parser.add_argument("--report", type=int, default=4000, help="images between tests")
    parser.add_argument("--questions", type=int, default=2000, help="of the test at the end")
    parser.add_argument("--keep", type=float, default=5, help="minutes between checkpoints")
    parser.add_argument("--fp32", action="store_true", help="no BF16, even where it is faster")
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.model]
    given = {
        name: getattr(options, name)
        for name in ("images", "encoder_images", "start")
        if getattr(options, name) is not None
    }
    options.out = options.out or recipe.out
    options.state = options.state or Path(f".cache/{recipe.world.name}-train.pt")
    torch.set_num_threads(1)
    options.dtype = torch.float32 if options.fp32 else fastest_dtype()
    if options.resume and not options.state.exists():
        parser.error(f"--resume: there is no state in {options.state}. Leave it out, or --state")
    data_parallel.run_parallel(train, options.processes, replace(recipe, **given), options)


def train(rank: int, recipe, options) -> None:
    """Train in one of the processes; the first one reports and saves."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model, tokenizer = build_model(recipe.world), build_tokenizer()
    model.set_attn_implementation({"vision_config": "eager"})
    state = TrainState(model, options.state, options.keep)
    if options.resume:
        state.read()
    elif recipe.start is not None:
        start_from(model, recipe.start)
    if state.phase == "encoder":
        pretrain_encoder(model, state, rank, recipe, options)
    train_decoder(model, tokenizer, state, rank, recipe, options)


if __name__ == "__main__":
    main()
