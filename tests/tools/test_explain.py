"""``visistage explain``: its numbers against brute force, its page against a real browser."""

import html
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from visistage.cli.main import main
from visistage.cli.show.answer_view import savings
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.graphs.bundle import Bundle, FileFact
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.chain.executor import GRAPH_CALLS
from visistage.graphs.config import ModelConfig
from visistage.graphs.errors import BundleError, CapacityError, PromptError
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.select import Prober
from visistage.graphs.quantization import Quantization
from visistage.pages.page import write_page
from visistage.pages.units import percent, ranges
from visistage.runtime.image.overlay import Grid, cropped_share, heat_uri, seen
from visistage.runtime.image.preprocessing import Preprocessing
from visistage.runtime.session import Session
from visistage.tests.support import toy
from visistage.tests.support.browser import check_picture
from visistage.tools.explain.dense import dense_bundle, how_to_build, same_model
from visistage.tools.explain.explain_facts import Run, explain_facts
from visistage.tools.explain.explain_page import masks_of, outlines
from visistage.tools.explain.explanation import explain
from visistage.tools.explain.readings import Gates, read_row
from visistage.tools.explain.trace import trace

QUESTION = "What is this?"
NASTY = '</script><script>document.title="owned"</script> "a" & <b>\'x\'</b>'
PLAN = "visipruner:shallow=2,t=3,e=5,keep=4"
ADAPTIVE = "visipruner-adaptive:boundaries=3-5,cosine=0.95,contribution=0.5,exit_cosine=0.9"
SHAPE = {"layers": 8, "heads": 4, "kv_heads": 2}  # grouped queries


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy checkpoint, its bundles by plan, and two pictures."""
    folder = tmp_path_factory.mktemp("explain")
    checkpoint = toy.make_checkpoint(folder / "toy", scale=2.0, **SHAPE)
    for plan in ("dense", PLAN, ADAPTIVE):
        make_bundle(str(checkpoint), plan=plan, out=str(folder / "engines"))
    for seed in (1, 2):
        noise = np.random.default_rng(seed).integers(0, 256, (70, 110, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((220, 140)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def bundles(folder):
    """Bundle folders by the first word of their plan."""
    found = {}
    for manifest in (folder / "engines").rglob("manifest.json"):
        found[Bundle.open(manifest.parent).manifest.plan.name] = manifest.parent
    named = {"dense": found["dense"]}
    named["adaptive"] = next(p for name, p in found.items() if "adaptive" in name)
    (named["pruned"],) = (p for p in found.values() if p not in named.values())
    return named


@pytest.fixture(scope="module")
def explained(folder, bundles):
    return explain(bundles["pruned"], [folder / "1.png"], QUESTION, max_tokens=6)


def traced(path, images, question=QUESTION, max_tokens=3):
    with Session(Bundle.open(path), cache_bytes=0) as session:
        return trace(session, images, question, max_tokens), session.bundle.manifest


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["open", "blind", "sink", "renorm"])
def test_a_reading_is_what_full_contributions_say(mode):
    random = np.random.default_rng(0)
    heads, groups, slots, width = 6, 2, 11, 8
    query = random.normal(size=(heads, width))
    key, value = random.normal(size=(2, groups, slots, width))
    visible = np.arange(slots) < 9
    visual = np.array([2, 3, 4, 7])
    gates = {
        "open": None,
        "blind": Gates(~np.isin(np.arange(slots), visual), np.zeros(slots)),
        "sink": Gates(~np.isin(np.arange(slots), visual), np.isin(np.arange(slots), visual)),
        "renorm": Gates(~np.isin(np.arange(slots), visual[:2]), np.zeros(slots), renorm=True),
    }[mode]
    got = read_row(query, key, value, visible, visual, gates)

    keys, values = key.repeat(heads // groups, 0), value.repeat(heads // groups, 0)
    scores = (query[:, None] * keys).sum(-1) / width**0.5
    hidden = ~visible | (np.isin(np.arange(slots), visual[:2]) if mode == "renorm" else False)
    weights = np.exp(scores) * ~hidden
    weights /= weights.sum(1, keepdims=True)
    assert got.attention == pytest.approx(weights[:, visual].sum(1).mean(), rel=1e-5)
    if mode in ("blind", "sink"):
        lost = weights[:, visual].sum(1)
        weights[:, visual] = 0
        if mode == "sink":
            weights[:, visual[0]] = lost
    contributions = (weights[..., None] * values).transpose(1, 0, 2).reshape(slots, -1)
    out = contributions.sum(0)
    rest = out - contributions[visual]
    cosines = rest @ out / np.linalg.norm(rest, axis=1) / np.linalg.norm(out)
    of_vision = np.linalg.norm(contributions[visual].sum(0))
    of_text = np.linalg.norm(out - contributions[visual].sum(0))

    np.testing.assert_allclose(got.norms, np.linalg.norm(contributions[visual], axis=1), rtol=1e-4)
    np.testing.assert_allclose(got.cosines, cosines, rtol=1e-5)
    assert got.output == pytest.approx(np.linalg.norm(out), rel=1e-5)
    assert got.part == pytest.approx(of_vision / (of_vision + of_text), rel=1e-4)
    assert (got.part == 0) == (mode == "blind")


def test_a_reading_is_what_the_graph_that_probes_a_layer_computes():
    """The two closed forms: in NumPy for the page, in torch for the graphs."""
    random = np.random.default_rng(1)
    query = random.normal(size=(6, 8)).astype(np.float32)
    key, value = random.normal(size=(2, 2, 11, 8)).astype(np.float32)
    slot_order, visual = np.arange(11), np.array([2, 3, 4, 7])
    got = read_row(query, key, value, slot_order <= 8, visual)
    given = [torch.from_numpy(array)[None] for array in (query, key, value, slot_order)]
    with torch.no_grad():
        cosines, norms = Prober()(*given, torch.tensor([8]), torch.from_numpy(visual)[None])
    np.testing.assert_allclose(got.cosines, cosines[0], rtol=1e-5)
    np.testing.assert_allclose(got.norms, norms[0], rtol=1e-4)


def test_a_dense_run_reads_what_transformers_computes(folder, bundles):
    """Eager attention's own probabilities and values, two pictures, grouped queries."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    images = [Image.open(folder / f"{number}.png") for number in (1, 2)]
    got, _ = traced(bundles["dense"], images)

    model = LlavaForConditionalGeneration.from_pretrained(
        folder / "toy", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = AutoProcessor.from_pretrained(folder / "toy", backend="pil")
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=images, text=prompt, return_tensors="pt")
    values = []
    layers = model.model.language_model.layers
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda *call: values.append(call[2][0]))
        for layer in layers
    ]
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    visual = inputs["input_ids"][0] == toy.SPECIALS["<image>"]
    assert visual.sum() == 32
    assert len(got.layers) == len(layers)
    for layer, weights, flat in zip(got.layers, attentions, values, strict=True):
        value = flat.view(len(flat), 2, -1).transpose(0, 1).repeat_interleave(2, 0)  # (H, S, d)
        given = (weights[0, :, -1, :, None] * value).transpose(0, 1).flatten(1)  # (S, H d)
        out, own = given.sum(0), given[visual]
        cosines = torch.cosine_similarity(out - own, out[None], dim=1)
        np.testing.assert_allclose(layer.norms, own.norm(dim=1), rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(layer.cosines, cosines, atol=1e-4)
        assert layer.vision == pytest.approx(float(own.sum(0).norm()), rel=2e-3)
        assert layer.present.all()


@pytest.mark.parametrize("name", ["pruned", "adaptive", "dense"])
def test_a_pruned_run_reads_what_the_stages_computed(folder, bundles, monkeypatch, name):
    """|o| of the last row, taken from inside the torch stages: gates, spans and slots are right."""
    path = bundles[name]
    outputs = []
    real = Eager.cached_attention

    def noted(self, *arguments):
        result = real(self, *arguments)
        outputs.append(result[0][0, :, -1].flatten().norm().item())
        return result

    bundle = Bundle.open(path)
    with Session(bundle, cache_bytes=0) as session:
        image = session.decode_image(folder / "1.png")
        parts = session.prompt_parts(QUESTION, [image])
        rows = [
            part.encoded().rows if hasattr(part, "encoded") else session.context.embed(part)
            for part in parts
        ]
        got = trace(session, [image], QUESTION, 3)
    embeds = torch.from_numpy(np.concatenate(rows, 1))
    start = rows[0].shape[1]
    spans = [[(start, start + rows[1].shape[1])]]
    checkpoint = open_checkpoint(str(folder / "toy"))
    weights = {key: checkpoint.load(key) for key in checkpoint.tensors}
    config = json.loads((folder / "toy" / "config.json").read_text())["text_config"]
    monkeypatch.setattr(Eager, "cached_attention", noted)
    with torch.no_grad():
        chain.run(weights, config, embeds, spans, bundle.manifest.plan)
    first = bundle.manifest.plan.stages[0].depth
    assert len(outputs) == 2 * first + 8  # stage 0 three times: text, picture, text
    expected = outputs[2 * first :]
    np.testing.assert_allclose([layer.output for layer in got.layers], expected, rtol=1e-3)
    if name == "pruned":
        assert [int(layer.present.sum()) for layer in got.layers] == [16] * 4 + [4] * 2 + [0] * 2
        assert got.layers[1].part == 0  # text-blind
        assert np.count_nonzero(got.layers[0].norms) == 1  # the sink's stand-in
        assert got.layers[2].part > 0
        assert set(got.kept) == set(np.flatnonzero(got.layers[4].present))


def test_the_tokens_kept_are_the_strongest_of_the_selecting_layer(folder, bundles):
    got, _ = traced(bundles["pruned"], [folder / "1.png", folder / "2.png"])
    strongest = np.argsort(-got.layers[3].norms)[:4]
    assert sorted(strongest) == list(got.kept)


def test_watching_leaves_the_session_as_it_was(folder, bundles):
    with Session(Bundle.open(bundles["pruned"]), cache_bytes=0) as session:
        plain = session.infer(folder / "1.png", QUESTION, max_tokens=4)
        observed = trace(session, [folder / "1.png"], QUESTION, 4)
        assert not set(GRAPH_CALLS) & set(vars(session.executor))
    assert observed.answer.tokens == plain.tokens
    assert observed.timing.runs >= 1
    assert observed.timing.first_token_ms <= observed.timing.total_ms


def test_facts_add_up(explained, bundles):
    facts = explained.facts
    assert [layer["phase"] for layer in facts["layers"]] == (
        ["blind"] * 2 + ["all"] * 2 + ["kept"] * 2 + ["none"] * 2
    )
    assert facts["kept"] is not None
    assert len(facts["kept"]) == 4
    assert sum(facts["given_up"].values()) == pytest.approx(1)
    assert all(share > 0 for share in facts["given_up"].values())
    assert facts["savings"]["visual_flops"] < facts["savings"]["dense_visual_flops"]
    ratio = facts["savings"]["visual_flops"] / facts["savings"]["dense_visual_flops"]
    assert ratio == pytest.approx((4 * 16 + 2 * 4) / (8 * 16), rel=0.05)  # few pairs to attend to
    parts = [layer["dense_part"] for layer in facts["layers"]]
    assert facts["fusion"]["part"] == max(parts) == parts[facts["fusion"]["peak"]]
    assert all(0 < layer["kept_mass"] < 1 for layer in facts["layers"])
    assert facts["dense"]["bundle"] == bundles["dense"].name
    assert facts["same_answer"] == (facts["answer"]["tokens"] == facts["dense"]["tokens"])
    json.dumps(facts, allow_nan=False)


def test_savings_are_those_that_infer_prints(folder, bundles):
    for name in ("pruned", "adaptive"):
        got, manifest = traced(bundles[name], [folder / "1.png", folder / "2.png"])
        ours = explain_facts(QUESTION, Run(name, manifest, got), None, None)["savings"]
        theirs = savings(manifest, got.answer.plan)
        for kind in ("visual_flops", "kv_bytes"):
            percent_less = 100 * (1 - ours[kind] / ours[f"dense_{kind}"])
            assert percent_less == pytest.approx(theirs[f"{kind}_percent"])
            assert percent_less > 10


# --- the unpruned model ---------------------------------------------------------------------------


def test_the_dense_bundle_beside_it_is_found(bundles):
    found = dense_bundle(Bundle.open(bundles["pruned"]), None)
    assert found is not None
    assert found.path.samefile(bundles["dense"])
    assert dense_bundle(Bundle.open(bundles["dense"]), None) is None


def test_without_one_the_page_says_how_to_get_it(folder, bundles, tmp_path):
    alone = tmp_path / "alone" / "bundle"
    shutil.copytree(bundles["pruned"], alone)
    page = explain(alone, [folder / "1.png"], QUESTION, max_tokens=2)
    assert page.facts["dense"] is None
    assert page.facts["dense_hint"] == "visistage build toy --plan dense"
    assert page.facts["dense_hint"] in page.html
    assert "The unpruned model says" not in page.html
    named = explain(alone, [folder / "1.png"], QUESTION, max_tokens=2, dense=bundles["dense"])
    assert named.facts["dense"]["bundle"] == bundles["dense"].name
    assert named.facts["dense_hint"] is None


def test_the_command_names_an_unusual_precision(bundles):
    manifest = Bundle.open(bundles["pruned"]).manifest
    assert how_to_build(replace(manifest, precision="fp16")).endswith(" --precision fp16")
    rounded = how_to_build(replace(manifest, precision="w4+head=float+stage2=w8"))
    assert rounded.endswith(" --precision w4+head=float")
    known = replace(manifest, precision="int8", quantization=Quantization(calibration="12" * 32))
    assert how_to_build(known) == (
        "visistage calibrate toy --plan dense --data SAMPLES --out calibrations/dense && "
        "visistage build toy --plan dense --precision int8 --calib calibrations/dense/toy"
    )


def test_one_model_is_known_by_its_table_where_rounded_weights_differ(bundles, tmp_path):
    pruned, dense = (Bundle.open(bundles[name]) for name in ("pruned", "dense"))
    moved = Bundle.open(shutil.copytree(dense.path, tmp_path / "moved"))
    file = moved.file(moved.manifest.embedding.file)
    data = bytearray(file.read_bytes())
    files = {**moved.manifest.files, file.name: FileFact(len(data), "0" * 64)}
    moved = Bundle(moved.path, replace(moved.manifest, files=files))
    assert same_model(pruned, moved)
    data[moved.manifest.embedding.offset] ^= 1
    file.unlink()  # a link to the checkpoint's
    file.write_bytes(data)
    assert not same_model(pruned, moved)


def test_a_wrong_comparison_is_refused(bundles, tmp_path):
    pruned = Bundle.open(bundles["pruned"])
    with pytest.raises(BundleError, match=r"unpruned model\. Build it: visistage build toy"):
        dense_bundle(pruned, bundles["adaptive"])
    with pytest.raises(BundleError, match="no bundle"):
        dense_bundle(pruned, tmp_path)
    other = toy.make_checkpoint(tmp_path / "other", scale=2.0, seed=7, **SHAPE)
    with pytest.raises(BundleError, match="other weights"):
        dense_bundle(
            pruned, make_bundle(str(other), plan="dense", out=str(tmp_path / "engines")).path
        )


def test_a_dense_bundle_explains_itself(folder, bundles):
    page = explain(bundles["dense"], [folder / "1.png"], QUESTION, max_tokens=2)
    assert {layer["phase"] for layer in page.facts["layers"]} == {"all"}
    assert page.facts["dense"] is page.facts["dense_hint"] is None
    assert "all 16 visual tokens in all 8 layers" in page.html
    assert "With and without pruning" not in page.html


def test_an_early_exit_without_a_selection(folder, tmp_path):
    built = make_bundle(str(folder / "toy"), plan="exit-only:e=4", out=str(tmp_path))
    page = explain(built.path, [folder / "1.png"], QUESTION, max_tokens=2)
    assert page.facts["kept"] is None
    assert [layer["phase"] for layer in page.facts["layers"]] == ["all"] * 5 + ["none"] * 3
    assert "After layer 4 of 0–7 it went on <b>without the image</b>" in page.html
    assert "kept tokens</span>" not in page.html


def test_a_plan_that_decides_per_prompt(folder, bundles):
    page = explain(bundles["adaptive"], [folder / "1.png"], QUESTION, max_tokens=2)
    assert page.facts["plan"]["kind"] == "adaptive"
    assert page.facts["plan"]["called"] is not None
    for deviation in page.facts["plan"]["deviations"]:
        assert html.escape(deviation) in page.html


# --- pictures -------------------------------------------------------------------------------------


def clip(**changes):
    values = {
        "processor": "CLIPImageProcessor",
        "pad_color": None,
        "size": 32,
        "resample": 3,
        "crop_size": (32, 32),
        "rescale_factor": 1 / 255,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
    }
    return Preprocessing(**{**values, **changes})


GRID = Grid(4, 4, 1.0, 0)


def test_the_centre_crop_is_what_is_shown():
    """A white square in the centre of a wide picture fills the left and right of its crop."""
    image = Image.new("RGB", (600, 200))
    image.paste((255, 255, 255), (200, 0, 400, 200))
    shown = seen(image, clip(), GRID)
    assert shown.size == (192, 192)
    assert np.asarray(shown)[:, 4:-4].min() > 250
    assert cropped_share(image.size, clip(), GRID) == pytest.approx(2 / 3)
    padded = clip(
        processor="LlavaImageProcessor", pad_color=(0, 0, 0), crop_size=None, size=(32, 32)
    )
    assert cropped_share(image.size, padded, GRID) == 0
    bars = np.asarray(seen(image, padded, GRID))
    assert bars[0].max() < 5
    assert bars[bars.shape[0] // 2].max() > 250


def test_a_very_long_picture_is_shown_smaller():
    large = clip(size=336, crop_size=(336, 336))
    assert seen(Image.new("RGB", (1000, 520)), large, GRID).size == (672, 672)
    assert seen(Image.new("RGB", (75_000, 520)), large, GRID).size == (336, 336)


@pytest.mark.parametrize(
    ("encoder", "select", "tokens", "first"),
    [("clip", "default", 16, 0), ("clip", "full", 17, -1), ("siglip", "full", 16, 0)],
)
def test_tokens_lie_where_their_patches_are(encoder, select, tokens, first):
    config = ModelConfig.from_hf(toy.make_config(encoder=encoder, select=select, layers=2))
    assert config.visual_tokens == tokens
    grid = Grid.of(config, config.layout(32, 32))
    values = np.arange(1, tokens + 1)
    cells = grid.cells(values)
    assert grid.first == first
    assert cells.shape == (4, 4)
    assert cells[0, 0] == 1 - first
    assert cells[3, 3] == 16 - first


def test_a_border_that_fills_no_patch_is_left_out():
    config = ModelConfig.from_hf(toy.make_config(image_size=30, patch=8, layers=2))
    assert Grid.of(config, config.layout(32, 32)).columns == 3
    assert Grid.of(config, config.layout(32, 32)).extent == pytest.approx(24 / 30)


def test_heat_grows_with_contribution():
    import base64
    import io

    uri = heat_uri(np.array([[0.0, 0.2], [0.6, 1.0]]))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert pixels.shape == (2, 2, 4)
    assert pixels[0, 0, 3] == 0
    assert (np.diff(pixels[..., 3].flatten().astype(int)) > 0).all()


def test_outlines_follow_the_border():
    cells = np.zeros((3, 3), bool)
    cells[0, 0] = cells[0, 1] = True
    drawn = outlines(cells)
    assert sorted(re.findall(r"M\d \d[hv]1", drawn["border"])) == sorted(
        ["M0 0h1", "M0 1h1", "M0 0v1", "M1 0h1", "M1 1h1", "M2 0v1"]
    )
    assert drawn["rest"] == "M0 0h3v3h-3zM0 0h1v1h-1zM1 0h1v1h-1z"


def test_a_layer_before_a_selection_outlines_what_will_survive(explained):
    class Picture:
        present = [np.ones(4, bool)] * 2 + [np.array([1, 0, 0, 1])] * 2 + [np.array([1, 0, 0, 0])]

    masks = masks_of(["blind", "all", "kept", "kept", "kept", "none"], [Picture])
    assert masks.of_layer == [1, 1, 1, 1, 0, None]
    assert [int(tokens[0].sum()) for tokens in masks.distinct] == [1, 2]


def test_words():
    assert [percent(x) for x in (0, 0.0123, 0.123, 0.9999, None)] == [
        *("0\xa0%", "1.2\xa0%", "12\xa0%", "100\xa0%", "–")
    ]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert ranges([]) == ""


# --- the page and the command ---------------------------------------------------------------------


def test_the_page_says_it_all(explained):
    facts, text = explained.facts, explained.html
    for said in (QUESTION, facts["answer"]["text"], facts["dense"]["text"], facts["bundle"]):
        assert html.escape(said, quote=False) in html.unescape(text) or said in html.unescape(text)
    for title in ("Where image and text fuse", "With and without pruning", "The stages"):
        assert title in text
    assert text.count('class="heat"') == 1
    assert len(re.findall(r'<li data-layer="\d+" data-phase="\w+" data-mask', text)) == 8
    assert len(re.findall(r"<img data-image=", text)) == 16  # both runs, eight layers
    assert "After layer 3 of 0–7 it went on with <b>4 of 16</b> visual tokens" in text
    assert "after layer 5 with none" in text


def test_nothing_is_fetched_from_elsewhere(explained):
    addresses = re.findall(r"""(?:src=|href=|url\()["']?([^"')\s>]{1,20})""", explained.html)
    assert len(addresses) > 16
    assert all(address.startswith("data:image/") for address in addresses)
    assert "http:" not in explained.html
    assert "https:" not in explained.html
    assert "default-src 'none'" in explained.html


def test_strings_are_escaped(folder, bundles):
    text = explain(bundles["pruned"], [folder / "1.png"], NASTY, max_tokens=2).html
    assert text.count("<script>") == 1
    assert html.escape(NASTY, quote=False)[:30] in text
    assert "<b>'x'" not in text


def test_two_pictures_are_both_drawn(folder, bundles):
    page = explain(bundles["pruned"], [folder / "1.png", folder / "2.png"], QUESTION, max_tokens=2)
    assert page.facts["images"] == 2
    assert page.html.count('class="photo"') == 2
    assert page.html.count('class="heat"') == 2
    assert page.facts["layers"][0]["visual_tokens"] == 32


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command(folder, bundles, tmp_path):
    out = tmp_path / "page.html"
    done = run(
        *("explain", bundles["pruned"], folder / "1.png", QUESTION),
        *("--out", out, "--max-tokens", 2, "--json"),
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["page"] == str(out)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_wrong_input_is_one_clear_message(folder, bundles, tmp_path):
    for arguments, message in (
        ((bundles["pruned"], QUESTION), "at least one"),
        ((bundles["pruned"], "absent.png", QUESTION), "no file: 'absent.png'"),
        ((tmp_path, folder / "1.png", QUESTION), "no bundle"),
        ((bundles["pruned"], folder / "1.png", QUESTION, "--dense", bundles["pruned"]), "Build it"),
        ((bundles["pruned"], folder / "1.png", QUESTION, "--backend", "magic"), "magic"),
        (
            (
                bundles["pruned"],
                folder / "1.png",
                "?",
                "--max-tokens",
                1,
                "--out",
                tmp_path / "a/b",
            ),
            "cannot be written",
        ),
    ):
        done = run("explain", *arguments)
        assert done.exit_code == 2, done.output
        assert message in done.output
        assert "Traceback" not in done.output
    with pytest.raises(PromptError, match="at least one"):
        explain(bundles["pruned"], [], QUESTION)


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "page.html"
    target.mkdir()
    with pytest.raises(CapacityError, match=r"--out explain\.html"):
        write_page("<!doctype html>", target, "--out explain.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


# --- a browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(explained, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(explained.html, encoding="utf-8")
    return file.as_uri()


def attribute(dom: str, name: str, of: str = '<main id="page"') -> str:
    tag = re.search(re.escape(of) + "[^>]*>", dom)
    assert tag, of
    value = re.search(rf'\b{name}="([^"]*)"', tag[0])
    return value[1] if value else ""


def test_the_browser_shows_the_layer_asked_for(browser, page, explained):
    heats = set()
    for layer in (1, 3, 5, 7):
        dom, complaints = browser(f"{page}#layer={layer}&run=plan", "--dump-dom")
        assert not complaints
        facts = explained.facts["layers"][layer]
        assert attribute(dom, "data-layer") == str(layer)
        assert attribute(dom, "data-phase") == facts["phase"]
        assert re.search(rf'id="caption"[^>]*><b>Layer {layer}\. </b>', dom)
        assert f'<output for="layer" id="number">{layer}</output>' in dom
        assert len(re.findall(r'class="now"', dom)) == 2  # chart and sheet
        heats.add(attribute(dom, "src", '<img class="heat"'))
        assert '<div class="controls">' in dom  # shown, now that there is a script
    assert len(heats) == 3  # layers 1 and 7 have no heat: the same empty picture
    dom, complaints = browser(f"{page}#layer=7&run=dense", "--dump-dom")
    assert not complaints
    assert attribute(dom, "data-run") == "dense"
    assert attribute(dom, "src", '<img class="heat"') not in heats
    assert "Layer 7, unpruned." in dom


def test_the_slider_moves_the_picture(browser, page, explained, tmp_path):
    """A script outside the page's policy turns the page's own knobs; so it runs without it."""
    act = """<script>
      const slider = document.getElementById("layer");
      slider.value = 5; slider.dispatchEvent(new Event("input"));
      document.title = [document.getElementById("page").dataset.layer, location.hash,
        document.querySelector(".heat").src ===
          document.querySelector('.cells[data-run="plan"] li[data-layer="5"] img').src].join("|");
      document.querySelector('[data-choose="dense"]').click();
      document.querySelector('.chart li[data-layer="2"]').click();
      document.title += "|" + location.hash;
      document.getElementById("overlay").click();
      document.title += "|" + getComputedStyle(document.querySelector(".grid")).display;
    </script>"""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", explained.html).replace(
        "</body>", act + "</body>"
    )
    file = tmp_path / "acted.html"
    file.write_text(text, encoding="utf-8")
    dom, complaints = browser(file.as_uri(), "--dump-dom")
    assert not complaints
    title = html.unescape(re.search("<title>(.*?)</title>", dom, re.S)[1])
    assert title == "5|#layer=5&run=plan|true|#layer=2&run=dense|none"


def test_an_injected_script_does_not_run(browser, folder, bundles, tmp_path):
    """Escaped, the question is text; and unescaped the policy would stop it."""
    text = explain(bundles["pruned"], [folder / "1.png"], NASTY, max_tokens=2).html
    file = tmp_path / "nasty.html"
    file.write_text(text, encoding="utf-8")
    dom, complaints = browser(file.as_uri(), "--dump-dom")
    assert not complaints
    assert "<title>owned" not in dom
    file.write_text(text.replace("</body>", NASTY + "</body>"), encoding="utf-8")
    dom, complaints = browser(file.as_uri(), "--dump-dom")
    assert complaints  # refused to execute
    assert "<title>owned" not in dom


def requests(browser, text: str, file) -> list[str]:
    """What a page fetches, as the browser itself lists it; data URIs are not fetched."""
    act = """<script>addEventListener("load", () => { document.title = "asked:" +
      performance.getEntriesByType("resource").map((one) => one.name)
        .filter((name) => !name.startsWith("data:")).join("|"); });</script>"""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("</body>", act + "</body>")
    file.write_text(text, encoding="utf-8")
    dom, _ = browser(file.as_uri(), "--dump-dom")
    asked = re.search("<title>asked:(.*?)</title>", dom)
    assert asked
    return [name for name in asked[1].split("|") if name]


def test_the_browser_fetches_nothing(browser, explained, tmp_path):
    """Even with the policy that forbids it taken away."""
    assert requests(browser, explained.html, tmp_path / "own.html") == []
    outside = "http://localhost:9/x.png"
    talkative = explained.html.replace("</body>", f'<img src="{outside}"></body>')
    assert requests(browser, talkative, tmp_path / "talkative.html") == [outside]


def test_a_complaint_would_be_seen(browser, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<script>nowhere()</script>", encoding="utf-8")
    assert browser(broken.as_uri(), "--dump-dom")[1]


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_looks_like_a_page(browser, page, tmp_path, scheme, width):
    shot = tmp_path / "shot.png"
    _, complaints = browser(
        f"{page}#layer=4",
        f"--screenshot={shot}",
        f"--window-size={max(width, 500)},1600",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
    )
    assert not complaints
    check_picture(shot, scheme, least=0.02)
