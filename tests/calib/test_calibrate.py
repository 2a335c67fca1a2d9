"""``visistage calibrate`` from samples to a folder, and how it ends when something is wrong."""

import json
import re
import shutil
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from visistage import runtime
from visistage.calib import calibrate as pipeline
from visistage.calib.page.warnings import calibration_warnings
from visistage.calib.plan_search import chooser as choosing
from visistage.calib.plan_search import measure_plans as bundles
from visistage.calib.plan_search import search
from visistage.calib.plan_search.agreement import Agreement
from visistage.calib.plan_search.dynamics import Dynamics, PromptReading
from visistage.calib.plan_search.measure_plans import Origin, PlanBundles, text_blind_plans
from visistage.calib.plan_search.measured_file import MeasuredFile
from visistage.calib.plan_search.thresholds import suggest_thresholds
from visistage.calib.run.collect_ranges import calibrated_ranges
from visistage.calib.run.layerwise import run_layerwise
from visistage.calib.sample_prompts import prepare
from visistage.calib.samples import CALIBRATION_SERIES, Sample, calibration_samples
from visistage.cli.main import main
from visistage.cli.show.calibration_view import calibration_table
from visistage.cli.show.units import ShareParam
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.texts import fits, text_facts
from visistage.compile.planfile import load_plan
from visistage.compile.quantize.calibration_file import Calibration
from visistage.compile.quantize.fake_quantized import FakeQuantised
from visistage.compile.quantize.quantize import calibrated_cache_scales
from visistage.demo.heldout import held_out
from visistage.graphs.errors import DataError
from visistage.graphs.plan.stages import Entry
from visistage.graphs.presets.presets import preset
from visistage.graphs.progress import Progress
from visistage.graphs.quantization import parse_quant_config
from visistage.runtime.backends import ort
from visistage.runtime.backends.ort import int8_session_entries
from visistage.runtime.image.preprocessing import Preprocessing
from visistage.tests.support import toy
from visistage.tests.support.chain_judge import RecordingObserver, layerwise

LAYERS, TOKENS = 4, 16
PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"


def run(*arguments):
    return CliRunner().invoke(main, ["calibrate", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy checkpoint and six questions about five images, one of them broken."""
    folder = tmp_path_factory.mktemp("calibrate")
    toy.make_checkpoint(folder / "toy")
    rng = np.random.default_rng(0)
    (folder / "data").mkdir()
    lines = []
    for number in range(5):
        noise = rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "data" / f"{number}.png")
        lines.append({"image": f"{number}.png", "prompt": f"What is {number}?"})
    (folder / "data" / "3.png").write_bytes(b"no picture")
    lines.append({**lines[0], "prompt": "And what else?", "answer": "a dog"})
    text = "\n".join(map(json.dumps, lines))
    (folder / "data" / "questions.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def chosen(folder):
    """A calibration that chose its plan, as printed facts."""
    done = run(
        *(folder / "toy", "--data", folder / "data", "--out", folder / "out"),
        *("--cost", "90%", "--candidates", "2", "--json"),
    )
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_folder_holds_plan_ranges_and_page(folder, chosen):
    where = folder / "out" / "toy"
    assert chosen["path"] == str(where)
    assert sorted(file.name for file in where.iterdir()) == [
        *("calibration.html", "calibration.json", "calibration.safetensors", "plan.yaml"),
    ]
    assert [file.name for file in where.parent.glob("[!.]*")] == ["toy"]
    calibration = Calibration.load(where)
    assert calibration.hash == chosen["hash"]
    assert load_plan(where / "plan.yaml") == calibration.plan
    assert calibration.plan.calibrated
    assert calibration.rows == "stage"
    assert not calibration.groups  # fp32 needs no ranges
    assert chosen["next"] == f"visistage build {folder / 'toy'} --calib {where}"
    with pytest.raises(DataError, match=r"visistage calibrate MODEL --precision int8"):
        make_bundle(str(folder / "toy"), precision="int8", calibration=where, out=folder / "none")


def test_what_was_read_is_told_and_what_was_not_is_named(chosen):
    samples = chosen["samples"]
    assert samples["files"] == ["questions.jsonl"]
    assert [name.partition(":")[2] for name in samples["names"]] == ["1", "2", "3", "5", "6"]
    (broken,) = samples["unreadable"]
    assert broken["sample"] == "questions.jsonl:4"
    assert "3.png" in broken["reason"]
    assert "/" not in broken["reason"].partition("3.png")[0]  # no folder of this machine


def test_the_choice_was_measured_on_some_and_confirmed_on_others(chosen):
    choice = chosen["choice"]
    assert choice["budget"] == {"cost": 0.9}
    assert choice["samples"]["choosing"] + choice["samples"]["held_out"] == 5
    assert choice["samples"]["held_out"] >= 1
    assert 1 <= len(choice["candidates"]) <= 2
    taken = choice["candidates"][choice["chosen"]]
    assert taken["first_ms"] > 0
    assert {"first_ms", "second_ms"} == {*choice["dense"]}
    assert taken["cost"] <= 0.9
    assert taken["held_out"]["prompts"] == choice["samples"]["held_out"]
    assert chosen["plan"] == choice["plan"]
    assert [row["shallow"] for row in chosen["dynamics"]["text_blind"]] == [1]
    assert chosen["dynamics"]["prompts"] == choice["samples"]["choosing"]
    assert chosen["dynamics"]["layers"] == LAYERS


def test_what_was_measured_outlives_a_run_that_ends_early(folder, tmp_path, monkeypatch):
    noise = np.random.default_rng(3).integers(0, 256, (40, 40, 3), np.uint8)
    samples = [Sample("x:1", Image.fromarray(noise), "Why?", "")] * 2
    dense = preset("dense", LAYERS, TOKENS)
    answers, found = {}, []
    for run in range(3):
        file = MeasuredFile(tmp_path / "measured.json", ["checkpoint", run // 2])
        measuring = PlanBundles(Origin(str(folder / "toy")), tmp_path / "work", measured=file)
        if not answers:
            measuring.refer(dense, samples, [1], 3)
            answers = {name: getattr(measuring, name) for name in ("_choosing", "_held")}
        vars(measuring).update(answers)
        if run:
            monkeypatch.setattr(bundles, "make_bundle", _not_again)
        if run == 2:
            with pytest.raises(AssertionError, match="built again"):  # another checkpoint
                measuring.measure(dense)
            break
        found.append((measuring.measure(dense), measuring.confirm(dense)))
    assert found[0] == found[1]
    (tmp_path / "measured.json").write_text("[")
    assert MeasuredFile(tmp_path / "measured.json", []).find("x", Agreement) is None


def _not_again(*_args, **_options):
    raise AssertionError("built again")


def test_a_measured_agreement_is_that_of_the_real_bundle(folder, tmp_path):
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(3)]
    samples = [Sample(str(i), image, "Why?", "") for i, image in enumerate(images)]
    measuring = PlanBundles(Origin(str(folder / "toy")), tmp_path / "work")
    dense = preset("dense", LAYERS, TOKENS)
    measuring.refer(dense, samples, [2], 5)
    same = measuring.measure(dense)
    assert same.tokens.share == same.answers.share == 1.0
    assert same.answers.total == 2
    assert measuring.confirm(dense).answers.total == 1
    assert not (tmp_path / "work").exists()

    plan = preset("visipruner", LAYERS, TOKENS, shallow=1, t=1, e=2, keep=1)
    found = measuring.measure(plan)
    bundles = [
        make_bundle(str(folder / "toy"), plan=text, out=tmp_path / "by hand")
        for text in ("dense", "visipruner:shallow=1,t=1,e=2,keep=1")
    ]
    with runtime.load(bundles[0].path) as one, runtime.load(bundles[1].path) as other:
        said = [one.infer(s.image, s.prompt, max_tokens=5).tokens for s in samples[:2]]
        scores = [
            other.score(s.image, s.prompt, tokens[:-1])
            for s, tokens in zip(samples, said, strict=False)
        ]
    right = [
        list(score.argmax(-1)) == list(tokens) for score, tokens in zip(scores, said, strict=True)
    ]
    assert found.answers.right == sum(right)


def builds(patch):
    """Plan, precision and ranges of each bundle that is built from now on, as they come."""
    built = []

    def spy(*arguments, plan, precision, calibration, **options):
        bundle = make_bundle(
            *arguments, plan=plan, precision=precision, calibration=calibration, **options
        )
        used = None if calibration is None else Calibration.load(calibration)
        built.append((load_plan(plan), precision, used))
        return bundle

    patch.setattr(bundles, "make_bundle", spy)
    return built


def test_an_entry_is_chosen_after_an_interruption_and_a_build_takes_it(
    folder, tmp_path, monkeypatch
):
    """At this cost nothing else is left: one layer with all tokens would take a quarter."""
    arguments = (
        *(folder / "toy", "--data", folder / "data", "--out", tmp_path, "--json"),
        *("--cost", "20%", "--candidates", "3", "--selectors", "scope,divprune"),
    )
    built = builds(monkeypatch)
    spy = bundles.make_bundle

    def stop(*args, **options):
        if load_plan(options["plan"]).name == "divprune-keep3":
            raise KeyboardInterrupt
        return spy(*args, **options)

    monkeypatch.setattr(bundles, "make_bundle", stop)
    assert run(*arguments).exit_code == 130
    names = ["dense", "text-blind-1", "visipruner", "scope-keep3"]
    assert [plan.name for plan, _, _ in built] == names

    monkeypatch.setattr(bundles, "make_bundle", spy)
    built.clear()
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert [plan.name for plan, _, _ in built] == ["dense", "divprune-keep3"]
    facts = json.loads(done.stdout)
    calibration = Calibration.load(facts["path"])
    assert calibration.plan.entry in (Entry("scope", 3), Entry("divprune", 3))
    assert calibration.choice == facts["choice"]
    assert load_plan(Path(facts["path"]) / "plan.yaml") == calibration.plan
    console = Console(width=200, record=True, file=StringIO())
    console.print(calibration_table(Path(facts["path"]), calibration, ""))
    shown = console.export_text()
    assert re.search(rf"{calibration.choice['text']} .* 18\.\d.* %.* chosen", shown)
    assert f"{calibration.plan.entry.selector} alone: 3 visual tokens of an image enter" in shown
    bundle = make_bundle(str(folder / "toy"), calibration=facts["path"], out=tmp_path / "engines")
    assert bundle.manifest.plan == calibration.plan


@pytest.mark.slow
def test_fewer_layers_are_chosen_and_ship_in_int8(folder, tmp_path, monkeypatch):
    """A layer that adds next to nothing is left out; rounding costs a random model most tokens."""
    model = shutil.copytree(folder / "toy", tmp_path / "toy")
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if "layers.2." in name and ("o_proj" in name or "down_proj" in name):
            weights[name] *= 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(search, "published_candidate", lambda dynamics, pricing: None)
    done = run(
        *(model, "--data", folder / "data", "--out", tmp_path / "out", "--json"),
        *("--lose", "90%", "--depth", "--no-entry", "--candidates", "1", "--precision", "int8"),
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    (tried,) = facts["choice"]["candidates"]
    assert (facts["choice"]["text"], tried["text"]) == ("depth:drop=2", "depth:drop=2")
    assert tried["first_ms"] > 0
    assert tried["second_ms"] > 0
    assert "depth:drop=2" in (Path(facts["path"]) / "calibration.html").read_text()
    given = {"calibration": facts["path"], "precision": "int8", "out": tmp_path / "engines"}
    bundle = make_bundle(str(model), **given)
    assert bundle.manifest.plan.dropped == (("attention", 2), ("mlp", 2))
    with runtime.load(bundle.path) as session:
        assert session.infer(folder / "data" / "0.png", "What is 0?", max_tokens=3).tokens


@pytest.fixture(scope="module")
def rounded(folder, tmp_path_factory):
    """A calibration chosen for int8, as printed; its bundles."""
    out = tmp_path_factory.mktemp("rounded")
    with pytest.MonkeyPatch.context() as patch:
        built = builds(patch)
        done = run(
            *(folder / "toy", "--data", folder / "data", "--out", out, "--precision", "int8"),
            *("--cost", "20%", "--candidates", "2", "--selectors", "scope", "--json"),
        )
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), built


@pytest.mark.slow
def test_a_plan_for_int8_is_chosen_on_bundles_in_int8(rounded):
    facts, built = rounded
    (first, precision, nothing), *others = built
    assert (first.name, precision, nothing) == ("dense", "fp32", None)
    assert {precision for _, precision, _ in others} == {"int8"}
    assert all(used.plan == plan for plan, _, used in others)
    *measured, shipped = others
    assert [used.rows for _, _, used in measured] == ["dense"] * 4  # dense, text-blind, 2 plans
    ranges = [
        {name: group.facts() for name, group in used.groups.items()} for _, _, used in measured
    ]
    assert ranges[0] == ranges[1] == ranges[2] == ranges[3]
    assert measured[0][2].samples.count == facts["choice"]["samples"]["choosing"]

    calibration = Calibration.load(facts["path"])
    plan, _, used = shipped
    assert (plan, used.rows) == (calibration.plan, "stage")
    assert plan.entry == Entry("scope", 3)  # at this cost nothing else is left
    assert {name: group.facts() for name, group in used.groups.items()} == {
        name: group.facts() for name, group in calibration.groups.items()
    }


def test_a_choice_for_int8_says_so_and_what_ships(rounded):
    facts, _ = rounded
    choice = facts["choice"]
    assert choice["precision"] == "int8"
    assert choice["rounding"]["prompts"] == choice["samples"]["choosing"]
    assert choice["shipped"]["samples"] == "held_out"
    assert choice["shipped"]["prompts"] == choice["samples"]["held_out"]
    assert choice["reasons"]["precision"].startswith("int8: every plan was measured in it")
    assert facts["next"].endswith(f"/toy --precision int8 --calib {facts['path']}")
    share = f"{100 * choice['shipped']['tokens']['share']:.1f}"
    folder = Path(facts["path"])
    page = (folder / "calibration.html").read_text()
    assert "As it ships, in int8" in page
    assert "rounded as in int8" in page
    console = Console(width=200, record=True, file=StringIO())
    console.print(calibration_table(folder, Calibration.load(folder), ""))
    assert f"as it ships, int8: {share} %" in console.export_text()
    assert sorted(one.name for one in folder.iterdir()) == [
        *("calibration.html", "calibration.json", "calibration.safetensors", "plan.yaml"),
    ]


def test_what_ships_and_loses_more_than_it_may_is_a_warning(rounded):
    facts, _ = rounded
    calibration = Calibration.load(facts["path"])

    def doubted(lose):
        choice = {
            **calibration.choice,
            "budget": {"lose": lose},
            "shipped": {"tokens": {"share": 0.9, "total": 50}},
            "rounding": {"tokens": {"share": 0.95, "total": 80}},
        }
        return [
            one
            for one in calibration_warnings(replace(calibration, choice=choice))
            if "As it ships" in one
        ]

    (warning,) = doubted(0.02)
    assert re.search(r"in int8, the plan loses 10\.0\W+% of 50 tokens; the budget is 2\.0", warning)
    assert re.search(r"choosing samples rounding alone loses 5\.0\W+% of 80", warning)
    assert not doubted(0.1)


@pytest.mark.parametrize(
    "precision",
    ["int8", "w8", "w4:vision=w8", "fp32:cache=int8", "int8:cache=int8", "w8:cache=int8"],
)
def test_a_quantised_layerwise_run_computes_what_the_rounded_bundle_does(
    folder, tmp_path, precision, monkeypatch
):
    # By itself ONNX Runtime also rounds inputs where weights alone are rounded, as it runs.
    entries = {**int8_session_entries(), "session.qdq_matmulnbits_accuracy_level": "1"}
    monkeypatch.setattr(ort, "int8_session_entries", lambda: entries)
    checkpoint = open_checkpoint(str(folder / "toy"))
    texts, dense = text_facts(checkpoint), preset("dense", LAYERS, TOKENS)
    rng = np.random.default_rng(2)
    images = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(2)]
    samples = [Sample(str(i), image, "Why?", "") for i, image in enumerate(images)]
    prompts, _ = prepare(
        samples, texts.encoder, Preprocessing.from_dict(texts.preprocessing), checkpoint.config
    )
    facts = fits(checkpoint, texts)
    calibration = calibrated_ranges(
        checkpoint, facts, prompts, dense, texts.prefix_ids, rows="dense", progress=Progress()
    )
    calibration.save(tmp_path / "ranges")
    model = FakeQuantised(checkpoint, parse_quant_config(precision), calibration)
    asked = [replace(one, answer_ids=()) for one in prompts]
    exact, near = (
        [
            one[0].numpy()
            for one in layerwise(
                checkpoint, asked, dense, texts.prefix_ids, fake_quantised=by
            ).logits
        ]
        for by in (None, model)
    )
    bundle = make_bundle(
        str(folder / "toy"),
        plan="dense",
        precision=precision,
        calibration=tmp_path / "ranges",
        out=tmp_path,
    )
    with runtime.load(bundle.path) as session:
        for sample, float_one, rounded_one in zip(samples, exact, near, strict=True):
            ran = session.score(sample.image, sample.prompt, ())[0]
            apart = np.abs(ran - float_one).max()
            # Equal to 1e-4, unless a value that lies between two integers goes the other way.
            assert np.abs(ran - rounded_one).max() < apart / 4


@pytest.mark.slow
def test_dynamics_of_an_int8_cache_are_read_from_one(folder, tmp_path, monkeypatch):
    """Under the scales that candidates share; what thresholds are suggested follows from them."""
    built, seen = builds(monkeypatch), []

    def spy(checkpoint, prompts, plan, prefix, **options):
        seen.append((checkpoint, prompts, plan, prefix, options["fake_quantised"]))
        return run_layerwise(checkpoint, prompts, plan, prefix, **options)

    def dynamics(checkpoint, prompts, plan, prefix, rounded):
        observer = RecordingObserver(reads=True)
        run_layerwise(checkpoint, prompts, plan, prefix, observer=observer, fake_quantised=rounded)
        return Dynamics.of([PromptReading(*both) for both in observer.by_prompt().values()])

    monkeypatch.setattr(choosing.layerwise, "run_layerwise", spy)
    done = run(
        *(folder / "toy", "--data", folder / "data", "--out", tmp_path, "--candidates", "1"),
        *("--precision", "fp32:cache=int8", "--cost", "90%", "--json"),
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)["dynamics"]
    (given,) = seen
    *whose, fake_quantised = given
    assert len(whose[1]) == facts["prompts"]
    assert len(built) == 5  # dense twice, text-blind, a candidate, and as it ships
    for _, _, used in built[1:4]:
        scales = calibrated_cache_scales(used, half=False)
        for layer in range(LAYERS):
            assert np.array_equal(np.stack(fake_quantised.scales_of(layer)), scales[:, layer])
    exact, near = (dynamics(*whose, by) for by in (None, fake_quantised))
    assert facts["min_cosine"] == near.to_dict()["min_cosine"] != exact.to_dict()["min_cosine"]
    assert facts["suggested"] == asdict(suggest_thresholds(near))


def test_a_named_plan_is_calibrated_without_a_bundle(folder, tmp_path, monkeypatch):
    def reject(*_args, **_options):
        raise AssertionError("a bundle was built")

    monkeypatch.setattr("visistage.calib.plan_search.measure_plans.make_bundle", reject)
    done = run(folder / "toy", "--data", folder / "data", "--plan", PLAN, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    calibration = Calibration.load(tmp_path / "toy")
    assert calibration.plan == preset("visipruner", LAYERS, TOKENS, shallow=1, t=1, e=2, keep=4)
    assert (calibration.choice, calibration.dynamics) == ({}, {})
    assert calibration.groups
    assert f"then: visistage build {folder / 'toy'} --precision int8" in done.stdout
    assert "1 samples could not be used" in done.stdout


def test_the_same_samples_give_the_same_calibration(folder, tmp_path):
    arguments = (folder / "toy", "--data", folder / "data", "--plan", PLAN, "--json", "--out")
    one, other = (json.loads(run(*arguments, tmp_path / name).stdout) for name in ("a", "b"))
    assert one["hash"] == other["hash"]
    fewer = json.loads(run(*arguments, tmp_path / "c", "--samples", 2).stdout)
    assert fewer["hash"] != one["hash"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_end_in_the_middle_leaves_what_was_there_before(folder, tmp_path, monkeypatch, error):
    arguments = (folder / "toy", "--data", folder / "data", "--plan", PLAN, "--out", tmp_path)
    assert run(*arguments).exit_code == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "toy").iterdir()}

    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(pipeline, "write_report", fail)
    done = run(*arguments)
    assert done.exit_code == (130 if error is KeyboardInterrupt else 1)
    assert [file.name for file in tmp_path.glob("[!.]*")] == ["toy"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "toy").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lose", "1%", "--cost", "50%"), "expected one of the two"),
        (("--plan", PLAN, "--lose", "1%"), "found --lose beside --plan"),
        (("--plan", PLAN, "--candidates", "3"), "found --candidates beside --plan"),
        (("--plan", PLAN, "--precision", "int8"), "found --precision beside --plan"),
        (("--plan", PLAN, "--no-entry"), "found --no-entry beside --plan"),
        (("--selectors", "scoop"), "found 'scoop', expected names among scope"),
        (("--selectors", "scope", "--no-entry"), "found --no-entry beside --selectors"),
        (("--precision", "fp16"), "leave --precision out"),
        (("--precision", "int8:stage1=w4"), "names stage1, but which stages"),
        (("--precision", "int8:visio=w4"), "unknown option 'visio'"),
        (("--plan", "visipruner-adaptive"), "decides per prompt"),
        (("--plan", "visiprune"), "Did you mean 'visipruner'"),
        (("--lose", "100%"), "expected 0 % to below 100 %"),
        (("--lose", "half"), "is no share"),
        (("--lose", "5"), "Write one like 1% or 0.01"),
        (("--holdout", "1"), "expected 0 to below 1"),
        (("--samples", "1"), "found 1 image"),
    ],
)
def test_what_cannot_be_honoured_is_one_error_and_leaves_nothing(
    folder, tmp_path, arguments, words
):
    done = run(folder / "toy", "--data", folder / "data", "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.glob("out/[!.]*"))


def test_a_model_without_samples_of_its_own_asks_for_them(tmp_path):
    done = run(tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "--data questions.jsonl" in done.output


def test_text_blind_plans_do_nothing_else():
    plans = text_blind_plans(32, 576)
    assert list(plans) == [2, 4, 6, 8]
    assert text_blind_plans(1, 576) == {}
    for shallow, plan in plans.items():
        (stage,) = plan.stages
        assert stage.modes[:shallow] == ("sink", *("text_blind",) * (shallow - 1))
        assert set(stage.modes[shallow:]) == {"dense"}
        assert stage.visual_tokens == 576


def test_the_demo_is_not_calibrated_on_what_evaluations_ask():
    asked, seen = (
        {(repr(made.scene), made.question) for made in held_out(count, series, size=8)}
        for count, series in ((2000, 0), (512, CALIBRATION_SERIES))
    )
    assert len(seen) > 500
    assert not asked & seen
    samples, files = calibration_samples("demo", None, 3)
    assert files == (f"demo scenes, series {CALIBRATION_SERIES}",)
    assert [one.name for one in samples] == ["scene 0", "scene 1", "scene 2"]
    assert [one.prompt for one in samples] == [
        made.question for made in held_out(3, CALIBRATION_SERIES)
    ]


def test_shares_are_typed_as_people_write_them():
    read = [
        ShareParam().convert(text, None, None) for text in ("1%", "0.5 %", "0.01", ".5", "100%")
    ]
    assert read == pytest.approx([0.01, 0.005, 0.01, 0.5, 1.0])
