"""``visistage compare``: rows follow from answers, plans cost the same, second questions are asked
on what is cached, and nothing that was measured is lost.
"""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from visistage.calib.answer_file import Heard
from visistage.calib.samples import Sample
from visistage.calib.two_turns import Turns, evaluation_turns, paired
from visistage.cli.main import main
from visistage.compile.matched_bundles import matched_bundles
from visistage.demo.heldout import held_out, second_questions
from visistage.graphs.bundle import Bundle
from visistage.graphs.progress import Progress
from visistage.pages.chart import svg_file
from visistage.runtime import load
from visistage.runtime.session import Session
from visistage.tests.support import toy
from visistage.tests.support.routed_checkpoint import add_routers
from visistage.tools.compare.asking import answers_file, ask_bundles, ask_turns
from visistage.tools.compare.compare import in_groups
from visistage.tools.compare.compare_facts import findings, row_facts
from visistage.tools.compare.compare_page import plot, render_comparison
from visistage.tools.profile.timing import Spread

QUESTIONS = ("What is this?", "How many dogs are there?")
PLANS = ("--plan", "scope", "--plan", "random", "--plan", "exit-only:e=1")
SPREAD = {
    name: Spread(1, 1.0, 1.0, 1.0, 1.0)
    for name in ("first_token_ms", "second_question_ms", "per_token_ms")
}


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy and three images with two questions each; the right answers are the dense toy's."""
    folder = tmp_path_factory.mktemp("compare")
    toy.make_checkpoint(folder / "toy", scale=2.0)
    (dense, *_), _ = matched_bundles(
        str(folder / "toy"), ["dense"], out=folder / "out", progress=Progress()
    )
    random = np.random.default_rng(0)
    lines = []
    with load(dense.bundle.path, threads=1) as session:
        for number in range(3):
            file = folder / f"{number}.png"
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
            for text, kind in zip(QUESTIONS, ("reading", "count"), strict=True):
                answer = session.infer(file, text, max_tokens=32).text
                line = {"image": file.name, "prompt": text, "answer": answer, "type": kind}
                lines.append(json.dumps(line))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def command(folder, *more):
    options = ("--share", "50%", "--repetitions", 1, "--out", folder / "out", "--json", "-q")
    data = ("--data", folder / "data.jsonl")
    return run("compare", folder / "toy", *data, *PLANS, *options, *more)


@pytest.fixture(scope="module")
def facts(folder):
    done = command(folder)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def turns(folder):
    return evaluation_turns("toy", folder / "data.jsonl", None)


def test_every_plan_has_its_row_and_dense_the_first(facts):
    rows = facts["rows"]
    assert [row["method"] for row in rows] == ["dense", "exit-only:e=1", "scope", "random"]
    assert [row["target"] for row in rows] == [None, None, 0.5, 0.5]
    assert [row["control"] for row in rows] == [False, False, False, True]
    assert facts["samples"] == facts["second_questions"] == 6
    assert facts["unreadable"] == 0
    for row in rows:
        assert {*SPREAD} < {*row}
        assert all(row[name]["median"] > 0 for name in SPREAD)
        assert [*row["by_type"]] == ["reading", "count"]
        assert sum(share["total"] for share in row["by_type"].values()) == 6


def test_dense_is_right_and_equals_itself(facts):
    dense = facts["rows"][0]
    assert dense["accuracy"]["right"] == dense["agreement"]["right"] == 6
    assert dense["second"]["accuracy"]["right"] == 6
    assert dense["accuracy"]["low"] < 1 == dense["accuracy"]["high"]
    # Where dense is always right, a plan is right where it agrees.
    for row in facts["rows"]:
        assert row["accuracy"]["right"] == row["agreement"]["right"]


def test_costs_are_those_that_were_asked_for_and_those_of_the_answers(facts, folder, turns):
    dense, given, *matched = facts["rows"]
    for row in matched:
        assert row["visual_flops_share"] == pytest.approx(0.5, abs=0.03)
        assert row["visual_kv_bytes"] == dense["visual_kv_bytes"] / 2
    assert given["visual_flops_share"] == pytest.approx(0.5)  # 2 of 4 layers
    for row in facts["rows"]:
        bundle = Bundle.open(folder / "out" / "toy" / row["bundle"])
        heard = answers_file(folder / "out" / "toy" / "answers", bundle).find(turns[0].first)
        assert heard.flops_share == pytest.approx(row["visual_flops_share"])


def test_second_questions_are_asked_on_the_cached_image(facts, folder, turns, tmp_path):
    for row in facts["rows"]:
        assert row["second"]["on_cached_image"] == 6
    bundle = Bundle.open(folder / "out" / "toy" / facts["rows"][2]["bundle"])
    files = answers_file(tmp_path, bundle), answers_file(tmp_path / "second", bundle)
    with load(bundle.path, threads=1, cache_bytes=0) as session:  # the planted mistake
        pairs = ask_turns(session, turns, files, lambda units: None)
    assert all(second.encoded for _, second in pairs)
    kept = answers_file(folder / "out" / "toy" / "answers", bundle)
    assert [first.text for first, _ in pairs] == [kept.find(turn.first).text for turn in turns]


def test_a_plan_that_answers_everything_wrong_shows_nothing_right(facts, folder):
    row = facts["rows"][2]
    file = folder / "out" / "toy" / "answers" / f"toy-{row['bundle']}.jsonl"
    whole = file.read_text()
    lines = [json.loads(line) | {"text": "wrong"} for line in whole.splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        changed = json.loads(command(folder).stdout)
    finally:
        file.write_text(whole)
    (planted,) = (found for found in changed["rows"] if found["bundle"] == row["bundle"])
    assert planted["accuracy"]["right"] == planted["agreement"]["right"] == 0
    assert planted["accuracy"]["low"] == 0 < planted["accuracy"]["high"]
    assert all(share["right"] == 0 for share in planted["by_type"].values())
    assert planted["second"] == row["second"]
    others = [found for found in changed["rows"] if found is not planted]
    assert [found["accuracy"] for found in others] == [
        found["accuracy"] for found in facts["rows"] if found["bundle"] != row["bundle"]
    ]
    assert any("random" in text and "scope" in text for text in changed["findings"])


def test_the_page_has_a_dot_for_each_plan_and_every_number(facts, folder):
    page = (folder / "out" / "toy" / "compare.html").read_text()
    assert facts["page"].endswith("compare.html")
    dots = re.findall(r'<circle class="mark ([^"]+)"[^>]*><title>([^<]+)</title>', page)
    assert sorted(title.split(": ")[0] for _, title in dots) == sorted(
        row["plan"].split(": ")[0] for row in facts["rows"][1:]
    )
    assert [title for kind, title in dots if "open" in kind] == [
        title for _, title in dots if title.startswith("random")
    ]
    for row in facts["rows"]:
        assert f"<code>{row['plan']}</code>" in page
    assert "://" not in page


def test_the_plot_is_a_file_by_itself(facts):
    picture = ElementTree.fromstring(svg_file(plot(facts["rows"])))
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(picture.findall("{*}circle")) == len(facts["rows"]) - 1
    assert "--paper" in picture.find("{*}style").text


def test_a_page_escapes_what_plans_are_called(facts):
    rows = [facts["rows"][0], {**facts["rows"][1], "plan": "<b>", "method": "<i>"}]
    page = render_comparison({**facts, "rows": rows, "left_out": ["<u>"]})
    assert not re.search("<(b>: |i>|u>)", page)
    assert "&lt;b&gt;" in page
    assert "&lt;u&gt;" in page


def test_answers_are_asked_for_once(facts, folder, turns, monkeypatch):
    bundles = [Bundle.open(folder / "out" / "toy" / row["bundle"]) for row in facts["rows"]]
    monkeypatch.setattr(Session, "infer", None)
    answers = ask_bundles(bundles, turns, folder / "out" / "toy" / "answers", lambda units: None)
    assert [len(pairs) for pairs in answers] == [6] * 4


def test_what_was_answered_before_ctrl_c_is_kept(facts, folder, turns, monkeypatch, tmp_path):
    bundle = Bundle.open(folder / "out" / "toy" / facts["rows"][2]["bundle"])
    asked = []
    infer = Session.infer

    def counted(self, image, prompt, **options):
        asked.append(prompt)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return infer(self, image, prompt, **options)

    monkeypatch.setattr(Session, "infer", counted)
    with pytest.raises(KeyboardInterrupt):
        ask_bundles([bundle], turns, tmp_path, lambda units: None)
    (pairs,) = ask_bundles([bundle], turns, tmp_path, lambda units: None)
    assert len(pairs) == 6
    assert len(asked) == 5 + 2 * 4  # two pairs were complete


def test_a_question_that_fails_in_one_plan_counts_in_none(folder, turns):
    pair = Turns(turns[0].first, replace(turns[0].first, prompt="x" * 9000))
    bundle = Bundle.open(next((folder / "out" / "toy").glob("dense*")))
    (pairs,) = ask_bundles([bundle], [pair], folder / "failing", lambda units: None)
    assert pairs == [None]


def test_weights_trained_for_a_plan_stand_beside_the_models_own(folder):
    toy.make_checkpoint(folder / "tuned", scale=2.0, seed=5)
    add_routers(toy.make_checkpoint(folder / "routed", scale=2.0), "skipgpt")
    trained = ("--trained", "dense", folder / "tuned", "--trained", "skipgpt")
    options = ("--data", folder / "data.jsonl", "--repetitions", 1, "--out", folder / "out")
    arguments = ("compare", folder / "toy", *options, "--plan", "dense", *trained)
    done = run(*arguments, folder / "routed", "--json", "-q")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    stock, tuned, _ = found["rows"]
    assert [row["plan"] for row in found["rows"]] == ["dense", "dense", "skipgpt"]
    kinds = ["stock", "trained for it", "trained for it"]
    assert [row["weights"] for row in found["rows"]] == kinds
    assert stock["bundle"] == tuned["bundle"]  # of two checkpoints
    assert tuned["agreement"]["right"] < stock["agreement"]["right"]
    assert len(found["left_out"]) == 1
    assert "skipgpt, stock weights" in found["left_out"][0]
    page = (folder / "out" / "toy" / "compare.html").read_text()
    assert page.count("<small>trained for it</small>") == 2 * 2
    table = run(*arguments, folder / "routed", "-q").stdout
    assert "weights" in table
    assert table.count("trained for it") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--trained", "dense", "absent"), "absent"),
        (("--share", "0%"), "--share 25%"),
        (("--plan", "skope"), "scope"),
        (("--plan", "scope:keep=99"), "keep"),
        (("--page", "absent/compare.html"), "--page"),
        (("--data", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_a_wrong_argument_gives_one_error(folder, options, words):
    done = command(folder, *options)
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 4
    assert "Traceback" not in done.stderr


def test_a_model_without_questions_says_what_to_give(folder):
    done = run("compare", folder / "toy", "-q")
    assert done.exit_code == 2
    assert "--data" in done.stderr


# --- pairs of questions ---------------------------------------------------------------------------


def test_the_second_question_about_a_scene_is_about_other_things():
    count = 70
    seconds = list(second_questions(count))
    assert sum(second is not None for second in seconds) > 0.9 * count
    for sample, second in zip(held_out(count), seconds, strict=True):
        if second is None:
            continue
        assert second.kind != sample.kind
        assert {*second.about} <= {*sample.scene.things}
        for name in second.names:
            assert second.about
            assert name not in sample.question or second.kind == "count"
    assert seconds == list(second_questions(count))
    assert len({second.kind for second in seconds if second}) == 7


def test_the_demos_pairs_share_an_image():
    for turn in evaluation_turns("demo", None, 7):
        assert turn.second is None or turn.second.image is turn.first.image
        assert turn.first.prompt != (turn.second and turn.second.prompt)


def test_lines_about_one_image_follow_one_another(tmp_path):
    def sample(image, prompt):
        return Sample(f"{image}{prompt}", tmp_path / image, prompt, "yes")

    samples = [sample("a", "1"), sample("b", "1"), sample("a", "2"), sample("a", "1")]
    found = paired(samples)
    assert [turn.second and turn.second.name for turn in found] == ["a2", None, "a1", "a2"]


# --- rows -----------------------------------------------------------------------------------------


def heard(text, **more):
    return Heard(text=text, first_token_ms=1.0, per_token_ms=None, **more)


def test_findings_name_what_a_control_equals_and_lost_caches(facts, folder):
    (dense, compared), _ = matched_bundles(
        str(folder / "toy"), ["scope"], [0.5], out=folder / "out", progress=Progress()
    )
    first = Sample("1", folder / "0.png", "?", "yes", "reading")
    turns = [Turns(first, first), Turns(replace(first, answer="no"), None)]
    good = [(heard("Yes."), heard("yes", encoded=True)), (heard("no"), None)]
    bad = [(heard("no"), heard("no", encoded=False)), (heard("No"), None)]
    top = row_facts(dense, turns, good, good, SPREAD)
    row = row_facts(compared, turns, bad, good, SPREAD)
    assert row["accuracy"]["right"] == 1
    assert row["agreement"]["right"] == 0  # texts, not what they mean
    assert row["second"]["accuracy"] | {"right": 0, "total": 1} == row["second"]["accuracy"]
    assert findings([top, row]) == ["dense computed the image again for 1 second questions."]
    control = {**row, "method": "random", "control": True}
    assert any("random" in text for text in findings([row, row, control]))
    many = [{**row, "method": f"m{number}"} for number in range(5)]
    assert "as accurate as 5 of 5 methods." in findings([row, *many, control])[0]
    better = {**row, "accuracy": {**row["accuracy"], "share": 1.0}}
    assert not findings([row, better, control])


def test_bundles_are_timed_together_as_far_as_they_fit(facts, folder):
    bundles = [Bundle.open(folder / "out" / "toy" / row["bundle"]) for row in facts["rows"]]
    one = bundles[0].manifest.weight_bytes
    assert in_groups(bundles, 100 * one) == [bundles]
    assert in_groups(bundles, 3 * one) == [bundles[:3], [bundles[0], bundles[3]]]
    assert in_groups(bundles, 0) == [[bundles[0], other] for other in bundles[1:]]
    assert in_groups(bundles[:1], 0) == [bundles[:1]]
