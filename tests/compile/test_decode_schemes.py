"""Graphs for one row with weights of their own, beside W8A8 for many: ``int8:decode=w4``."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from visistage.cli.show.bundle_view import bundle_facts
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.planfile import resolve_plan
from visistage.compile.quantize.int_arithmetic import blocked_weight
from visistage.compile.quantize.quantize import DECODE_ERROR, resolve
from visistage.graphs.bundle import Bundle
from visistage.graphs.errors import TargetError
from visistage.graphs.plan.call_cost import GraphCall, Sizes, work_of
from visistage.graphs.quantization import parse_quant_config
from visistage.graphs.targets import TARGETS
from visistage.runtime.engine import Engine
from visistage.runtime.session import load
from visistage.tests.support import calibrated, toy
from visistage.tests.support.asking import picture
from visistage.tests.support.verified import PLAN, change_graph, failing, run, swap
from visistage.tools.verify.stored_graph import StoredGraph

RECIPE = "int8:decode=w4"
QUESTION = "What is this, and why?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    toy.make_checkpoint(folder / "toy")
    return folder


@pytest.fixture(scope="module")
def calibration(folder):
    return calibrated.calibrate(folder / "toy", PLAN, folder / "calibration")


@pytest.fixture(scope="module")
def built(folder, calibration):
    """Return what builds the toy in a precision."""

    def build(precision):
        given = {"plan": PLAN, "calibration": folder / "calibration", "out": folder}
        return make_bundle(str(folder / "toy"), precision=precision, **given)

    return build


def resolved(folder, calibration, recipe=RECIPE, target="cpu"):
    config = open_checkpoint(str(folder / "toy")).config
    known = parse_quant_config(recipe)
    return resolve(known, calibration, config, calibration.plan, TARGETS[target])


def test_a_layer_has_four_bits_for_one_row_and_eight_for_many(folder, calibration):
    quantization = resolved(folder, calibration)
    assert {quantization.schemes[name] for name in quantization.decode} == {"w8a8", "w4"}
    decoder = {name: way for name, way in quantization.decode.items() if "layers" in name}
    decoder = {name: way for name, way in decoder.items() if name.startswith("model.")}
    assert set(decoder.values()) == {"w4"}
    assert quantization.schemes["lm_head"] == quantization.decode["lm_head"] == "w4"
    assert resolved(folder, calibration, "int8").decode == {}


def test_a_layer_that_four_bits_change_too_much_keeps_eight(folder, calibration):
    name = "model.layers.1.mlp.down_proj"
    ranges = calibration.groups[name]
    loud = {name: {**ranges.sensitivity[name], "w4": 1.01 * DECODE_ERROR}}
    groups = {**calibration.groups, name: replace(ranges, sensitivity=loud)}
    known = replace(calibration, groups=groups)
    decode = resolved(folder, known).decode
    assert [own for own, way in decode.items() if "model.layers" in own and way != "w4"] == [name]


@pytest.mark.parametrize(
    ("recipe", "target"), [("w4:decode=w4", "cpu"), (RECIPE, "rtx"), (RECIPE, "cpu-portable")]
)
def test_what_has_no_graphs_for_one_row_says_so(folder, calibration, recipe, target):
    with pytest.raises(TargetError, match="type --precision int8:decode=w4 --target cpu"):
        resolved(folder, calibration, recipe, target)


def test_four_bits_of_the_weight_that_the_layer_reads(built, folder):
    """Folded factors serve one row as they do many: both share their norms."""
    bundle = built(RECIPE)
    names = list(bundle.manifest.graphs)
    assert [name for name in names if name.startswith("st")] == [
        kind + str(stage) for stage in range(3) for kind in ("stage", "step")
    ]
    many, one = (StoredGraph(bundle, name).weights for name in ("stage0", "step0"))
    name = "model.layers.0.self_attn.o_proj"  # nothing is folded into it
    weight = open_checkpoint(str(folder / "toy")).load(f"{name}.weight").float().numpy()
    values, scales = blocked_weight(weight)
    assert np.array_equal(one[f"{name}.weight_int4"], values)
    assert np.array_equal(one[f"{name}.weight_scale_4bit"], scales)
    norms = {own for own in one if own.endswith("layernorm.weight")}
    assert norms
    assert all(many.tensors[own].offset == one.tensors[own].offset for own in norms)


def test_the_step_graph_runs_for_one_row_alone(built):
    with load(built(RECIPE).path, threads=1) as session:
        session.eos = frozenset()
        first = session.infer(picture(1), QUESTION, max_tokens=1)
        later = session.executor.reset_elapsed()
        session.context.decode(5)
        steps = session.executor.reset_elapsed()
    assert {"stage0", "stage1", "stage2"} <= {*first.timings.graphs_ms}
    assert not [graph for graph in (*first.timings.graphs_ms, *later) if graph.startswith("step")]
    assert [*steps] == ["step0", "step1", "step2"]


def test_many_rows_are_as_without_it(built):
    """The first token's logits are bit for bit those of the same stages with a head of INT4."""
    logits = []
    for recipe in (RECIPE, "int8:head=w4"):
        with load(built(recipe).path, threads=1) as session:
            logits.append(session.score(picture(2), QUESTION, [7, 9]))
    assert np.array_equal(logits[0][0], logits[1][0])
    assert not np.array_equal(logits[0][1], logits[1][1])  # a later token is computed otherwise


def test_lanes_write_what_a_session_writes(built):
    bundle, asked = built(RECIPE), [(picture(at), QUESTION) for at in range(3)]
    with load(bundle.path, threads=1) as session:
        session.eos = frozenset()
        alone = [session.infer(*given, max_tokens=12).tokens for given in asked]
    with Engine(Bundle.open(bundle.path), threads=1, lanes=3) as engine:
        engine.eos = frozenset()
        tickets = [engine.submit(*given, max_tokens=12) for given in asked]
        assert [ticket.wait().tokens for ticket in tickets] == alone


def test_it_passes_every_check_and_a_fault_in_it_is_named(built, folder, tmp_path):
    given = {"model": str(folder / "toy"), "calibration": folder / "calibration"}
    bundle = built(RECIPE)
    report = run(bundle, **given)
    assert report.failed is None
    checked = {record.name for record in report.checks}
    assert {"graph step0", "graph step1", "graph step2"} <= checked
    facts = next(record.facts for record in report.checks if record.name == "weights")
    assert facts["rounded again"].endswith("bit for bit")
    assert bundle_facts(bundle)["quantization"]["places"]["one row"] == {"w4": 28}
    names = (f"model.layers.0.self_attn.{n}_proj.weight_int4" for n in "qo")
    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    spoilt = change_graph(copy, "step0.onnx", swap(*names))
    name, _ = failing(run(spoilt, **given))
    assert name in ("weights", "graph step0")


def test_a_manifest_without_its_step_graphs_is_refused(built, tmp_path):
    manifest = json.loads((built(RECIPE).path / "manifest.json").read_text())
    del manifest["graphs"]["step1"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="graphs"):
        Bundle.open(tmp_path)


def test_a_token_reads_half_a_byte_a_weight(folder):
    opened = open_checkpoint(str(folder / "toy"))
    plan = resolve_plan(PLAN, opened.config.text.layers, opened.config.visual_tokens)
    one, many = (
        [
            work_of(
                GraphCall("stage0", rows, 40), opened.config, plan, Sizes.of(recipe)
            ).weight_bytes
            for recipe in ("int8", RECIPE)
        ]
        for rows in (1, 20)
    )
    assert many[0] == many[1]
    assert 0.5 < one[1] / one[0] < 0.55


def test_graphs_for_one_row_hold_no_rounded_inputs(built):
    model = onnx.load(built(RECIPE).file("step0.onnx"), load_external_data=False)
    assert "QuantizeLinear" not in {node.op_type for node in model.graph.node}
