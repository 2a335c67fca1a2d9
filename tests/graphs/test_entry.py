"""What enters of an image: against transformers, whose model is given the chosen rows alone."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.planfile import plan_from_yaml, plan_to_yaml
from visistage.graphs.bundle_contract import graph_specs
from visistage.graphs.chain import torch_encoder
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.chain.torch_encoder import TorchEncoder
from visistage.graphs.errors import PlanError, PromptError
from visistage.graphs.modules.vision import EncoderLayer
from visistage.graphs.parts import PROJECT, VISION, whole_stages
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.plan.stages import Entry
from visistage.graphs.presets.presets import parse_request, preset
from visistage.graphs.selectors.entry import READINGS, EncoderReadings
from visistage.graphs.selectors.registry import COUNTING_SELECTORS, ENTRY_SELECTORS
from visistage.graphs.vision_contract import vision_readings
from visistage.tests.support import toy

LAYERS, PATCHES, NEW = 4, 16, 5
START, LENGTH = 4, 27  # of the image in the prompt, of the prompt


def planned(text, layers=LAYERS, tokens=PATCHES):
    name, options = parse_request(text)
    return preset(name, layers, tokens, **options)


# --- plans ----------------------------------------------------------------------------------------


def test_an_entry_changes_what_enters_and_what_an_image_spans():
    plain, kept, closed = (
        planned(text) for text in ("dense", "scope:keep=6", "scope:keep=6,positions=renumbered")
    )
    assert (plain.entering, plain.span, plain.is_dense) == (16, 16, True)
    assert (kept.entering, kept.span, kept.is_dense) == (6, 16, False)
    assert (closed.entering, closed.span) == (6, 6)
    assert len({plain.hash, kept.hash, closed.hash}) == 3
    assert "entry" not in plain.to_dict()  # plans of before keep their hash


@pytest.mark.parametrize("text", ["scope:keep=6", "visipruner:entry=visionzip-9-renumbered,keep=2"])
def test_plans_with_an_entry_are_written_and_read(text):
    plan = planned(text)
    assert StagePlan.from_dict(plan.to_dict()) == plan
    assert plan_from_yaml(plan_to_yaml(plan)) == plan


def test_an_entry_composes_with_every_edge():
    plan = planned("visipruner:entry=scope-12,keep=3", layers=8)
    assert [stage.visual_tokens for stage in plan.stages] == [12, 3, 0]
    assert plan.visual_tokens == 16
    assert plan.stages[0].modes[0] == "sink"
    assert planned("pyramiddrop:entry=cls-8").stages[1].visual_tokens == 4
    assert planned("visipruner-code:entry=scope-12", layers=8).stages[-1].visual_tokens == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selector": "scopes"}, "entry.selector: found 'scopes', expected one of scope"),
        ({"keep": 0}, "entry.keep: found 0, expected 1 to 16"),
        ({"keep": 17}, "entry.keep: found 17, expected 1 to 16"),
        ({"keep": True}, "entry.keep: found True, expected 1 to 16"),
        ({"positions": "closed"}, "entry.positions: found 'closed', expected one of original"),
        ({"layer": 2}, "entry.layer: found 2, expected 0, where the first stage with visual"),
        ({"layer": -1}, "entry.layer: found -1, expected an integer >= 0"),
        ({"selector": "visionzip"}, "entry.positions: found 'original', expected renumbered"),
        ({"keep": 5}, "stages[0].visual_tokens: found 6, expected entry.keep=5"),
    ],
)
def test_contradictions_are_refused(change, message):
    plan = planned("scope:keep=6")
    with pytest.raises(PlanError) as error:
        replace(plan, entry=replace(plan.entry, **change))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text", ["scope", "scope-", "scope-x", "other-3", "scope-17", "scope-0", "scope-3-closed", "-3"]
)
def test_an_entry_that_is_misspelt_says_how_it_is_written(text):
    with pytest.raises(PlanError, match=r"1 to 16 tokens, such as scope-64"):
        planned(f"dense:entry={text}")


# --- contracts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTING_SELECTORS)
def test_the_encoder_hands_out_what_is_read_and_nothing_else(name):
    config, plan = model("clip").config, planned(f"{name}:keep=6")
    specs = graph_specs(config, plan, "float32", whole_stages(plan), False)
    outputs = [output.name for output in specs[VISION].outputs]
    reads = set(ENTRY_SELECTORS[name].reads)
    later = not reads & {"rows", "row_similarity"}
    assert outputs == [n for n in READINGS if n in reads | ({"features"} if later else set())] or (
        outputs[-1] == "visual_rows" and not later
    )
    assert (PROJECT in specs) == later
    assert "entry" in plan.to_dict()


def test_what_a_selector_reads_has_a_name_in_the_contract():
    assert set(READINGS) == {*vars(readings("clip"))} - {"image"}


# --- readings, against transformers ---------------------------------------------------------------


class Model:
    """A toy in transformers and in torch modules of ours, and what of it one image becomes."""

    def __init__(self, folder, encoder):
        path = toy.make_checkpoint(folder, layers=LAYERS, kv_heads=2, encoder=encoder)
        checkpoint = open_checkpoint(str(path))
        self.config = checkpoint.config
        self.weights = {name: checkpoint.load(name) for name in checkpoint.tensors}
        self.text = checkpoint.raw["text_config"]
        self.theirs = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        generator = torch.Generator().manual_seed(3)
        self.pixels = torch.randn(1, 3, 32, 32, generator=generator)


@cache
def model(encoder):
    with TemporaryDirectory() as folder:
        return Model(Path(folder), encoder)


@torch.no_grad()
def readings(encoder):
    """What transformers says of the layer that makes the features."""
    own, tower = model(encoder), model(encoder).theirs.model.vision_tower
    keys = []
    layer = tower.vision_model.encoder.layers[-2] if hasattr(tower, "vision_model") else None
    layer = layer or tower.encoder.layers[-2]
    handle = layer.self_attn.k_proj.register_forward_hook(lambda *call: keys.append(call[2]))
    out = tower(own.pixels, output_hidden_states=True, output_attentions=True)
    handle.remove()
    states, attention = out.hidden_states[-2], out.attentions[-2].mean(1)[0]
    clip = encoder == "clip"
    heads = keys[0][0].unflatten(-1, (own.config.vision.heads, -1)).mean(1)
    features = states[0, 1:] if clip else states[0]
    rows = own.theirs.model.multi_modal_projector(features[None])[0]
    table = own.theirs.model.language_model.embed_tokens.weight
    unit, unit_rows, words = (x / x.norm(dim=-1, keepdim=True) for x in (features, rows, table))
    return EncoderReadings(
        features=features,
        class_row=states[0, 0] if clip else None,
        saliency=attention[0, 1:] if clip else attention.mean(0),
        keys=heads[1:] if clip else heads,
        similarity=unit @ unit.T,
        row_similarity=unit_rows @ unit_rows.T,
        vocabulary=(unit_rows @ words.T).topk(3).indices,
        rows=rows,
        image="00",
    )


def read(encoder, monkeypatch):
    """What our modules hand out, everything at once, as a selector would be given it."""
    seen = []
    everything = replace(ENTRY_SELECTORS["uniform"], reads=READINGS)
    monkeypatch.setitem(ENTRY_SELECTORS, "uniform", everything)
    real = torch_encoder.choose_rows

    def noted(plan, outputs, image, at):
        seen.append(outputs)
        return real(plan, outputs, image, at)

    monkeypatch.setattr(torch_encoder, "choose_rows", noted)
    own, plan = model(encoder), planned("uniform:keep=6")
    assert vision_readings(own.config, plan) == READINGS
    TorchEncoder(own.config, plan, own.weights)(own.pixels)
    return {"rows" if n == "visual_rows" else n: v[0] for n, v in seen[0].items()}


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_readings_are_those_of_transformers(encoder, monkeypatch):
    wanted, found = readings(encoder), read(encoder, monkeypatch)
    for name in READINGS:
        value = getattr(wanted, name)
        assert (name in found) == (value is not None)
        if value is not None:
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "bug",
    {
        "summed over heads": lambda query, key, has: saliency(query, key, has) * query.shape[1],
        "from all tokens": lambda query, key, has: saliency(query, key, False),
        "to the class row": lambda query, key, has: saliency(key, query, has),
        "of the whole row": lambda query, key, has: saliency(query, key, has).roll(1, -1),
    }.items(),
    ids=lambda bug: bug[0],
)
def test_planted_mistakes_in_the_saliency_are_noticed(bug, monkeypatch):
    monkeypatch.setattr("visistage.graphs.modules.vision._saliency", bug[1])
    found = read("clip", monkeypatch)["saliency"]
    assert not torch.allclose(found, readings("clip").saliency, atol=2e-5, rtol=1e-4)


def saliency(query, key, has_class_token):
    """The rule in one line, for mistakes to depart from."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = scores.softmax(-1)
    return (weights[:, :, :1] if has_class_token else weights).mean((1, 2))


def test_only_the_last_layer_is_read():
    own, plan = model("clip"), planned("scope:keep=6")
    layers = TorchEncoder(own.config, plan, own.weights).vision.vision_tower.encoder.layers
    assert [layer.reads for layer in layers if isinstance(layer, EncoderLayer)] == [
        *([()] * (len(layers) - 1)),
        ("saliency",),
    ]


# --- the chain, against transformers --------------------------------------------------------------

INDEX = (1, 2, 6, 9, 10, 15)


@torch.no_grad()
def hugging_face(embeds, places):
    """Greedy logits of transformers over the rows that enter, at their positions."""
    own = model("clip").theirs
    enters = torch.tensor([at for at, place in enumerate(places) if place >= 0])
    positions = torch.tensor([[places[at] for at in enters]])
    out = own.model.language_model(
        inputs_embeds=embeds[:, enters], position_ids=positions, use_cache=True
    )
    logits, tokens = own.lm_head(out.last_hidden_state[:, -1]), []
    first = logits
    for step in range(NEW):
        tokens.append(int(logits.argmax()))
        row = own.model.language_model.embed_tokens(torch.tensor([tokens[-1:]]))
        out = own.model.language_model(
            inputs_embeds=row,
            position_ids=positions[:, -1:] + 1 + step,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        logits = own.lm_head(out.last_hidden_state[:, -1])
    return first, tokens


def prompt(seed=0):
    generator = torch.Generator().manual_seed(seed)
    table = model("clip").weights["model.embed_tokens.weight"]
    embeds = table[torch.randint(5, 290, (1, LENGTH), generator=generator)]
    rows = torch.randn(1, PATCHES, embeds.shape[2], generator=generator) * embeds.std()
    embeds[:, START : START + PATCHES] = rows
    return embeds


def expected_places(positions):
    places, at = [], 0
    for row in range(LENGTH):
        entered = not START <= row < START + PATCHES or row - START in INDEX
        places.append((at if positions == "renumbered" else row) if entered else -1)
        at += entered
    return places


def run(text, embeds, index=INDEX):
    own = model("clip")
    spans, entered = [[(START, START + PATCHES)]], [[list(index)]]
    return chain.run(own.weights, own.text, embeds, spans, planned(text), NEW, entered)


@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_a_chosen_few_are_what_transformers_makes_of_them(positions):
    embeds = prompt()
    found = run(f"scope:keep=6,positions={positions}", embeds)
    places = expected_places(positions)
    logits, tokens = hugging_face(embeds, places)
    torch.testing.assert_close(found.logits, logits, atol=1e-4, rtol=1e-4)
    assert found.tokens[0].tolist() == tokens
    assert found.kept == [[places[START + at] for at in INDEX]]


@pytest.mark.parametrize(
    "bug",
    {
        "closed up": lambda plan, length, spans, entered: np.where(
            (own := places(plan, length, spans, entered)) >= 0, np.cumsum(own >= 0) - 1, -1
        ),
        "one too many": lambda plan, length, spans, entered: places(
            plan, length, spans, [[*entered[0][:-1], entered[0][-1] - 1]]
        ),
        "text moved": lambda plan, length, spans, entered: (
            (own := places(plan, length, spans, entered)) + (own >= START + PATCHES)
        ),
    }.items(),
    ids=lambda bug: bug[0],
)
def test_planted_mistakes_in_positions_are_noticed(bug, monkeypatch):
    monkeypatch.setattr(chain, "_places", bug[1])
    embeds = prompt()
    found = run("scope:keep=6", embeds)
    logits, _ = hugging_face(embeds, expected_places("original"))
    assert not torch.allclose(found.logits, logits, atol=1e-4, rtol=1e-4)


places = chain._places


@pytest.mark.parametrize("edges", ["fastv:k=2,r=0.5", "visipruner:keep=2", "exit-only:e=1"])
def test_behind_a_renumbered_entry_edges_work_as_on_a_smaller_image(edges):
    """Closed up, the rows that enter are a prompt of their own, with an image of six."""
    embeds, (name, _, options) = prompt(), edges.partition(":")
    found = run(f"{name}:{options},entry=scope-6-renumbered", embeds)
    own, few = model("clip"), embeds[:, [at for at in range(LENGTH) if enters(at)]]
    smaller = planned(edges, tokens=len(INDEX))
    wanted = chain.run(own.weights, own.text, few, [[(START, START + 6)]], smaller, NEW)
    torch.testing.assert_close(found.logits, wanted.logits)
    assert (found.kept, found.trigger, found.exit) == (wanted.kept, wanted.trigger, wanted.exit)
    assert found.tokens.tolist() == wanted.tokens.tolist()


def enters(row):
    return not START <= row < START + PATCHES or row - START in INDEX


def test_all_that_enter_are_the_dense_model():
    embeds = prompt()
    whole = run("scope:keep=16", embeds, range(16))
    own, spans = model("clip"), [[(START, START + PATCHES)]]
    dense = chain.run(own.weights, own.text, embeds, spans, planned("dense"), NEW)
    assert torch.equal(whole.logits, dense.logits)
    assert whole.tokens.tolist() == dense.tokens.tolist()


@pytest.mark.parametrize(
    ("text", "entered", "message"),
    [
        ("scope:keep=6", None, "needs entered"),
        ("dense", [[list(INDEX)]], "takes no entered"),
        ("scope:keep=6", [[[0, 1, 2, 3, 4]]], r"entered\[0\]: found .*expected 6 ascending"),
        ("scope:keep=6", [[[0, 1, 2, 3, 5, 4]]], "expected 6 ascending"),
        ("scope:keep=6", [[[0, 1, 2, 3, 4, 16]]], "expected 6 ascending"),
        ("scope:keep=6", [[]], "expected 6 ascending"),
    ],
)
def test_entered_rows_that_do_not_fit_are_refused(text, entered, message):
    own, spans = model("clip"), [[(START, START + PATCHES)]]
    with pytest.raises(PromptError, match=message):
        chain.run(own.weights, own.text, prompt(), spans, planned(text), 1, entered)


def test_an_entry_needs_both_its_facts():
    with pytest.raises(PlanError, match="entry"):
        replace(planned("dense"), entry="scope")
    assert Entry("scope", 3) == Entry("scope", 3, "original", 0)
