"""Entries where an image's rows stand in lines or between markers, against transformers."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from visistage.calib.samples import Sample
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.graphs.errors import ImageError, PlanError
from visistage.graphs.modules import readings
from visistage.graphs.selectors.entry import EncoderReadings
from visistage.runtime import image_file
from visistage.runtime.session import load
from visistage.tools.verify.verify import verify

from ..graphs.test_internvl import picture
from ..support import tiny_next, tiny_onevision, tiny_smolvlm
from ..support.asking import asking
from ..support.families import TINY
from ..support.reference_selectors import RULES

NEW = 8
KEEP = 8
MODULES = {
    "llava_next": tiny_next,
    "llava_onevision": tiny_onevision,
    "smolvlm": tiny_smolvlm,
}
SHAPES = [(64, 48), (20, 30), (30, 64)]
BLIND = "visipruner:shallow=1,t=1,e=2,keep=3,entry=scope-6"


@contextmanager
def stage_calls(session):
    """The stages that a session's executor is called for."""
    calls, append = [], session.executor.append
    session.executor.append = lambda *given: calls.append(given[0]) or append(*given)
    yield calls
    session.executor.append = append


class Told:
    """The reading of transformers of an image, and the rows of a prompt about it."""

    @torch.no_grad()
    def __init__(self, judge, image, words):
        self.judge, model = judge, judge.model.model
        caught = {}

        def note(name):
            return lambda _, given, *made: caught.__setitem__(name, (given, *made))

        packs = hasattr(model, "pack_image_features")
        tower = model.vision_tower if packs else model.vision_model
        self.decoder = model.language_model if packs else model.text_model
        connector = None if packs else model.connector
        projector = model.multi_modal_projector if packs else connector.modality_projection
        clip = "Next" in type(model).__name__
        layer = (getattr(tower, "vision_model", tower)).encoder.layers[-2 if clip else -1]
        handles = [
            layer.self_attn.register_forward_hook(note("attention")),
            projector.register_forward_pre_hook(note("features")),
            self.decoder.register_forward_pre_hook(note("decoder"), with_kwargs=True),
        ]
        inputs = judge.inputs(asking(words), [image])
        judge.model(**inputs)
        for handle in handles:
            handle.remove()
        self.ids, token = inputs["input_ids"][0], model.config.image_token_id
        self.embeds = caught["decoder"][1]["inputs_embeds"]
        self.image = torch.where(self.ids == token)[0]
        probabilities = caught["attention"][1][1].mean(1)
        saliency = probabilities[:, 0, 1:] if clip else probabilities.mean(1)
        features = caught["features"][0][0]
        if packs:
            features, saliency = (
                packed(model, values, inputs["image_sizes"], "default" if clip else "anyres_max_4")
                for values in (features, saliency[..., None])
            )
        else:
            features = features.flatten(0, 1)
            saliency = connector.pixel_shuffle(saliency[..., None], 4).mean(-1).flatten()[:, None]
        self.ends = torch.isnan(saliency[:, 0]).tolist()
        for row, end in enumerate(self.ends):
            if end:
                features[row], saliency[row] = features[row - 1], saliency[row - 1]
        nothing = dict.fromkeys(("class_row", "keys", "similarity", "row_similarity", "vocabulary"))
        rows = self.embeds[0, self.image].numpy()
        own = {"features": features.numpy(), "saliency": saliency[:, 0].numpy(), "rows": rows}
        self.readings = EncoderReadings(image="00", **nothing, **own)

    def tokens(self, patches):
        """The token before it for a line's end, which no selector but ``divprune`` tells apart."""
        return [patch - self.ends[patch] for patch in patches]

    @torch.no_grad()
    def logits(self, patches, *, renumbered=False):
        """Logits of the last row where only some patches of the image are in the prompt."""
        kept = torch.ones(len(self.ids), dtype=torch.bool)
        kept[self.image] = False
        kept[self.image[list(patches)]] = True
        places = torch.where(kept)[0]
        if renumbered:
            places = torch.arange(len(places))
        hidden = self.decoder(
            inputs_embeds=self.embeds[:, kept],
            position_ids=places[None],
            attention_mask=torch.ones(1, len(places), dtype=torch.long),
        ).last_hidden_state
        return self.judge.model.lm_head(hidden[0, -1])


def packed(model, values, sizes, how):
    """Values of tiles in an image's lines, as transformers packs features; NaN at their ends."""
    end = torch.full(values.shape[-1:], torch.nan)
    more = (end, how) if how != "default" else (how, end)
    return model.pack_image_features([values], sizes, *more)[0][0].clone()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    known = {}

    def get(name, plan, target="cpu"):
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name)
            TINY[name].make(known[name] / "tiny")
        folder = known[name]
        out = folder / "engines"
        return make_bundle(str(folder / "tiny"), plan=plan, target=target, out=out)

    get.folder = lambda name: known[name] / "tiny"
    return get


@pytest.mark.parametrize("selector", ["scope", "divprune", "cls", "uniform"])
@pytest.mark.parametrize("name", MODULES)
def test_rows_are_chosen_and_read_as_transformers_has_them(made, name, selector):
    bundle = made(name, f"dense:entry={selector}-{KEEP}")
    judge = MODULES[name].Judge(made.folder(name))
    with load(bundle.path) as session:
        for seed, shape in enumerate(SHAPES):
            image = picture(*shape, seed)
            told = Told(judge, image, "What?")
            ours = session.score(image, "What?", [])[0]
            answer = session.infer(image, "What?", max_tokens=1)
            patches = answer.shown[0].patches.tolist()
            wanted, _ = RULES[selector](told.readings, KEEP)
            assert len(patches) == KEEP < len(told.image) == answer.plan.visual_tokens
            if selector in ("divprune", "uniform"):
                assert patches == wanted
            else:
                assert told.tokens(patches) == told.tokens(wanted)
            logits = told.logits(patches).numpy()
            assert np.abs(ours - logits).max() < 1e-4 * logits.std()
            moved = told.logits(patches, renumbered=True).numpy()
            assert np.abs(ours - moved).max() > 1e-3 * logits.std()
            others = [(patch + 1) % len(told.image) for patch in patches]
            assert np.abs(ours - told.logits(others).numpy()).max() > 1e-3 * logits.std()


@pytest.mark.parametrize("name", MODULES)
def test_verify_finds_it_right(made, name):
    samples = [Sample(str(n), picture(*size, n), "What?", "") for n, size in enumerate(SHAPES)]
    for plan, target in ((f"dense:entry=scope-{KEEP}", "cpu"), (BLIND, "cpu-portable")):
        bundle = made(name, plan, target)
        report = verify(bundle, samples, model=str(made.folder(name)), max_tokens=4)
        assert report.failed is None, report.failed


@pytest.mark.parametrize("name", MODULES)
def test_an_image_is_chosen_of_once(made, name):
    """Whatever is asked, alone or beside another, in a warm session or a cold one."""
    bundle = made(name, BLIND)
    images = [picture(*shape, seed) for seed, shape in enumerate(SHAPES)]
    with load(bundle.path) as session, load(bundle.path, cache_bytes=0) as anew:
        for given in (*images, images[:2], images[0]):
            for words in ("What?", "And how many?"):
                answer = session.infer(given, words, max_tokens=NEW)
                assert answer.tokens == anew.infer(given, words, max_tokens=NEW).tokens
                assert len(answer.plan.kept) == 3
        with stage_calls(session) as calls:
            session.infer(images[0], "Another?", max_tokens=1)
        assert calls.count(0) == 1


@pytest.mark.parametrize("plan", ["random:keep=5", "embedlens:targets=7-19-23,keep=12"])
def test_others_choose_too(made, plan):
    bundle = made("smolvlm", plan)
    samples = [Sample("0", picture(*SHAPES[0]), "What?", "")]
    report = verify(bundle, samples, model=str(made.folder("smolvlm")), max_tokens=4)
    assert report.failed is None, report.failed


def last_token(values, index, weights=None, real=readings.in_lines):
    """Ends of lines are read as the last token of the last tile."""
    count = values.shape[1]
    return real(values, index.clamp(max=count - 1), weights)


def test_another_reading_of_line_ends_is_noticed(made, monkeypatch):
    bundle = made("llava_next", f"dense:entry=divprune-{KEEP}")
    other = made("llava_next", f"dense:entry=scope-{KEEP}")
    samples = [Sample("0", picture(*SHAPES[0]), "What?", "")]
    monkeypatch.setattr(readings, "in_lines", last_token)
    folder = str(made.folder("llava_next"))
    assert verify(other, samples, model=folder, max_tokens=4).failed is not None
    assert verify(bundle, samples, model=folder, max_tokens=4).failed is None  # of rows alone


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        ("llava_next", "visionzip:keep=8", "entry visionzip.*lines.*Take scope or divprune"),
        ("smolvlm", "visionzip:keep=8", "text stands among the tokens.*without positions"),
        ("smolvlm", "scope:keep=8,positions=renumbered", "text stands among the tokens"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(made, name, plan, message):
    with pytest.raises(PlanError, match=message):
        made(name, plan)


@pytest.mark.parametrize("plan", ["dense", BLIND, "v2drop:before=1-2,keep=8-3", "fastv:k=1,r=0.5"])
def test_an_image_between_markers_is_saved_and_loaded(made, plan, tmp_path):
    bundle = made("smolvlm", plan)
    with load(bundle.path) as session, load(bundle.path) as other:
        for seed, shape in enumerate(SHAPES):
            image, file = picture(*shape, seed), tmp_path / f"{seed}.safetensors"
            session.save_image(image, file)
            with stage_calls(other) as calls:
                loaded = other.infer(file, "What?", max_tokens=NEW)
            assert calls.count(0) == NEW  # the question, and a row for each later token
            fresh = session.infer(image, "What?", max_tokens=NEW)
            assert (loaded.tokens, loaded.plan.kept) == (fresh.tokens, fresh.plan.kept)
            both = other.infer([file, picture(*SHAPES[0], 9)], "What?", max_tokens=NEW)
            again = session.infer([image, picture(*SHAPES[0], 9)], "What?", max_tokens=NEW)
            assert both.tokens == again.tokens


def test_a_file_whose_rows_stand_elsewhere_is_refused(made, tmp_path, monkeypatch):
    bundle = made("smolvlm", BLIND)
    config = open_checkpoint(str(made.folder("smolvlm"))).config
    with load(bundle.path) as session:
        file = tmp_path / "a.safetensors"
        image = session.decode_image(picture(*SHAPES[0]))
        cached = session._computed(image)
        encoded = session.encode_image(image)
        layout = session.saved_layout(image.layout)
        runs = len(config.layout(*image.size).spans)
        assert len(layout.runs) == runs == len(layout.texts) + 1 > 2  # before it is the prefix

        def saved(change):
            first = cached.stages[0]
            stages = (replace(first, order=change(first.order.copy())), *cached.stages[1:])
            image_file.write_image(
                file, layout, image.key, image.size, encoded, replace(cached, stages=stages)
            )

        def on_a_marker(order):
            """A row of the image at the order of the text between its runs."""
            visual = layout.is_visual(order)
            order[np.flatnonzero(visual)[0]] = layout.texts[0][0]
            return order

        def beyond(order):
            order[np.flatnonzero(layout.is_visual(order))[-1]] = layout.runs[-1][1]
            return order

        def turned(order):
            visual = np.flatnonzero(layout.is_visual(order))
            order[visual] = order[visual][::-1]
            return order

        saved(lambda order: order)
        assert session.load_image(file).key == image.key
        for change in (on_a_marker, beyond, turned):
            saved(change)
            with pytest.raises(ImageError, match="at places where a prompt has others"):
                session.load_image(file)
