"""The command line, from a build to an answer, and how it ends when something is wrong."""

import inspect
import io
import json
import logging
import os
import shutil
import subprocess
import sys

import click
import numpy as np
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from PIL import Image
from visistage import runtime
from visistage.cli.main import main
from visistage.cli.options import split_words
from visistage.cli.show.answer_view import savings
from visistage.cli.show.bar import StepBar, build_line
from visistage.compile.build import make_bundle
from visistage.compile.known_builds import known_build, note_build, request_key
from visistage.graphs.bundle import BUNDLE_VARIABLE, Bundle, bundles_in
from visistage.graphs.errors import BundleError, VisistageError
from visistage.graphs.progress import StepFact
from visistage.pages.units import show_bytes, show_seconds
from visistage.runtime import oneshot as shared
from visistage.runtime.answer import PlanFacts
from visistage.tests.support import toy

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"


def run(*arguments, **options):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


def ok(*arguments, **options):
    done = run(*arguments, **options)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy checkpoint, an image, and the output of the build in ``engines``."""
    folder = tmp_path_factory.mktemp("cli")
    toy.make_checkpoint(folder / "toy")
    noise = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def built(folder):
    return ok("engines", "--model", folder / "toy", "--plan", PLAN, "--out", folder / "engines")


@pytest.fixture
def at(folder, built, monkeypatch):
    """The folder as working directory, with its one bundle in ./engines."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv(BUNDLE_VARIABLE, raising=False)
    return folder


# --- engines --------------------------------------------------------------------------------------


def test_a_build_tells_every_step_and_ends_with_the_path(folder, built):
    path = built.stdout.splitlines()[-1]
    assert (Bundle.open(path).path / "manifest.json").is_file()
    assert path.startswith(str(folder / "engines"))
    steps = [line.split()[0] for line in built.stderr.splitlines()]
    assert steps[:2] == ["building", "weights"]
    assert "manifest" in steps
    assert "peak memory" in built.stderr


def test_a_second_build_finds_the_first(folder, built):
    again = ok(
        *("engines", "--model", folder / "toy", "--plan", PLAN),
        *("--out", folder / "engines", "--json"),
    )
    facts = json.loads(again.stdout)
    assert facts["path"] == built.stdout.splitlines()[-1]
    assert facts["steps"] == []
    assert facts["peak_memory_bytes"] > 10 << 20
    assert "already built" in again.stderr


def test_options_of_engines_are_the_arguments_of_build():
    arguments = set(inspect.signature(make_bundle).parameters) - {"progress", "model"}
    options = {option.name for option in main.commands["engines"].params if option.expose_value}
    options -= {"as_json", "subject", "model_option"}
    # Engines are not build's business, and kept layers go into the precision.
    assert options - {"capabilities", "keep_float", "portable"} == arguments


def test_plain_progress_is_one_line_a_step(capsys):
    with StepBar(build_line) as progress:
        progress.start("weights", 10)
        progress.advance(4)
        progress.done(StepFact("weights", 61.2, nbytes=2048))
        progress.done(StepFact("[bold]", 0.0, cached=True))
        progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].split() == ["weights", "done", "1", "min", "1", "s", "2.0", "KiB"]
    assert lines[1].split()[:2] == ["[bold]", "cached"]
    assert len(lines) == 3


def test_a_request_that_was_built_is_found_without_torch(folder, built):
    code = (
        "import sys\nfrom visistage.cli.main import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch', 'onnx', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = ["build", str(folder / "toy"), "--plan", PLAN, "--out", str(folder / "engines")]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == built.stdout
    assert "already built" in done.stderr


def test_a_known_build_is_the_same_request_and_the_same_bundle(folder, built, tmp_path):
    toy = tmp_path / "toy"
    shutil.copytree(folder / "toy", toy)
    plan = tmp_path / "mine.json"
    plan.write_text("{}")
    request = {"model": str(toy), "plan": str(plan), "target": "cpu", "calibration": None}
    keys = [request_key(request), request_key(request)]
    keys.append(request_key({**request, "target": "cuda"}))
    plan.write_text("{ }")
    keys.append(request_key(request))
    (toy / "config.json").write_text((toy / "config.json").read_text() + " ")
    keys.append(request_key(request))
    assert len(set(keys)) == 4
    assert keys[0] == keys[1]
    assert request_key({"model": "org/name"}) is None
    out = tmp_path / "engines"
    shutil.copytree(folder / "engines", out)
    bundle = Bundle.open(out)
    note_build(out, "key", bundle)
    assert known_build(out, "key").path == bundle.path
    assert known_build(out, "other") is None
    noted = (out / ".builds.json").read_text()
    outside = noted.replace("toy/", "../")
    for hostile in ("[]", "{", '{"key": 1}', '{"key": ["../x", "y"]}', outside):
        (out / ".builds.json").write_text(hostile)
        assert known_build(out, "key") is None
    (out / ".builds.json").write_text(noted)
    next(bundle.path.glob("stage0*.onnx")).write_bytes(b"changed")
    assert known_build(out, "key") is None


def test_build_finishes_bundles_and_builds_models(at):
    path = str(Bundle.open("engines").path)
    for name in (path, "toy/" + PLAN.partition(":")[0], "engines", ()):
        done = ok("build", *([name] if name else []))
        assert done.stdout.strip() == path
        assert "already built" in done.stderr
    assert "whose plan was decided" in run("build", path, "--plan", "dense").stderr
    assert run("build", path, "--sm", "86").exit_code == 2


# --- names ----------------------------------------------------------------------------------------


@pytest.fixture
def several(at, tmp_path, monkeypatch):
    """Three bundles in ./engines: of toy the newer one is dense by its name."""
    (bundle,) = bundles_in(at / "engines")
    names = ("other/visipruner-fp32-cpu", "toy/visipruner-fp32-cpu", "toy/dense-fp32-cpu")
    for age, name in enumerate(names):
        shutil.copytree(bundle, tmp_path / "engines" / name)
        os.utime(tmp_path / "engines" / name / "manifest.json", (10**9 + age, 10**9 + age))
    (tmp_path / "toy").mkdir()  # no bundle, in the way of the name
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found", "note"),
    [
        (None, "toy/dense-fp32-cpu", "newest of 3 bundles"),
        ("engines", "toy/dense-fp32-cpu", "newest of 3 bundles"),
        ("toy", "toy/dense-fp32-cpu", "newest of 2 bundles"),
        ("other", "other/visipruner-fp32-cpu", ""),
        ("toy/visipruner", "toy/visipruner-fp32-cpu", ""),
        ("toy/dense-fp32", "toy/dense-fp32-cpu", ""),
        ("engines/toy/dense-fp32-cpu", "toy/dense-fp32-cpu", ""),
    ],
)
def test_bundles_have_short_names(several, name, found, note):
    done = ok("inspect", *([name] if name else []), "--json")
    assert json.loads(done.stdout)["path"] == f"engines/{found}"
    assert f"bundle engines/{found}" in done.stderr
    assert note in done.stderr
    if name is not None:
        assert ok("inspect", "--bundle", name, "--json").stdout == done.stdout
    assert not ok("inspect", *([name] if name else []), "--json", "-q").stderr


@pytest.mark.parametrize("name", ["toy/fast", "to", "../engines/toy/d", "nowhere"])
def test_other_names_are_none(several, name):
    done = run("inspect", name)
    assert done.exit_code == 2
    assert f"no bundle at {name}" in done.stderr or f"no bundle in {name}" in done.stderr
    assert "./engines has toy/dense-fp32-cpu, toy/visipruner-fp32-cpu" in done.stderr


def test_list(several):
    facts = json.loads(ok("list", "--json").stdout)
    assert facts[0]["name"] == "toy/dense-fp32-cpu"
    assert facts[0]["plan"].startswith("visipruner")
    (several / "engines" / "other" / "visipruner-fp32-cpu" / "manifest.json").write_text("{}")
    table = ok("list").stdout
    assert "toy/visipruner-fp32-cpu" in table
    assert "has format" in table
    assert "no bundle in" in ok("list", "nowhere").stdout


# --- infer ----------------------------------------------------------------------------------------


def test_the_answer_is_stdout_and_the_table_stderr(at):
    streamed = ok("infer", "photo.png", "What is this?", "--max-tokens", 5)
    whole = ok("infer", "photo.png", "What is this?", "--max-tokens", 5, "--no-stream")
    assert streamed.stdout.strip() == whole.stdout.strip()
    for row in ("preprocess", "vision", "stage0", "select0", "first token", "total", "16 visual"):
        assert row in streamed.stderr
    assert "4 kept" in streamed.stderr
    assert "less visual computing" in streamed.stderr


def test_the_answer_as_json(at):
    facts = json.loads(ok("infer", "photo.png", "What?", "--max-tokens", 5, "--json").stdout)
    with runtime.load("engines") as session:
        answer = session.infer("photo.png", "What?", max_tokens=5)
    assert facts["tokens"] == list(answer.tokens)
    assert facts["text"] == answer.text
    assert facts["plan"]["visual_tokens"] == 16
    assert len(facts["plan"]["kept"]) == 4
    assert 0 < facts["savings"]["visual_flops_percent"] < 100


def test_several_images_none_and_stdin(at):
    def tokens(*arguments, **options):
        done = ok("infer", *arguments, "--max-tokens", 4, "--json", **options)
        facts = json.loads(done.stdout)
        return facts["plan"]["visual_tokens"], facts["tokens"]

    image = (at / "photo.png").read_bytes()
    two = tokens("photo.png", "photo.png", "What?")
    assert two[0] == 32
    assert tokens("What?")[0] == 0
    assert tokens("-", "What?", input=io.BytesIO(image)) == tokens("photo.png", "What?")


def test_sampling_options_reach_the_session(at):
    def text(*options):
        return ok("infer", "photo.png", "Say.", "--max-tokens", 12, *options).stdout

    hot = ("--temperature", 5, "--seed", 3)
    assert text(*hot) == text(*hot)
    assert text(*hot) != text()
    assert text(*hot, "--top-k", 1) == text()


@pytest.mark.parametrize(
    ("words", "given", "images", "question"),
    [
        (["What?"], None, [], "What?"),
        (["photo.png", "What?"], None, ["photo.png"], "What?"),
        (["What?", "photo.png", "photo.png"], None, ["photo.png"] * 2, "What?"),
        (["-", "What?"], None, ["-"], "What?"),
        (["photo.png", "-"], None, ["photo.png"], "from stdin"),
        (["engines", "photo.png", "What?"], "engines", ["photo.png"], "What?"),
        (["toy", "What?", "photo.png"], "toy", ["photo.png"], "What?"),
    ],
)
def test_words_are_told_apart(at, monkeypatch, words, given, images, question):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from stdin\n")))
    assert split_words(words, None) == (given, images, question)


@pytest.mark.parametrize("words", [["photo.png"], ["no.png", "What?"], ["a", "b", "photo.png"]])
def test_words_that_cannot_be_told_apart(at, words):
    with pytest.raises(click.UsageError):
        split_words(words, None)


def test_new_tokens_are_tokens(at):
    facts = json.loads(ok("infer", "Say.", "--max-new-tokens", 3, "--json").stdout)
    assert len(facts["tokens"]) == 3


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("build", "--target", ""), "orin-jp72"),
        (("build", "de"), "demo"),
        (("plan", "visipruner:k"), "visipruner:keep="),
        (("estimate", "demo", "--device", "h"), "h200"),
        (("inspect", ""), "toy/visipruner"),
        (("infer", "--backend", ""), "openvino"),
    ],
)
def test_completion(at, words, offered):
    *before, last = words
    completion = ShellComplete(main, {}, "visistage", "_VISISTAGE_COMPLETE")
    assert any(item.value.startswith(offered) for item in completion.get_completions(before, last))


def test_a_forgotten_question_is_noticed(at):
    done = run("infer", "photo.png")
    assert done.exit_code == 2
    assert "no question" in done.stderr


def test_savings_count_all_images_before_the_selection(at):
    manifest = Bundle.open("engines").manifest
    plan = manifest.plan
    first, middle = (stage.depth for stage in plan.stages[:2])
    rest = plan.layers - first - middle

    def facts(images):
        layers = (16 * images,) * first + (4,) * middle + (0,) * rest
        return PlanFacts(plan.name, first - 1, 0, 16 * images, 30 + 16 * images, None, layers)

    assert savings(manifest, facts(0)) is None
    one, two = (savings(manifest, facts(n)) for n in (1, 2))
    # The 4 that are kept are kept of all: with more images, less of the whole is left.
    assert one["visual_flops_percent"] < two["visual_flops_percent"]


# --- plan, inspect, evaluate, doctor --------------------------------------------------------------


def test_plan_shows_the_reference_and_reads_back_its_yaml(tmp_path):
    assert "37.56 %" in ok("plan", "visipruner").stdout  # docs/methods.md, "Published cost figures"
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(ok("plan", "visipruner", "--yaml").stdout)
    mine, preset = (json.loads(ok("plan", p, "--json").stdout) for p in (yaml, "visipruner"))
    assert mine == preset


def test_plan_for_other_models(folder):
    def facts(*arguments):
        return json.loads(ok("plan", *arguments, "--json").stdout)

    thirteen = facts("dense", "--model", "llava-13b")
    assert thirteen["stages"][0]["layers"] == [0, 40]
    assert facts("dense", "--model", folder / "toy")["visual_tokens"] == 16
    other = facts("dense", "--layers", 8, "--visual-tokens", 144)
    assert (other["stages"][0]["layers"], other["visual_tokens"]) == ([0, 8], 144)
    graphs = facts("visipruner", "--accounting", "graphs")
    assert graphs["reduction_percent"]["visual_macs"] != pytest.approx(
        facts("visipruner", "--accounting", "paper")["reduction_percent"]["visual_macs"], abs=0.1
    )


def test_plan_alone_lists_the_presets():
    assert "pyramiddrop" in ok("plan").stdout
    assert "keep" in json.loads(ok("plan", "--json").stdout)["visipruner"]["options"]


def test_inspect(at):
    table = ok("inspect").stdout
    for word in ("visipruner", "stage2", "write_index", "gates", "toy"):
        assert word in table
    facts = json.loads(ok("inspect", "engines", "--json").stdout)
    manifest = Bundle.open("engines").manifest
    text = manifest.config.text
    row = 2 * text.kv_heads * text.head_dim * 4
    assert facts["stages"][0]["kv_bytes_per_row"] == 2 * row
    rows = facts["prefix_rows"] + 4 + facts["question_rows"]
    assert facts["stages"][1]["kv_bytes_per_prompt"] == row * rows
    assert facts["graphs"]["vision"]["inputs"][0]["name"] == "pixels"
    assert facts["bundle_bytes"] >= facts["weight_bytes"] > 0


def test_evaluate(at):
    answer = json.loads(ok("infer", "photo.png", "What?", "--max-tokens", 8, "--json").stdout)
    lines = [
        {"image": "photo.png", "prompt": "What?", "answer": answer["text"].upper(), "type": "a"},
        {"image": "photo.png", "prompt": "What?", "answer": "certainly not this", "type": "b"},
        {"image": "missing.png", "prompt": "What?", "answer": "x"},
    ]
    (at / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("evaluate", "engines", "--data", "data.jsonl", "--max-tokens", 8)
    facts = json.loads(ok(*arguments, "--json").stdout)
    assert {name: tally["right"] for name, tally in facts["by_type"].items()} == {"a": 1, "b": 0}
    assert facts["unreadable"][0]["sample"].endswith("data.jsonl:3")
    table = ok(*arguments).stdout
    assert "50.0 %" in table
    assert "1 samples could not be asked" in table
    assert not list(at.glob("*.partial.jsonl"))
    first = json.loads(ok(*arguments, "--out", "answers.jsonl", "--json").stdout)
    assert len((at / "answers.jsonl").read_text().splitlines()) == 2
    again = ok(*arguments, "--out", "answers.jsonl", "--json")
    assert json.loads(again.stdout)["misses"] == first["misses"]
    assert "2 of 2 answers are in answers.jsonl already" in again.stderr
    rejected = run("evaluate", "engines")
    assert rejected.exit_code == 2
    assert "--data" in rejected.stderr


def test_a_sample_that_cannot_be_asked_is_named_before_the_others_are(at):
    lines = [
        {"image": "photo.png", "prompt": "<image>\nWhat?", "answer": "x"},
        {"image": "photo.png", "prompt": "What?", "answer": "x"},
        {"image": "photo.png", "prompt": "What? " * 4000, "answer": "x"},
    ]
    (at / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = ok("evaluate", "engines", "--data", "mixed.jsonl", "--max-tokens", 2)
    assert "1 of 3 samples cannot be asked" in done.stderr
    assert "mixed.jsonl:1: the prompt contains the image token" in done.stderr
    assert "2 samples could not be asked" in done.stdout
    assert "mixed.jsonl:3" in done.stdout


def test_doctor():
    facts = json.loads(ok("doctor", "--json").stdout)
    assert facts["targets"]["cpu"] == {"build": True, "run": True, "missing": []}
    assert facts["targets"]["openvino"] == {"build": True, "run": True, "missing": []}
    h100 = facts["targets"]["h100"]
    assert not h100["build"]
    assert "tensorrt is not installed" in h100["missing"][0]
    table = ok("doctor").stdout
    assert "onnxruntime" in table
    assert "orin-jp72" in table


# --- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "nope"], "error: preset: found 'nope'"),
        (["plan", "dense", "--model", "nowhere"], "config.json"),
        (["inspect", "nowhere"], "no bundle at nowhere"),
        (["infer", "y", "--bundle", "nowhere"], "no bundle at nowhere"),
        (["infer", "x.png", "y"], "no file: 'x.png' and 'y'"),
        (["build", "demo", "--model", "demo"], "Name one of them"),
        (["build", "demo", "--target", "toaster"], "none of cpu, cpu-portable"),
        (["engines", "--model", "demo", "--target", "openvino", "--precision", "w4"], "w4"),
        (["infer", "x", "--memory-limit", "4 parsecs"], "4GiB"),
        (["engines"], "--model"),
        (["nope"], "No such command"),
    ],
)
def test_what_the_user_can_mend_exits_with_2(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_traceback_shows_where_from():
    done = run("--traceback", "plan", "nope")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "PlanError" in done.stderr


@pytest.fixture
def failing(monkeypatch):
    """``doctor`` fails with the given error."""

    def fail(error):
        def doctor_table():
            raise error

        monkeypatch.setattr("visistage.cli.show.doctor_view.doctor_table", doctor_table)
        return run("doctor")

    return fail


def test_an_interruption_says_how_to_go_on(failing):
    done = failing(KeyboardInterrupt())
    assert done.exit_code == 130
    assert "interrupted; run the same command again to go on" in done.stderr


def test_an_own_exit_code_counts(failing):
    assert failing(VisistageError("x")).exit_code == 2


def test_a_bug_keeps_its_traceback(failing):
    done = failing(AssertionError("broken"))
    assert done.exit_code == 1
    assert isinstance(done.exception, AssertionError)


def test_a_missing_extra_says_what_to_type(failing):
    done = failing(ModuleNotFoundError("No module named 'torch'", name="torch.nn"))
    assert done.exit_code == 2
    assert "pip install -e '.[compile]'" in done.stderr
    assert isinstance(failing(ModuleNotFoundError(name="oops")).exception, ModuleNotFoundError)


def test_the_module_runs_too():
    command = [sys.executable, "-m", "visistage", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("visistage, version")


def test_sizes_and_durations():
    assert [show_bytes(n) for n in (0, 1023, 1536, 14 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "14.0 GiB",
    ]
    assert [show_seconds(s) for s in (0.04, 59.94, 192)] == ["0.0 s", "59.9 s", "3 min 12 s"]


# --- the public API -------------------------------------------------------------------------------


def test_the_public_names():
    assert {"Answer", "Session", "infer", "load"} < set(runtime.__all__)
    assert set(runtime.__all__) <= set(dir(runtime))
    assert isinstance(runtime.Session, type)
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = runtime.nothing_such


@pytest.fixture
def no_sessions(monkeypatch):
    """No session left from another test, and none for the next."""
    monkeypatch.setattr(shared, "sessions", {})
    yield
    for _, session in shared.sessions.values():
        session.close()


def test_infer_saves_an_image_and_takes_it_for_one(at, tmp_path):
    file = tmp_path / "photo.safetensors"
    first = ok("infer", "photo.png", "What?", "--max-tokens", 4, "--save-image", file, "--json")
    again = ok("infer", file, "What?", "--max-tokens", 4, "--json")
    answers = [json.loads(done.stdout) for done in (first, again)]
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert "vision" not in answers[1]["timings"]["graphs_ms"]
    wrong = run("infer", "What?", "--save-image", file)
    assert wrong.exit_code == 2
    assert "for one image, found 0" in wrong.stderr
    file.write_bytes(b"spoilt")
    wrong = run("infer", file, "What?")
    assert "photo.safetensors has 6 bytes" in wrong.stderr
    assert "Save the image again" in wrong.stderr


def test_infer_finds_the_bundle_and_keeps_its_session(at, no_sessions, monkeypatch):
    first = runtime.infer("photo.png", "What?", max_tokens=4)
    assert isinstance(first, runtime.Answer)
    (entry,) = shared.sessions.values()
    again = runtime.infer("photo.png", "What?", bundle="engines", max_tokens=4)
    assert again.tokens == first.tokens
    assert [session for _, session in shared.sessions.values()] == [entry[1]]
    monkeypatch.setenv(BUNDLE_VARIABLE, str(at / "elsewhere"))
    with pytest.raises(BundleError, match="elsewhere"):
        runtime.infer("photo.png", "What?")


def test_infer_loads_a_rebuilt_bundle_again(at, no_sessions):
    runtime.infer("photo.png", "What?", max_tokens=1)
    (old,) = (session for _, session in shared.sessions.values())
    manifest = old.bundle.path / "manifest.json"
    text = manifest.read_bytes()
    manifest.unlink()
    manifest.write_bytes(text)
    runtime.infer("photo.png", "What?", max_tokens=1)
    (new,) = (session for _, session in shared.sessions.values())
    assert new is not old


def test_the_level_of_the_log_is_chosen(monkeypatch):
    levels = []
    monkeypatch.setattr(logging.getLogger(), "setLevel", levels.append)
    ok("--log-level", "debug", "list")
    assert levels == ["DEBUG"]
    assert run("--log-level", "loud", "list").exit_code == 2
