"""``graphs/plan/call_cost.py`` against torch's own count of operations, and against tensors'
sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from visistage.compile.checkpoint.known_models import KNOWN_MODELS
from visistage.graphs.caches import cache_names
from visistage.graphs.config import ModelConfig
from visistage.graphs.modules.decoder import DecoderStage
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.serving import ServingStage
from visistage.graphs.modules.vision import Vision
from visistage.graphs.parts import StagePart
from visistage.graphs.plan.call_cost import (
    GraphCall,
    Sizes,
    layers_of,
    question_calls,
    token_calls,
    total_work,
    work_of,
)
from visistage.graphs.plan.cost import Geometry, Load, cost_of
from visistage.graphs.presets.presets import preset
from visistage.tests.support import toy

CONFIG = ModelConfig.from_hf(
    toy.make_config(layers=6, heads=4, kv_heads=2, hidden=64, intermediate=96)
)
PLAN = preset("visipruner", 6, CONFIG.visual_tokens, t=2, e=4, keep=4, shallow=1)
FP32 = Sizes.of("fp32")


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(("rows", "slots"), [(1, 24), (9, 40)])
def test_a_stage_does_the_operations_that_torch_counts(index, rows, slots):
    text, stage = CONFIG.text, PLAN.stages[index]
    module = DecoderStage(text, PLAN, StagePart(index, stage.layers), Eager())
    shape = (1, text.kv_heads, slots, text.head_dim)
    caches = [torch.zeros(shape) for pair in cache_names(stage.attention_layers) for _ in pair]
    gated = len(stage.gated_layers)
    gates = [torch.ones(gated, 2, 1, slots)] if gated else []
    order = torch.arange(rows, dtype=torch.int32)[None]
    inputs = [
        torch.zeros(1, rows, text.hidden),
        *(order, order, torch.zeros(1, slots, dtype=torch.int32), torch.zeros(1, dtype=torch.long)),
    ]
    pairs = list(zip(caches[::2], caches[1::2], strict=True))
    found = counted(lambda: module.compose(direct, *inputs, *(gates or [None]), None, pairs))
    assert work_of(GraphCall(f"stage{index}", rows, slots), CONFIG, PLAN, FP32).flops == found


def test_rows_that_serve_do_the_operations_that_torch_counts():
    plan, text = (
        preset("vica", 6, CONFIG.visual_tokens, layers=(0, 1), prefix="frozen"),
        CONFIG.text,
    )
    module = ServingStage(text, plan, StagePart(0, (0, 2)), Eager())
    rows, at = torch.zeros(1, 9, text.hidden), torch.arange(9)[None]
    found = counted(lambda: module.compose(direct, rows, at, {}))
    work = work_of(GraphCall("serve0", 9, 0), CONFIG, plan, FP32)
    assert work.flops == found
    kv = text.kv_heads * text.head_dim
    assert (work.weight_bytes, work.cache_bytes) == (4 * 4 * text.hidden * kv, 4 * 4 * 9 * kv)
    assert layers_of(GraphCall("serve0", 9, 0), CONFIG, plan) == 2


def direct(piece, *args):
    return piece(*args)


def test_the_encoder_does_the_operations_that_torch_counts():
    side = CONFIG.vision.image_size
    module = Vision(CONFIG, Eager())
    pixels = torch.zeros(1, CONFIG.vision.channels, side, side)
    found = counted(lambda: module(pixels))
    assert work_of(GraphCall("vision", 0, 0), CONFIG, PLAN, FP32).flops == found


def test_weights_of_all_graphs_are_the_checkpoints_but_norms_biases_and_embeddings():
    config = ModelConfig.from_hf(KNOWN_MODELS["llava-7b"].config)
    plan = preset("visipruner", 32, 576)
    calls = [GraphCall("vision", 0, 0), *(GraphCall(f"stage{i}", 1, 1) for i in range(3))]
    weights = sum(work_of(call, config, plan, FP32).weight_bytes for call in calls) / 4
    embedding = config.text.hidden * config.text.vocab
    assert weights + embedding == pytest.approx(7_063_427_072, rel=0.002)


def test_one_call_with_all_rows_costs_what_the_cost_model_says():
    geometry = Geometry.of(CONFIG.text)
    plan = preset("dense", 6, CONFIG.visual_tokens)
    rows = 5 + CONFIG.visual_tokens + 7
    said = cost_of([Load("dense", CONFIG.visual_tokens)] * 6, geometry, 5, 7).prefill_macs
    assert work_of(GraphCall("stage0", rows, rows), CONFIG, plan, FP32).flops == 2 * said


def test_int4_weights_and_caches_are_counted_in_bytes():
    call = GraphCall("stage1", 1, 32)
    wide = work_of(call, CONFIG, PLAN, FP32)
    narrow = work_of(call, CONFIG, PLAN, Sizes.of("w4:head=float"))
    assert narrow.weight_bytes == wide.weight_bytes * (0.5 + 2 / 128) / 4
    assert narrow.cache_bytes == wide.cache_bytes / 2
    assert narrow.flops == wide.flops
    depth, kv = PLAN.stages[1].depth, CONFIG.text.kv_heads * CONFIG.text.head_dim
    assert wide.cache_bytes == depth * 2 * kv * (32 + 1) * 4


def test_a_question_and_a_token_go_through_every_stage():
    def slots(stage, held):
        return held

    shape = {"prefix": 3, "visual": CONFIG.visual_tokens, "slots": slots}
    n = CONFIG.visual_tokens
    cold = question_calls(PLAN, text=5, **shape)
    assert cold == [
        GraphCall("vision", 0, 0),
        GraphCall("stage0", n, 3 + n),
        GraphCall("stage0", 5, 8 + n),
        GraphCall("select0", 0, 8 + n),
        GraphCall("stage1", 4 + 5, 3 + 4 + 5),
        GraphCall("stage2", 5, 8),
    ]
    assert question_calls(PLAN, text=5, cached=True, **shape) == cold[2:]
    assert token_calls(PLAN, text=5, **shape) == [
        GraphCall("stage0", 1, 9 + n),
        GraphCall("stage1", 1, 13),
        GraphCall("stage2", 1, 9),
    ]
    assert [layers_of(call, CONFIG, PLAN) for call in cold] == [2, 3, 3, 1, 2, 1]


def test_work_adds_up():
    calls = token_calls(PLAN, prefix=1, visual=4, text=2, slots=lambda stage, held: held)
    works = [work_of(call, CONFIG, PLAN, FP32) for call in calls]
    assert total_work(works).flops == sum(work.flops for work in works)
    assert total_work(works).nbytes == sum(work.weight_bytes + work.cache_bytes for work in works)
    assert total_work([]).nbytes == 0
