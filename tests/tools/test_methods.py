"""One plan of each method: it passes verification, and what is shown of it is right."""

import html
import json

import numpy as np
import pytest
from click.testing import CliRunner
from visistage.cli.main import main
from visistage.cli.show.bundle_view import bundle_facts
from visistage.graphs.caches import is_cache
from visistage.graphs.modules.routers import linear
from visistage.graphs.plan.cost import Geometry, plan_cost
from visistage.tests.support.asking import picture
from visistage.tests.support.methods import LAYERS, METHODS, Built
from visistage.tests.support.verified import failing, run, statuses
from visistage.tools.explain.explanation import explain
from visistage.tools.verify.verify_report import NOTHING, PASSED

PASSING = ("files", "weights", "runtime", "answers")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Built(tmp_path_factory.mktemp)


# --- verify ---------------------------------------------------------------------------------------


def verified(built, name, target="cpu", **options):
    bundle = built.bundle(name, target, **options)
    model, calibration = str(built.checkpoint(name)), options.get("calibration")
    report = run(bundle, count=3, model=model, calibration=calibration)
    assert report.failed is None, (report.failed.name, report.failed.reason)
    found = statuses(report)
    passing = [*PASSING, *(f"graph {graph}" for graph in bundle.manifest.graphs)]
    assert {found[check] for check in passing} == {PASSED}
    fused = bool(METHODS[name].fusion)
    assert found["hugging face"] == (NOTHING if fused else PASSED)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_fp32(built, name):
    verified(built, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_basic_operators(built, name):
    verified(built, name, "cpu-portable")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hidrop", "frozen rows", "depth", "skipgpt, capacity", "mod"])
def test_methods_in_fp16(built, name):
    found = verified(built, name, "rtx", contexts=(128,))
    assert found["half answers"] == PASSED


def test_gates_that_are_turned_around_are_noticed_in_fp16(built, monkeypatch):
    """Half of a tensor may be off there; then all of it is."""
    bundle = built.bundle("skipgpt", "rtx", contexts=(128,))
    gates = linear.LinearRouter.gates

    def turned(self, *given):
        gate, ahead = gates(self, *given)
        return 1 - gate, -ahead

    monkeypatch.setattr(linear.LinearRouter, "gates", turned)
    assert failing(run(bundle, count=1))[0] == "graph stage0"


# --- integers -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["late entry", "hidrop", "frozen rows", "depth", "skipgpt"])
def test_methods_over_integers(built, name):
    given = {"calibration": built.calibration(name), "precision": "int8:cache=int8"}
    assert verified(built, name, **given)["quantisation"] == PASSED


# --- what is shown --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explained(built):
    """The page about a method's answer, and the same as data."""
    known = {}

    def get(name):
        if name not in known:
            path = built.bundle(name).path
            known[name] = explain(path, [picture(1)], "What is this?", max_tokens=2)
        return known[name]

    return get


@pytest.mark.parametrize("name", METHODS)
def test_a_page_counts_what_ran(built, explained, name):
    manifest, facts = built.bundle(name).manifest, explained(name).facts
    plan = manifest.plan
    counts = [layer["visual_tokens"] for layer in facts["layers"]]
    stages = [plan.visual_tokens_in(layer) for layer in range(LAYERS)]
    assert counts == stages or (plan.tells_apart and all(np.less_equal(counts, stages)))
    geometry = Geometry.of(manifest.config.text)
    cost = plan_cost(plan, geometry, accounting="graphs")
    assert facts["savings"]["visual_flops"] == round(2 * cost.visual_macs)
    assert cost.visual_macs >= plan_cost(plan, geometry).visual_macs
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "hidrop",
            (
                "<b>16 of 16</b> visual tokens enter before layer 1.",
                "After layer 1 of 0–5 it went on with <b>6, then 2 of 16</b> visual tokens, after "
                "layer 4 with none.",
                "The image has not come in yet. After this layer 16 visual tokens come in.",
                "<span>16 enter</span>",
                "text only; then 16 visual tokens enter",
            ),
        ),
        (
            "late entry",
            (
                "<b>6 of 16</b> visual tokens enter before layer 2.",
                "After layer 4 of 0–5 it went on <b>without the image</b>.",
            ),
        ),
        ("depth", ("The plan leaves out attention and mlp here.", "leaves out mlp here.")),
        ("mod, capacity", ("<b>All 16</b> visual tokens stayed to the end",)),
    ],
)
def test_a_page_says_what_the_method_does(explained, name, words):
    text = " ".join(html.unescape(explained(name).html).split())
    for said in words:
        assert said in text


@pytest.mark.parametrize("name", METHODS)
def test_inspect_counts_the_caches_that_graphs_take(built, name):
    bundle = built.bundle(name)
    shown = bundle_facts(bundle)
    for index, stage in enumerate(shown["stages"]):
        inputs = bundle.manifest.graphs[f"stage{index}"].spec.inputs
        shapes = [tensor.shape for tensor in inputs if is_cache(tensor.name)]
        assert stage["kv_bytes_per_row"] == sum(4 * groups * d for _, groups, _, d in shapes)
    told = CliRunner().invoke(main, ["inspect", str(bundle.path)]).stdout
    plan = bundle.manifest.plan
    assert ("routers: " in told) == (plan.routing is not None)
    assert ("left out, attention: layers 0, 3" in told) == (name == "depth")
    assert ("frozen, mlp, matched rows: layers 0, 1" in told) == (name == "frozen rows")


@pytest.mark.parametrize("name", METHODS)
def test_estimates_are_numbers(built, name):
    bundle = built.bundle(name)
    told = CliRunner().invoke(main, ["estimate", str(bundle.path), "--device", "h200", "--json"])
    assert told.exit_code == 0, told.output
    json.dumps(json.loads(told.stdout), allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hidrop", "depth", "skipgpt, capacity", "mod"])
def test_profiles_are_made(built, name, tmp_path):
    given = ("--repetitions", "1", "--warm-up", "0", "--tokens", "2", "--json")
    page = tmp_path / "profile.html"
    arguments = ["profile", str(built.bundle(name).path), *given, "--out", str(page)]
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 0, told.output
    assert page.stat().st_size > 10_000
