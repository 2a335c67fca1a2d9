"""Qwen3-VL: layouts against the processor's own counts, and the encoder against transformers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)
from visistage.compile.checkpoint.names import canonical, tensor_shapes
from visistage.compile.planfile import resolve_plan
from visistage.graphs.bundle_contract import graph_specs
from visistage.graphs.chain.torch_reference import load_weights
from visistage.graphs.config import ModelConfig
from visistage.graphs.errors import ImageSizeError, ModelError, PlanError
from visistage.graphs.families.registry import read_config, with_budget
from visistage.graphs.modules.encoders import make_vision
from visistage.graphs.modules.ops import Eager
from visistage.graphs.parts import whole_stages
from visistage.tests.support.qwen import lively, model_of, qwen3_vl_config

PUBLISHED = {  # Qwen/Qwen3-VL-4B-Instruct, as far as it differs from class defaults
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text", "head_dim": 128, "hidden_size": 2560,
        "intermediate_size": 9728, "max_position_embeddings": 262144, "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_theta": 5000000,
        "rope_scaling": {
            "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default",
        },
        "tie_word_embeddings": True, "vocab_size": 151936,
    },
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_size": 1024,
        "intermediate_size": 4096, "model_type": "qwen3_vl", "num_heads": 16,
        "num_position_embeddings": 2304, "out_hidden_size": 2560, "patch_size": 16,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def published():
    return ModelConfig.from_hf(PUBLISHED)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lively(Qwen3VLForConditionalGeneration(qwen3_vl_config())).eval()


@pytest.fixture(scope="module")
def config(model):
    return ModelConfig.from_hf(model.config.to_dict())


def test_a_published_config_is_read(published):
    text = published.text
    assert (text.hidden, text.heads, text.head_dim, text.qk_norm, text.tied) == (
        2560, 32, 128, True, True,
    )  # fmt: skip
    assert (text.inject, published.fusion.injected) == ((1, 2, 3), (6, 12, 18))
    assert (text.rope.theta, text.rope.axis[:5], text.rope.axis[-4:]) == (
        5e6, (0, 1, 2, 0, 1), (0, 0, 0, 0),
    )  # fmt: skip
    assert ModelConfig.from_dict(published.to_dict()) == published


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        ((336, 336), 100),
        ((480, 640), 300),
        ((720, 1280), 880),
        ((1080, 1920), 2040),
        ((3024, 4032), 11844),
    ],
)
def test_rows_are_those_of_published_sizes(published, size, rows):
    assert published.layout(*size).rows == rows


@pytest.mark.parametrize("tokens", [None, 64, 256, 576, 1024])
def test_layouts_are_the_processors(published, tokens):
    """Hundreds of sizes, with and without a budget, which is the processor's own option."""
    own = with_budget(published, tokens)
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        size={"shortest_edge": own.limits.least, "longest_edge": own.limits.most},
    )
    generator = np.random.default_rng(tokens or 0)
    sizes = np.exp(generator.uniform(np.log(20), np.log(6000), (200, 2))).astype(int)
    seen = 0
    for height, width in sizes.tolist():
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(ImageSizeError, match="Cut it into pieces"):
                own.layout(height, width)
            continue
        wanted = processor.get_number_of_image_patches(height, width) // 4
        if wanted > own.visual_tokens:
            assert max(height, width) > 16 * min(height, width)
            with pytest.raises(ImageSizeError, match="more than"):
                own.layout(height, width)
            continue
        layout = own.layout(height, width)
        assert layout.rows == wanted == np.prod(layout.grid) // 4
        assert layout.rows <= own.visual_tokens
        seen += 1
    assert seen > 120


def test_a_budget_of_hardly_any_tokens_is_refused(published):
    with pytest.raises(ModelError, match="expected 4 or more: --image-tokens 256"):
        with_budget(published, 3)


def test_positions_and_turns_are_those_of_transformers(published):
    for size in ((480, 640), (1080, 700), (64, 1200)):
        layout = published.layout(*size)
        grid = torch.tensor([[1, *layout.grid]])
        turns = get_vision_position_ids(grid, 2)
        taps, weights = get_vision_interpolation_indices_and_weights(
            grid, 48, align_corners=True, spatial_merge_size=2
        )
        assert (layout.feeds["turns"] == turns.numpy()).all()
        assert (layout.feeds["taps"] == taps.numpy()).all()
        assert np.abs(layout.feeds["weights"] - weights.numpy()).max() < 1e-6
        rows, columns = (size // 2 for size in layout.grid)
        assert layout.positions[columns + 1].tolist() == [0, 1, 1]
        assert layout.advance == (max(rows, columns),)
        assert layout.boxes[-1].tolist() == [1 - 1 / columns, 1 - 1 / rows, 1, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out_hidden_size": 2048}, "out_hidden_size is 2048, expected hidden_size=2560"),
        ({"deepstack_visual_indexes": [5, 30]}, "deepstack_visual_indexes is 30"),
        ({"num_position_embeddings": 2300}, "expected a square"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(changed, message):
    data = {**PUBLISHED, "vision_config": {**PUBLISHED["vision_config"], **changed}}
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf(data)


def test_tensors_are_those_of_transformers(model, config):
    theirs = {canonical(name, "qwen3_vl"): tuple(w.shape) for name, w in model.named_parameters()}
    ours = tensor_shapes(config)
    assert ours.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]  # tied
    assert ours == theirs


def encoded(model, config, size, seed=0):
    """Our rows and features of random patches, and theirs."""
    layout = config.layout(*size)
    patches = int(np.prod(layout.grid))
    side = config.vision.patch_size
    pixels = torch.randn(patches, 3 * side**2, generator=torch.Generator().manual_seed(seed))
    weights = {
        canonical(name, config.family): weight for name, weight in model.state_dict().items()
    }
    vision = load_weights(make_vision(config, Eager()), weights)
    feeds = [torch.from_numpy(values) for values in layout.feeds.values()]
    both = pixels.reshape(patches, 3, 1, -1).expand(-1, -1, 2, -1).reshape(patches, -1)
    with torch.no_grad():
        out = model.model.visual(both, grid_thw=torch.tensor([[1, *layout.grid]]))
        theirs = (out.pooler_output, *getattr(out, "deepstack_features", ()))
        mine = vision(pixels, *feeds)
    return mine if isinstance(mine, tuple) else (mine,), theirs


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (32, 32), (200, 16)])
def test_the_encoder_is_that_of_transformers(model, config, size):
    ours, theirs = encoded(model, config, size)
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine[0] - other).abs().max() < 1e-4 * other.std()


OLDER = ("qwen2_vl", "qwen2_5_vl")


@pytest.fixture(scope="module", params=OLDER)
def older(request):
    made = model_of(request.param)
    return made, read_config(made.config.to_dict() | {"model_type": request.param})


def test_older_tensors_are_those_of_transformers(older):
    model, config = older
    theirs = {canonical(n, config.family): tuple(w.shape) for n, w in model.named_parameters()}
    assert tensor_shapes(config) == theirs


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (16, 16), (200, 16), (88, 72)])
def test_older_encoders_are_those_of_transformers(older, size):
    """Windows inside, at borders on both sides, and of one line."""
    (mine, *more), (theirs,) = encoded(*older, size)
    assert not more
    assert (mine[0] - theirs).abs().max() < 1e-4 * theirs.std()


def test_a_window_more_or_less_is_noticed(monkeypatch):
    model = model_of("qwen2_5_vl")
    config = read_config(model.config.to_dict() | {"model_type": "qwen2_5_vl"})
    wrong = replace(config, vision=replace(config.vision, window=4))
    for changed in (wrong, replace(config, vision=replace(config.vision, whole=(0, 1)))):
        (mine, *_), (theirs,) = encoded(model, changed, (88, 72))
        assert (mine[0] - theirs).abs().max() > 1e-2 * theirs.std()


@pytest.mark.parametrize("name", ["turns", "taps", "weights"])
def test_each_input_of_the_encoder_counts(model, config, name, monkeypatch):
    layout = config.layout(40, 64)
    swapped = {"turns": layout.feeds["turns"][:, ::-1], "taps": layout.feeds["taps"][::-1]}
    wrong = swapped.get(name, layout.feeds["weights"][::-1])
    monkeypatch.setitem(layout.feeds, name, wrong.copy())
    ours, theirs = encoded(model, config, (40, 64))
    assert (ours[0][0] - theirs[0]).abs().max() > 1e-2 * theirs[0].std()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("scope:keep=6", "scope-6 reads features, which an encoder of patches"),
        ("divprune:keep=6,positions=renumbered", "gives rows other positions"),
        ("random:keep=6,positions=renumbered", "gives rows other positions"),
    ],
)
def test_plans_that_the_model_has_no_place_for_are_refused(config, plan, message):
    staged = resolve_plan(plan, config.text.layers, config.visual_tokens)
    with pytest.raises(PlanError, match=message):
        graph_specs(config, staged, "float32", whole_stages(staged), rows_back=False)
