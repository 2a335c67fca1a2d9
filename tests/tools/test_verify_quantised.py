"""Verification over integer weights: good bundles pass, every planted fault is named."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from visistage.cli.main import main
from visistage.cli.show.bundle_view import bundle_facts
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.quantize.int_arithmetic import pack_int4, restored
from visistage.graphs.bundle import Bundle
from visistage.graphs.errors import DataError
from visistage.graphs.quantization import FLOAT, SCALE_BLOCK, Quantization
from visistage.tests.support import calibrated, toy
from visistage.tests.support.verified import (
    PLAN,
    change_graph,
    failing,
    fix_hashes,
    run,
    statuses,
    swap,
)
from visistage.tools.verify.compare import BOUNDS, bounds_of, strict
from visistage.tools.verify.origin import open_calibration
from visistage.tools.verify.quantised_checks import QuantisedWeights, WrongError
from visistage.tools.verify.stored_graph import StoredGraph, all_weights
from visistage.tools.verify.verify_report import FAILED, PASSED

LAYER = "model.layers.3.mlp"
RECIPE = f"int8:stage2=w4,keep={LAYER}.gate_proj"
"""Every scheme at once, and a float layer whose group is smoothed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    toy.make_checkpoint(folder / "toy")
    calibrated.calibrate(folder / "toy", PLAN, folder / "calibration")
    return folder


@pytest.fixture(scope="module")
def int8(folder):
    given = {"plan": PLAN, "calibration": folder / "calibration", "out": folder}
    return make_bundle(str(folder / "toy"), precision=RECIPE, **given)


@pytest.fixture
def copy(int8, tmp_path):
    """A bundle to be spoilt, every file its own."""
    return Bundle.open(shutil.copytree(int8.path, tmp_path / "bundle"))


def weights_of(bundle, folder):
    """The checks of rounded weights alone."""
    checkpoint = open_checkpoint(str(folder / "toy"))
    return QuantisedWeights(bundle.manifest, checkpoint, all_weights(bundle))


def write(bundle, changes):
    """Put other numbers in the place of weights, and their hashes into the manifest."""
    tensors = all_weights(bundle).tensors
    for name, change in changes.items():
        old = all_weights(bundle)[name]
        new = np.ascontiguousarray(change(old), old.dtype)
        packed = pack_int4(new) if name.endswith("_int4") else new
        with bundle.file(str(tensors[name].location)).open("r+b") as file:
            file.seek(tensors[name].offset)
            file.write(packed.tobytes())
    return fix_hashes(bundle)


# --- good bundles ---------------------------------------------------------------------------------


def test_every_scheme_passes_every_check(int8, folder):
    report = run(int8, model=str(folder / "toy"), calibration=folder / "calibration")
    assert report.failed is None
    found = {record.name: record for record in report.checks}
    for name in ("weights", "prefix", "hugging face", "quantisation", "runtime", "answers"):
        assert found[name].status == PASSED, name
    facts = found["weights"].facts
    assert facts["rounded or folded layers"] == {"w8a8": 35, "w4": 6, "float": 1, "w8": 1}
    assert facts["rounded again"].endswith("bit for bit")
    assert "not checked" not in facts
    assert "tokens agree" in found["quantisation"].facts["teacher-forced"]
    assert any("mapped weights" in one.tensor for one in found["answers"].errors)
    stage = {one.tensor: one.relative for one in found["graph stage2"].errors}
    assert stage["logits"] < BOUNDS["float32"].graph
    assert stage["logits, inputs rounded by ONNX Runtime"] > BOUNDS["float32"].graph


@pytest.mark.slow
def test_engines_graphs_in_fp16_with_int4(folder):
    given = {"plan": PLAN, "calibration": folder / "calibration", "contexts": (128,)}
    bundle = make_bundle(str(folder / "toy"), precision="w4", target="rtx", out=folder, **given)
    report = run(bundle, model=str(folder / "toy"))
    found = statuses(report)
    assert report.failed is None
    records = ("weights", "quantisation", "half vision", "half stage0", "half answers", "variants")
    assert {found[name] for name in records} == {PASSED}


def test_a_calibration_that_a_bundle_does_not_rest_on_is_refused(int8, folder):
    def resting_on(quantization):
        return Bundle(int8.path, replace(int8.manifest, quantization=quantization))

    for other, words in ((FLOAT, "needs none"), (Quantization(calibration="12" * 32), "1212")):
        with pytest.raises(DataError, match=words):
            open_calibration(resting_on(other), folder / "calibration")
    assert open_calibration(resting_on(FLOAT), None) is None


def test_without_its_calibration_a_bundle_says_what_was_not_checked(int8, folder):
    report = run(int8, model=str(folder / "toy"))
    facts = next(record.facts for record in report.checks if record.name == "weights")
    assert "input scales" in facts["not checked"]
    assert int8.manifest.quantization.calibration[:12] in facts["not checked"]
    with pytest.raises(DataError, match="--model CHECKPOINT"):
        run(int8, calibration=folder / "calibration")


def test_bounds_are_the_loosest_of_what_a_graph_does():
    assert bounds_of(["float32"]).tie == 0
    assert bounds_of(["float32", "w8a8"]) == BOUNDS["w8a8"]
    assert bounds_of(strict({"float32", "w4"})) == BOUNDS["float32"]


def test_int4_comes_out_of_a_file_as_it_went_in(int8, folder):
    name = f"{LAYER}.up_proj"
    weights = StoredGraph(int8, "stage2").weights
    values, scales = weights[f"{name}.weight_int4"], weights[f"{name}.weight_scale_4bit"]
    assert values.shape == (64, 128)
    assert np.abs(values).max() == 7
    theirs = open_checkpoint(str(folder / "toy")).load(f"{name}.weight").numpy()
    back = restored(values, scales, SCALE_BLOCK)
    assert np.corrcoef(back.ravel(), theirs.ravel())[0, 1] > 0.9


# --- planted faults -------------------------------------------------------------------------------


FAULTS = {
    "a flipped scale": ({f"{LAYER}.up_proj.weight_scale_4bit": lambda x: -x}, "not above 0"),
    "a scale twice as large": (
        {f"{LAYER}.up_proj.weight_scale_4bit": lambda x: x * np.eye(1, 128, 5) + x},
        "is off by",
    ),
    "a scale a hundredth too small": (
        {"model.layers.1.self_attn.o_proj.weight_scale": lambda x: 0.99 * x},
        "o_proj.weight_scale at",
    ),
    "swapped nibbles": (
        {f"{LAYER}.down_proj.weight_int4": lambda x: x.reshape(-1, 2)[:, ::-1].reshape(x.shape)},
        "down_proj.weight_int4: the weight of input",
    ),
    "one integer one step off": (
        {"lm_head.weight_int8": lambda x: x + (np.arange(x.size) == 77).reshape(x.shape)},
        "lm_head.weight_int8: the weight of input 0 and output 77",
    ),
    "a norm with another factor": (
        {"model.layers.0.input_layernorm.weight": lambda x: x * (1 + 0.5 * np.eye(1, 64, 3)[0])},
        "model.layers.0.self_attn",
    ),
    "a float layer without its factors": (
        {f"{LAYER}.gate_proj.weight": lambda x: 1.01 * x},
        f"{LAYER}.gate_proj.weight at",
    ),
    "an input scale unlike that of its group": (
        {"model.layers.0.self_attn.k_proj.input_scale": lambda x: 2 * x},
        "k_proj.input_scale is",
    ),
    "not a number": (
        {f"{LAYER}.up_proj.weight_scale_4bit": lambda x: x * np.where(x == x.max(), np.nan, 1)},
        "not finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_rounded_weights(copy, folder, fault):
    changes, words = FAULTS[fault]
    weights_of(copy, folder).check()
    with pytest.raises(WrongError, match=words):
        weights_of(write(copy, changes), folder).check()


def test_integers_of_two_layers_swapped(copy, folder):
    """Torch reads the bytes where the file says, too: only the checkpoint can tell."""
    names = (f"model.layers.1.self_attn.{one}_proj.weight_int8" for one in "qk")
    spoilt = change_graph(copy, "stage0.onnx", swap(*names))
    report = run(spoilt, model=str(folder / "toy"))
    name, reason = failing(report)
    assert name == "weights"
    assert "model.layers.1.self_attn.q_proj" in reason
    assert statuses(report)["graph stage0"] == PASSED


def test_an_input_scale_of_a_layer_alone_needs_the_calibration(copy, folder):
    """Twice as large, it rounds more coarsely: only the calibration says that it is wrong."""
    spoilt = write(copy, {"model.layers.0.self_attn.o_proj.input_scale": lambda x: 2 * x})
    weights_of(spoilt, folder).check()
    report = run(spoilt, model=str(folder / "toy"), calibration=folder / "calibration")
    name, reason = failing(report)
    assert name == "weights"
    assert "model.layers.0.self_attn.o_proj.input_scale" in reason


def test_a_graph_that_restores_by_the_scales_of_another_layer(copy):
    """The weights are right, the graph is not: ONNX Runtime and torch differ."""

    def change(graph):
        for node in graph.node:
            for at, name in enumerate(node.input):
                if name == "model.layers.0.self_attn.q_proj.weight_scale":
                    node.input[at] = "model.layers.0.self_attn.k_proj.weight_scale"

    report = run(change_graph(copy, "stage0.onnx", change))
    assert failing(report)[0] == "graph stage0"


def test_rounding_that_leaves_nothing_of_the_model(copy, folder):
    """Ranges that clip everything: every check before agrees, the model is gone."""
    scales = [name for name in all_weights(copy) if name.endswith("o_proj.input_scale")]
    scales += [name for name in all_weights(copy) if name.endswith("down_proj.input_scale")]
    report = run(write(copy, dict.fromkeys(scales, lambda x: x / 1000)), model=str(folder / "toy"))
    name, reason = failing(report)
    assert name == "quantisation"
    assert "of their spread away from those of the checkpoint" in reason
    assert statuses(report)["weights"] == PASSED
    assert statuses(report)["graph stage0"] == PASSED


# --- what is shown --------------------------------------------------------------------------------


def test_inspect_counts_layers_and_bytes(int8):
    facts = bundle_facts(int8)["quantization"]
    assert facts["places"]["stage2"] == {"w4": 6, "float": 1}
    assert facts["places"]["head"] == {"w8": 1}
    assert facts["float"] == [f"{LAYER}.gate_proj"]
    assert facts["calibration"] == int8.manifest.quantization.calibration
    stored = all_weights(int8)
    linears = {
        name: tensor
        for name, tensor in stored.tensors.items()
        if "_proj" in name or "fc" in name or "linear_" in name or "lm_head" in name
    }
    bytes_of = {
        name: -(-stored.size(name) * tensor.dtype.bitwidth // 8)
        for name, tensor in linears.items()
        if not name.endswith(".bias")
    }
    assert sum(facts["weight_bytes"].values()) == sum(bytes_of.values())
    shown = CliRunner().invoke(main, ["inspect", str(int8.path)]).stdout
    for words in ("stage2", "6 w4", "1 float", "ranges by", facts["calibration"][:12]):
        assert words in shown


def test_the_command_takes_a_calibration(copy, folder):
    arguments = ["verify", copy.path, "--model", folder / "toy", "--calib", folder / "calibration"]
    done = CliRunner().invoke(
        main, [*map(str, arguments), "--samples", "1", "--max-tokens", "2", "--json"]
    )
    assert done.exit_code == 0, done.output
    records = {record["name"]: record for record in json.loads(done.stdout)["rungs"]}
    assert "rounded again" in records["weights"]["facts"]
    assert FAILED not in {record["status"] for record in records.values()}
