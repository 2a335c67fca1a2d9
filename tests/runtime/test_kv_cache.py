"""What the INT8 cache is measured with: it rounds what is cached, all of it, and nothing else."""

import pytest
import torch
from visistage.bench.kv_cache import LEVELS, Cached, compared, fake_quantised, largest, operators
from visistage.calib.samples import evaluation_samples
from visistage.compile.planfile import resolve_plan

TOKENS = 4


@pytest.fixture(scope="module")
def asked():
    return evaluation_samples("demo", None, 2)


@pytest.fixture(scope="module", params=["dense", "visipruner"])
def plan(request):
    return resolve_plan(request.param, 8, 144)


@pytest.fixture(scope="module")
def reach(plan, asked):
    return largest(plan, asked, TOKENS)


def caches(model):
    """(layer, keys or values) of the last question, where there are any."""
    stages = zip(model.plan.stages, model.last.caches, strict=True)
    every = [pair for stage, held in stages for pair in enumerate(held, stage.layers[0])]
    return [(layer, cache) for layer, pair in every for cache in enumerate(pair)]


def test_rounding_is_to_the_nearest_of_255_levels():
    x = torch.linspace(-2, 2, 4001)
    out = fake_quantised(x, torch.tensor(1 / LEVELS))
    inside = x.abs() <= 1
    assert (out - x).abs()[inside].max() <= 0.5001 / LEVELS
    assert out[~inside].abs().unique().tolist() == [1.0]
    assert len(out.unique()) == 255
    assert fake_quantised(torch.zeros(3), torch.tensor(0.0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("form", ["layer", "head", "row"])
def test_every_cached_row_is_rounded(plan, asked, reach, form):
    model, plain = (Cached(plan, operators(name, reach)) for name in (form, "float"))
    for one in (model, plain):
        one.hear(asked[0], TOKENS)
    assert len(caches(model)) == 16
    for layer, (which, cache) in caches(model):
        top = reach[layer][which]
        reaches = {"layer": top.max(), "head": top, "row": cache.abs().amax(-1, keepdim=True)}
        steps = cache / reaches[form] * LEVELS
        assert (steps - steps.round()).abs().max() < 1e-3, (layer, which)
        assert steps.abs().max() <= LEVELS + 1e-3
    (_, (_, got)), (_, (_, true)) = caches(model)[0], caches(plain)[0]
    assert not torch.equal(got, true)


def test_scales_reach_as_far_as_anything_cached(plan, asked, reach):
    model = Cached(plan, operators("float", reach))
    for sample in asked:
        model.follow(sample, model.hear(sample, TOKENS).tokens)  # what follows its end is not used
        for layer, (which, cache) in caches(model):
            found = cache.abs().amax((0, 2, 3))
            assert (found <= reach[layer][which].flatten() * (1 + 1e-6)).all()


def test_a_float_cache_agrees_with_itself_and_a_coarse_one_does_not(plan, asked, reach):
    plain = Cached(plan, operators("float", reach))
    heard = [plain.hear(sample, TOKENS) for sample in asked]
    same = compared(plain, asked, heard, TOKENS)
    assert same["token_agreement"] == same["answer_agreement"] == 1
    assert same["largest_kl_nats"] == 0
    coarse = {layer: [each * 200 for each in pair] for layer, pair in reach.items()}
    other = compared(Cached(plan, operators("layer", coarse)), asked, heard, TOKENS)
    assert other["mean_kl_nats"] > 0.01


def test_bytes_are_those_of_the_slots(plan, asked, reach):
    model = Cached(plan, operators("row", reach))
    model.hear(asked[0], TOKENS)
    slots = [cache.shape[2] for _, (_, cache) in caches(model)]
    assert model.cache_bytes(1) == sum(slots) * 5 * 32
    assert model.cache_bytes(1, 2) == sum(slots) * 5 * (32 + 2)
    assert model.cache_bytes(4) == 4 * model.cache_bytes(1)
