"""Layer fusion: sets and layers as published, the torch chain against the obvious form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.graphs.bundle_contract import graph_specs
from visistage.graphs.chain import chain, run
from visistage.graphs.config import ModelConfig
from visistage.graphs.errors import ModelError, PlanError
from visistage.graphs.fusion import read_fusion
from visistage.graphs.parts import whole_stages
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.presets.presets import parse_request, preset
from visistage.runtime.image.image import load_image, preprocess
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.cases import Case
from visistage.tests.support.fused import Fused
from visistage.tests.support.reference import Static, forward
from visistage.tests.support.staged import Staged

NEW, LAYERS, VISUAL = 9, 24, 16
QUESTION = "What is this?"
KINDS = [
    *(("E_D", chosen) for chosen in ("18", "3-18-23", "former", "latter", "all")),
    *(("I_D", chosen) for chosen in ("18", "3-18-23", "former", "latter")),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def get(*fusion, **options):
        key = (fusion, *sorted(options.items()))
        if key not in made:
            made[key] = toy.make_checkpoint(
                tmp_path_factory.mktemp("fused"),
                layers=options.pop("layers", LAYERS),
                kv_heads=2,
                encoder_layers=24,
                fusion=fusion,
                **options,
            )
        return made[key]

    return get


def answered(path, plan, mistakes=None, method=None):
    """Logits of the torch chain, and of the obvious form with ``mistakes``, along one answer."""
    ours = Staged(path, plan, torch.float32)
    tokens, logits, _ = ours.answer(picture(3), QUESTION, NEW)
    assert len(set(tokens)) > 3
    pixels = torch.from_numpy(preprocess(load_image(picture(3)), ours.preprocessing))
    segments = ours.encoder.encode(QUESTION, images=1).segments
    theirs = Fused(path, **(mistakes or {})).answer(segments, pixels, tokens[:-1], method)
    return logits, theirs


def apart(pair):
    """The largest difference of two logits, in their spread, of each step."""
    ours, theirs = pair
    return ((ours - theirs).abs().amax(-1) / theirs.std(-1)).tolist()


@pytest.mark.parametrize(
    ("layers", "into"), [(16, (1, 11, 14)), (24, (2, 17, 22)), (32, (3, 23, 29)), (40, (4, 29, 37))]
)
def test_features_go_to_the_published_layers(layers, into):
    given = {"layer_fusing_strategy": "I_D", "layer_using_strategy": "3-18-23"}
    assert read_fusion(given, 24, layers).layers == into
    assert read_fusion(given, 27, layers).fusion.injected == (3, 18, 23)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_the_chain_equals_the_obvious_form(checkpoint, kind):
    path = checkpoint(*kind)
    plan = preset("dense", LAYERS, VISUAL)
    # Patches are a product here and a convolution there, 24 layers before the last feature.
    assert max(apart(answered(path, plan))) < 3e-4


def test_all_layers_within_the_decoder(checkpoint):
    path = checkpoint("I_D", "all")
    assert max(apart(answered(path, preset("dense", LAYERS, VISUAL)))) < 1e-4
    with pytest.raises(ModelError, match="layer_using_strategy"):
        ModelConfig.from_hf(toy.make_config(layers=16, encoder_layers=24, fusion=("I_D", "all")))


@pytest.mark.parametrize(
    ("kind", "mistakes"),
    [
        (("E_D", "3-18-23"), {"shift": -1}),
        (("E_D", "former"), {"shift": -1}),
        (("I_D", "3-18-23"), {"shift": 1}),
        (("I_D", "3-18-23"), {"late": True}),
        (("I_D", "3-18-23"), {"shared": True}),
        (("I_D", "latter"), {"repeat": True}),
    ],
    ids=str,
)
def test_planted_mistakes_are_noticed(checkpoint, kind, mistakes):
    found = apart(answered(checkpoint(*kind), preset("dense", LAYERS, VISUAL), mistakes))
    assert found[0] > 1e-2


def test_features_added_while_decoding_are_noticed(checkpoint):
    path, plan = checkpoint("I_D", "3-18-23"), preset("dense", LAYERS, VISUAL)
    found = apart(answered(path, plan, {"decoded": True}))
    assert found[0] < 1e-4
    assert min(found[1:]) > 1e-2


@pytest.mark.parametrize("kind", [("I_D", "3-18-23"), ("I_D", "latter")], ids="-".join)
def test_rows_that_a_selection_keeps_carry_their_features(checkpoint, kind, monkeypatch):
    path = checkpoint(*kind, layers=16)
    plan = preset("visipruner", 16, VISUAL, shallow=3, t=6, e=14, keep=5)
    method = Static(shallow=3, trigger=6, exit=14, keep=5)
    assert max(apart(answered(path, plan, method=method))) < 1e-4
    monkeypatch.setattr(chain, "places_in", lambda offered, kept: np.zeros_like(kept, np.int64))
    assert apart(answered(path, plan, method=method))[0] > 1e-2


def test_chain_run_takes_features_and_released_names(checkpoint):
    path = checkpoint("I_D", "3-18-23")
    fused = Fused(path)
    pixels = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
    rows, _ = fused.rows(pixels)
    states = fused.tower(pixels[None], output_hidden_states=True).hidden_states
    config = {**fused.text, **{k: v for k, v in fused.config.items() if k.startswith("layer_")}}
    released = {
        name.replace("mm_projectors", "model.mm_projectors")
        .replace(".linear_1", ".0")
        .replace(".linear_2", ".2")
        if name.startswith("mm_projectors")
        else name: tensor
        for name, tensor in fused.weights.items()
    }
    ids = torch.arange(20, 32)
    table = fused.weights["model.embed_tokens.weight"]
    embeds = torch.cat((table[ids[:4]], rows, table[ids[4:]]))[None]
    embeds = torch.cat((embeds, embeds.flip(1)))  # a batch of two prompts, images at other places
    spans = [[(4, 20)], [(8, 24)]]
    features = []
    for state in (3, 18, 23):
        whole = torch.zeros(2, embeds.shape[1], 32)
        whole[0, 4:20] = states[state][0, 1:]
        whole[1, 8:24] = states[state][0, 1:].flip(0)
        features.append(whole.detach())
    plan = preset("visipruner", LAYERS, VISUAL, shallow=3, t=9, e=18, keep=5)
    done = run(released, config, embeds, spans, plan, 4, features=features)
    for sample in range(2):
        visual = torch.zeros(embeds.shape[1], dtype=torch.bool)
        visual[slice(*spans[sample][0])] = True
        added = {
            layer: fused.project(f"mm_projectors.{number}", own[sample]) * visual[:, None]
            for number, (layer, own) in enumerate(zip((2, 17, 22), features, strict=True))
        }
        method = Static(shallow=3, trigger=9, exit=18, keep=5)
        want, kept = forward(fused.weights, fused.text, embeds[sample], visual, method, added=added)
        assert done.kept[sample] == kept.tolist()
        assert (done.logits[sample] - want).abs().max() < 1e-4 * want.std()
    with pytest.raises(Exception, match="features has 0 tensors, this model adds 3"):
        run(released, config, embeds, spans, plan)


def test_a_list_of_layers_is_transformers_concatenation(tmp_path):
    case = Case(tmp_path, feature_layer=[1, 3, -2], layers=4)
    ids, pixels = case.prompt(5)
    ours = case.run(ids, pixels, case.plan("dense"), 8)
    want = case.logits(ids, pixels)
    assert (ours.logits - want).abs().max() < 1e-4 * want.std()
    assert ours.tokens.tolist() == case.generate(ids, pixels, 8).tolist()


def test_only_the_layers_that_are_read_run(checkpoint):
    config = open_checkpoint(str(checkpoint("I_D", "18"))).config
    assert config.encoder_depth == 23
    assert open_checkpoint(str(checkpoint("I_D", "latter"))).config.encoder_depth == 24
    shallow = replace(config, feature_layers=(5,))
    assert shallow.encoder_depth == 18


def test_what_cannot_be_fused_is_refused(checkpoint):
    for strategy, chosen in (
        ("E_M", "18"),
        ("I_M", "18"),
        ("E_D", "3-18"),
        ("E_D", "19"),
        ("X", "18"),
    ):
        with pytest.raises(ModelError, match="strategy"):
            read_fusion({"layer_fusing_strategy": strategy, "layer_using_strategy": chosen}, 24, 24)
    config = open_checkpoint(str(checkpoint("I_D", "18"))).config
    plan = preset("visionzip", LAYERS, VISUAL, keep=9)
    assert isinstance(plan, StagePlan)
    with pytest.raises(PlanError, match="merges rows"):
        graph_specs(config, plan, "float32", whole_stages(plan), False)
    name, options = parse_request("dense:entry=scope-9-at18")
    late = preset(name, LAYERS, VISUAL, **options)
    assert config.text.inject == (17,)
    with pytest.raises(PlanError, match="no visual rows in layer 17, and later again"):
        graph_specs(config, late, "float32", whole_stages(late), False)
    left = preset("visipruner", LAYERS, VISUAL, shallow=3, t=9, e=14, keep=5)
    assert graph_specs(config, left, "float32", whole_stages(left), False)


def test_configs_without_fusion_are_what_they_were():
    plain = ModelConfig.from_hf(toy.make_config())
    assert "fusion" not in plain.to_dict()
    assert "inject" not in plain.to_dict()["text"]
    assert "inject" not in repr(plain.text)
    fused = ModelConfig.from_hf(
        toy.make_config(layers=24, encoder_layers=24, fusion=("I_D", "former"))
    )
    assert ModelConfig.from_dict(fused.to_dict()) == fused
