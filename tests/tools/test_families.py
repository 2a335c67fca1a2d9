"""A bundle of each model family in the hands of its user: every command, and what it says."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from visistage.cli.main import main
from visistage.graphs.bundle import BUNDLE_VARIABLE, Bundle
from visistage.graphs.families.registry import FAMILIES
from visistage.runtime.session import load
from visistage.tests.support.families import PLAN, SHAPES, TINY, write_pictures
from visistage.tests.support.served import data_uri, question, serving

NEW = 4
QUESTION = "What is it?"
SMALL, WIDE = "small", "wide"


def run(*words, **options):
    return CliRunner().invoke(main, [str(word) for word in words], **options)


def ok(*words, **options):
    done = run(*words, **options)
    assert done.exit_code == 0, (words, done.output, done.exception)
    return done


def facts(*words):
    return json.loads(ok(*words, "--json", "-q").stdout)


def test_every_family_has_a_tiny_checkpoint():
    assert set(TINY) == set(FAMILIES)


@pytest.fixture(scope="module", params=TINY)
def made(request, tmp_path_factory):
    """A checkpoint, pictures, questions about them, and the bundle in ``engines``."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny = TINY[request.param]
    tiny.make(folder / "tiny")
    write_pictures(folder)
    lines = [{"image": f"{name}.png", "prompt": QUESTION} for name in SHAPES]
    known = [{**line, "answer": "yes"} for line in lines]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, known)))
    asked = [{**line, "max_tokens": NEW, "id": number} for number, line in enumerate(lines)]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    done = ok("build", folder / "tiny", "--plan", PLAN, "--out", folder / "engines")
    path = done.stdout.splitlines()[-1]
    return SimpleNamespace(folder=folder, name=request.param, rows=tiny.rows, path=path)


@pytest.fixture
def at(made, monkeypatch):
    monkeypatch.chdir(made.folder)
    monkeypatch.setenv(BUNDLE_VARIABLE, made.path)
    return made


def test_a_plan_is_for_the_most_tokens_of_the_checkpoint(at):
    most = Bundle.open(at.path).manifest.config.visual_tokens
    assert most >= max(at.rows.values())
    assert facts("inspect")["visual_tokens"] == most
    found = facts("plan", PLAN, "tiny")
    assert found["stages"][0]["visual_tokens"] == most
    assert bool(found["images"]) == (at.name != "llava")
    for image in found["images"]:
        assert 0 < image["tokens"] <= most


def test_verify_passes(at):
    found = facts("verify", "--model", "tiny", "--data", "samples.jsonl", "--max-tokens", NEW)
    results = {check["name"]: check["status"] for check in found["rungs"]}
    needed = {"weights", "hugging face", "graph vision", "graph stage0", "runtime", "answers"}
    assert {results[name] for name in needed} == {"passed"}, results


def test_answers_say_how_many_tokens_their_image_has(at):
    for name, rows in at.rows.items():
        found = facts("infer", f"{name}.png", QUESTION, "--max-tokens", NEW)["plan"]
        assert found["visual_tokens"] == rows
        assert found["visual_tokens_per_layer"][:2] == [rows, rows]
        assert len(found["kept"]) == 3
        shown = ok("infer", f"{name}.png", QUESTION, "--max-tokens", NEW).stderr
        assert f"{rows} visual tokens in, 3 kept" in shown


def test_questions_of_a_file_are_answered_as_alone(at, tmp_path):
    ok("infer", "--jsonl", "asked.jsonl", "--out", tmp_path / "out.jsonl")
    answers = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    found = {answer["id"]: answer["text"] for answer in answers}
    for number, name in enumerate(SHAPES):
        alone = facts("infer", f"{name}.png", QUESTION, "--max-tokens", NEW)
        assert found[number] == alone["text"]


def test_a_chat_knows_its_images(at):
    lines = f"{QUESTION}\n/image wide.png\nAnd this?\n/stats\n"
    done = ok("chat", "small.png", "--max-tokens", NEW, input=lines)
    assert f"{sum(at.rows.values())} visual tokens in" in done.stderr


def test_explain_draws_all_images(at, tmp_path):
    page = tmp_path / "page.html"
    found = facts("explain", "wide.png", "small.png", QUESTION, "--out", page, "--max-tokens", 2)
    assert (found["images"], found["visual_tokens"]) == (2, sum(at.rows.values()))
    assert len(re.findall("data:image/png", page.read_text())) >= 4


def test_tokens_are_drawn_where_they_lie(at):
    """Each of a picture's tokens alone: cells within its box, and all of them cover the picture."""
    config = Bundle.open(at.path).manifest.config
    with load(at.path) as session:
        (shown,) = session.infer("wide.png", QUESTION, max_tokens=1).shown
    layout = config.layout(*SHAPES[WIDE])
    drawn = np.zeros((shown.grid.rows, shown.grid.columns), int)
    for row in range(layout.rows):
        cells = np.argwhere(shown.grid.cells(np.arange(layout.rows) == row))
        drawn[tuple(cells.T)] += 1
        if layout.boxes is None:
            assert cells.tolist() == [list(divmod(row, shown.grid.columns))]
        elif len(cells):
            left, top, right, bottom = layout.boxes[row]
            low = np.array([top, left]) * drawn.shape
            high = np.array([bottom, right]) * drawn.shape
            assert (cells.min(0) > low - 1).all()
            assert (cells.max(0) < high + 1).all()
    assert (drawn > 0).all()


def test_profile_is_of_the_image_that_it_asks_about(at, tmp_path):
    page = ("--out", tmp_path / "profile.html")
    found = facts("profile", "--repetitions", 2, "--warm-up", 1, "--tokens", 3, *page)
    layout = Bundle.open(at.path).manifest.config.layout(480, 640)
    rows = layout.rows
    plan = found["runs"]["plan"]
    assert plan["visual_tokens"] == rows
    swept = [point["visual_tokens"] for point in plan["sweep"]]
    assert {rows, 2 * rows, 4 * rows} <= set(swept)
    stage0 = [event for event in plan["timeline"]["events"] if event["graph"] == "stage0"]
    assert stage0[0]["rows"] == layout.spans[0][1], "a gated stage takes run after run"


def test_estimates_are_of_the_checkpoints_own_images(at):
    """Compare folder and bundle: limits are in the image processor's file."""
    most = Bundle.open(at.path).manifest.config.visual_tokens
    options = ("--device", "orin-nano-8", "--text", 40, "--tokens", 32)
    for subject in ("tiny", at.path):
        prompt = facts("estimate", subject, *options)["prompt"]
        assert prompt["rows"] == prompt["prefix"] + most + 72


def test_evaluate_asks_every_sample(at):
    found = facts("evaluate", "--data", "samples.jsonl", "--max-tokens", NEW)
    assert (found["right"], found["total"], found["unreadable"]) == (0, 2, [])


def test_calibrate_measures_and_its_ranges_build(at, tmp_path):
    ok("calibrate", "tiny", "--data", "samples.jsonl", "--plan", PLAN, "--out", tmp_path)
    calibration = json.loads((tmp_path / "tiny" / "calibration.json").read_text())
    groups = calibration["groups"]
    assert any(name.startswith("model.layers.0.") for name in groups)
    assert any(not name.startswith("model.layers.") for name in groups), "encoder and projector"


def test_calibrate_tries_only_selectors_that_there_are(at, tmp_path):
    words = ("calibrate", "tiny", "--data", "samples.jsonl", "--cost", "90%", "--candidates", 1)
    ok(*words, "--out", tmp_path)
    asked = run(*words, "--out", tmp_path / "cls", "--selectors", "cls")
    config = Bundle.open(at.path).manifest.config
    if config.vision.kind == "patches":
        assert asked.exit_code == 2
        assert "entry cls" in asked.stderr


def test_a_server_counts_the_tokens_of_each_image(at):
    with serving({"tiny": Bundle.open(at.path)}) as running:
        counted = {}
        for name, rows in at.rows.items():
            uri = data_uri(np.asarray(Image.open(f"{name}.png")))
            status, answer, _ = running.ask(question(QUESTION, uri))
            assert status == 200
            counted[name] = answer["usage"]["prompt_tokens"] - rows
    assert counted[WIDE] == counted[SMALL]
