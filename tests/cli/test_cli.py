"""The command line, from a build to an answer, and how it ends when something is wrong."""

import inspect
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from visistage import runtime
from visistage.cli.main import main
from visistage.cli.show.answer_view import savings
from visistage.cli.show.bar import StepBar, build_line
from visistage.compile.build import make_bundle
from visistage.graphs.bundle import Bundle
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
    monkeypatch.delenv(shared.BUNDLE_VARIABLE, raising=False)
    return folder


# --- engines --------------------------------------------------------------------------------------


def test_a_build_tells_every_step_and_ends_with_the_path(folder, built):
    path = built.stdout.splitlines()[-1]
    assert (Bundle.open(path).path / "manifest.json").is_file()
    assert path.startswith(str(folder / "engines"))
    steps = [line.split()[0] for line in built.stderr.splitlines()]
    assert steps[0] == "weights"
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
    arguments = set(inspect.signature(make_bundle).parameters) - {"progress"}
    options = {option.name for option in main.commands["engines"].params} - {"as_json"}
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
        (["infer", "x.png", "y", "--bundle", "nowhere"], "no bundle at nowhere"),
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
    assert "pip install 'visistage[compile]'" in done.stderr
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
    assert runtime.__all__ == ["Answer", "Session", "infer", "load"]
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


def test_infer_finds_the_bundle_and_keeps_its_session(at, no_sessions, monkeypatch):
    first = runtime.infer("photo.png", "What?", max_tokens=4)
    assert isinstance(first, runtime.Answer)
    (entry,) = shared.sessions.values()
    again = runtime.infer("photo.png", "What?", bundle="engines", max_tokens=4)
    assert again.tokens == first.tokens
    assert [session for _, session in shared.sessions.values()] == [entry[1]]
    monkeypatch.setenv(shared.BUNDLE_VARIABLE, str(at / "elsewhere"))
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
