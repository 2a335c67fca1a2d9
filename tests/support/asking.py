"""Toy bundles put to the test: images, plans, greedy answers, and graphs beside their modules."""

import numpy as np
import torch
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.contract import INVISIBLE
from visistage.graphs.modules.decoder import DecoderStage, direct
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.select import Prober, Selector
from visistage.graphs.modules.vision import Vision
from visistage.graphs.parts import PROBE, whole_stages

PLANS = {
    "dense": "dense",
    "visipruner": "visipruner:shallow=2,t=4,e=6,keep=4",
    "fastv": "fastv:k=3,r=0.75",
    "v2drop": "v2drop:before=2-5,keep=8-3",
    "sparsevlm": "sparsevlm:before=2-5,keep=8-3",
    "code": "visipruner-code:cosine=0.95,contribution=0.5,exit_cosine=0.9",
    "paper": "visipruner-paper:cosine=0.95,contribution=0.5,exit_cosine=0.9",
    "adaptive": "visipruner-adaptive:boundaries=3-5,cosine=0.95,contribution=0.5,exit_cosine=0.9",
}
NEW = 24


def picture(seed, height=40, width=52):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def asking(words, images=1):
    """One turn of a user's, images first, in the messages of chat templates."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


def answer(session, images, prompt, new=NEW):
    """Greedy tokens without an end: random checkpoints end whenever they like."""
    session.eos = frozenset()
    return session.infer(images, prompt, max_tokens=new).tokens


def example_feeds(graph, rows, generator):
    stop = 9 + rows
    sizes = {"B": 2, "Q": rows, "S": stop + 6, "N": 6, "T": 3}
    feeds = {}
    for spec in graph.spec.inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.name == "gates":
            value = generator.integers(0, 2, shape)
        elif spec.name in (
            "positions",
            "order",
            "slot_order",
            "write_index",
            "query_order",
            "text_order",
        ):
            value = np.zeros(shape)
        elif spec.name == "visual_slots":
            value = np.tile(np.arange(2, 8), (2, 1))
        else:
            value = generator.standard_normal(shape)
        feeds[spec.name] = value.astype(spec.dtype)
    if "write_index" in feeds:
        feeds["write_index"][:] = 9
        feeds["positions"][:] = np.arange(9, stop)
        feeds["order"][:] = np.arange(9, stop)
    if "text_order" in feeds:
        feeds["text_order"][:] = np.arange(stop - 3, stop)
        feeds["text_order"][1, 0] = INVISIBLE
    if "slot_order" in feeds:
        feeds["slot_order"][:] = INVISIBLE
        feeds["slot_order"][:, :stop] = np.arange(stop)
        feeds["slot_order"][1, 0] = INVISIBLE  # one padded slot
    if "query_order" in feeds:
        feeds["query_order"][:] = stop - 1
    if "rows" in feeds and "query_order" in feeds:
        feeds["order"][:] = feeds["positions"][:] = np.arange(2, 8)
    return feeds


@torch.no_grad()
def torch_outputs(graph, config, plan, weights, feeds):
    feeds = {
        name: torch.from_numpy(v.astype(np.float32) if v.dtype == np.float16 else v.copy())
        for name, v in feeds.items()
    }
    if graph.name == "vision":
        module = chain.load_weights(Vision(config, Eager()), weights)
        outputs = module.compose(direct, *feeds.values())
        return dict(zip([spec.name for spec in graph.spec.outputs], outputs, strict=True))
    if graph.name == PROBE:
        return dict(zip(("cosine", "norm"), Prober()(*feeds.values()), strict=True))
    index = int(graph.name[-1])
    if graph.name.startswith("select"):
        names = [spec.name for spec in graph.spec.outputs]
        return dict(zip(names, Selector(plan.edges[index]).of(feeds), strict=True))
    part = whole_stages(plan)[index]
    module = chain.load_weights(DecoderStage(config.text, plan, part, Eager()), weights)
    out = module.compose_named(direct, feeds)
    flat = [*out.singles, *(cache for pair in out.caches for cache in pair)]
    return dict(zip([spec.name for spec in graph.spec.outputs], flat, strict=True))
