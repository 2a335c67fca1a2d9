"""The model that the project ships: what it answers, and that the picture is why."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from visistage.bench.record import RESULTS
from visistage.calib.evaluate import evaluate
from visistage.calib.samples import calibration_samples, evaluation_samples
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.checkpoint.known_models import OWN_MODELS, own_folder
from visistage.demo.gallery import bundled
from visistage.runtime.session import load
from visistage.tests.support import reference

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "demo" / "model"
QUESTIONS = 210
SLACK = 0.10
"""Three standard errors of an accuracy over 210 questions, rounded up."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    out = tmp_path_factory.mktemp("engines")
    return {plan: make_bundle("demo", plan=plan, out=out) for plan in ("dense", "visipruner")}


@pytest.fixture(scope="module")
def samples():
    return evaluation_samples("demo", None, QUESTIONS)


@pytest.fixture(scope="module")
def recorded():
    rows = json.loads((RESULTS / "accuracy-demo.json").read_text())["rows"]
    return {row["plan"]: row["accuracy"] for row in rows}


def test_they_are_small_and_complete():
    folders = [own_folder(model) for model in OWN_MODELS]
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < 16_000_000
    for folder in folders:
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            file.name for file in folder.iterdir()
        }


def test_every_bundled_picture_is_answered_right(bundles):
    for bundle in bundles.values():
        with load(bundle.path) as session:
            for picture in bundled():
                for question, answer in picture.questions:
                    found = session.infer(picture.path, question, max_tokens=4)
                    assert found.text.strip() == answer, (picture.path.name, question)


def test_the_larger_demo_is_built_and_asked_by_its_name(tmp_path):
    """At LLaVA's number of visual tokens, with scenes of its own."""
    bundle = make_bundle("demo-576", plan="visipruner", out=tmp_path)
    assert (tmp_path / "demo-576").is_dir()
    samples = evaluation_samples("demo-576", None, 70)
    calibrating, files = calibration_samples("demo-576", None, 14)
    assert samples[0].image.size == (192, 192)
    assert not {s.image.tobytes() for s in samples} & {s.image.tobytes() for s in calibrating}
    assert files == ("demo-576 scenes, series 1000",)
    with load(bundle.path) as session:
        assert session.bundle.manifest.model == "demo-576"
        assert session.infer(samples[0].image, samples[0].prompt).plan.visual_tokens == 576
        report = evaluate(session, samples)
    assert report.overall.share > 0.6


def test_dense_equals_hugging_face(bundles, samples):
    processor = AutoProcessor.from_pretrained(MODEL, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    with load(bundles["dense"].path) as session:
        for sample in samples[:40]:
            content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = processor(text=text, images=sample.image, return_tensors="pt")
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            theirs = out[0, inputs["input_ids"].shape[1] :].tolist()
            mine = session.infer(sample.image, sample.prompt, max_tokens=12)
            assert list(mine.tokens) == theirs, sample.name


def test_the_static_plan_equals_the_reference(bundles, samples):
    """First token and kept tokens of real questions, against masks, full tensors and gathers."""
    opened = open_checkpoint("demo")
    weights = {name: opened.load(name).float() for name in opened.tensors}
    text = dict(opened.raw["text_config"])
    text["rope_theta"] = opened.config.text.rope.theta
    with load(bundles["visipruner"].path) as session:
        plan = session.bundle.manifest.plan
        method = reference.Static(
            len(plan.stages[0].gated_layers), plan.trigger, plan.exit, plan.keep
        )
        for sample in samples[:12]:
            answer = session.infer(sample.image, sample.prompt, max_tokens=1)
            encoded = session.encode_image(session.decode_image(sample.image))
            visual_rows = torch.from_numpy(encoded.rows[0])
            rows, visual = [], []
            for part in session.encoder.encode(sample.prompt, images=1).segments:
                ids = list(part.ids)
                rows.append(
                    visual_rows if part.is_image else weights["model.embed_tokens.weight"][ids]
                )
                visual += [part.is_image] * len(rows[-1])
            logits, kept = reference.forward(
                weights, text, torch.cat(rows), torch.tensor(visual), method
            )
            assert list(answer.plan.kept) == kept.tolist(), sample.name
            assert answer.tokens[0] == int(logits.argmax()), sample.name


@pytest.mark.parametrize("plan", ["dense", "visipruner"])
def test_accuracy_is_what_was_recorded(bundles, samples, recorded, plan):
    with load(bundles[plan].path) as session:
        report = evaluate(session, samples)
    assert abs(report.overall.share - recorded[plan]) < SLACK


def test_another_picture_spoils_the_answers(bundles, samples, recorded):
    """The same questions about the next sample's picture: little more than guessing is left."""
    from dataclasses import replace

    turned = [
        replace(sample, image=other.image)
        for sample, other in zip(samples, samples[1:] + samples[:1], strict=True)
    ]
    with load(bundles["dense"].path) as session:
        report = evaluate(session, turned)
    assert report.overall.share < recorded["without the picture"] + SLACK


def test_the_example_and_the_bundled_pictures_run(bundles):
    images = json.loads((ROOT / "demo" / "pictures" / "pictures.json").read_text())
    name = next(iter(images)) if isinstance(images, dict) else images[0]["file"]
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "examples" / "ask.py",
            bundles["visipruner"].path,
            ROOT / "demo" / "pictures" / name,
            "How many objects are there?",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ms to the first token" in done.stdout
