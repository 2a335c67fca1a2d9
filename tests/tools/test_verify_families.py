"""Every family in integers and on OpenVINO: verified against its checkpoint, and profiled."""

from types import SimpleNamespace

import onnx
import pytest
from visistage.compile.build import make_bundle
from visistage.graphs.targets import TARGETS, check_operators
from visistage.tests.support import calibrated
from visistage.tests.support.families import PLAN, TINY, make_asked
from visistage.tools.profile.profile import profile
from visistage.tools.profile.timing import Settings, image_layout
from visistage.tools.verify.verify import verify
from visistage.tools.verify.verify_report import PASSED

STEPS = 4
QUICK = Settings(repetitions=2, warm_up=0, tokens=3)
EVERYTHING = "int8:stage1=w4,cache=int8"
"""All schemes at once: ``w8a8``, ``w4``, the head in ``w8``, and an INT8 cache."""

INTEGERS = ("internvl", "qwen2_5_vl")
"""Families that run in INT8 on OpenVINO, too: one of tiles, one of patches."""


@pytest.fixture(scope="module", params=TINY)
def made(request, tmp_path_factory):
    """A checkpoint, questions about two pictures, and what builds bundles of it, each once."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint, samples = make_asked(request.param, folder)
    built = {}

    def bundle(plan, target, precision):
        if (target, precision) not in built:
            given = {"plan": plan, "target": target, "precision": precision}
            if precision != "fp32":
                given["calibration"] = folder / f"calibration {plan}"
                calibrated.calibrate(checkpoint, plan, given["calibration"])
            built[target, precision] = make_bundle(str(checkpoint), out=folder / "out", **given)
        return built[target, precision]

    known = {"name": request.param, "folder": folder, "checkpoint": checkpoint}
    return SimpleNamespace(**known, samples=samples, bundle=bundle)


def verified(made, bundle):
    """Status of every check, none of which may fail."""
    given = {"model": str(made.checkpoint), "max_tokens": STEPS}
    if bundle.manifest.quantization.calibration is not None:
        plan = bundle.manifest.plan
        given["calibration"] = made.folder / f"calibration {PLAN if not plan.is_dense else 'dense'}"
    report = verify(bundle, made.samples, **given)
    assert report.failed is None, report.failed
    return {check.name: check.status for check in report.checks}


def test_integers_of_every_scheme_pass_every_check(made):
    bundle = made.bundle(PLAN, "cpu", EVERYTHING)
    quantization = bundle.manifest.quantization
    assert set(quantization.schemes.values()) == {"w8a8", "w8", "w4"}
    assert any("model.layers" not in name for name in quantization.schemes), "the encoder's"
    assert quantization.quantises_cache
    found = verified(made, bundle)
    graphs = [f"graph {graph}" for graph in bundle.manifest.graphs]
    whole = ("weights", "prefix", "hugging face", "quantisation", "runtime", "answers")
    assert {found[name] for name in (*whole, *graphs)} == {PASSED}, found


def test_integers_are_profiled(made, tmp_path):
    bundle = made.bundle(PLAN, "cpu", EVERYTHING)
    facts = profile(bundle.path, settings=QUICK, threads=1)
    layout = image_layout(bundle.manifest.config)
    assert facts["runs"]["plan"]["visual_tokens"] == layout.rows
    stock = facts["polygraphy"]
    assert stock["reason"] is None
    assert {run["graph"] for run in stock["runs"]} == set(bundle.manifest.graphs)


def test_openvino_computes_what_onnx_runtime_does(made):
    pytest.importorskip("openvino")
    for precision in ("fp32", "int8") if made.name in INTEGERS else ("fp32",):
        found = verified(made, made.bundle("dense", "openvino", precision))
        assert found["answers"] == found["engine runs"] == PASSED


def test_the_oldest_orin_imports_the_portable_graphs(made):
    bundle = made.bundle("dense", "openvino", "fp32")
    for name, fact in bundle.manifest.graphs.items():
        graph = onnx.load(bundle.file(fact.file), load_external_data=False)
        (opset,) = graph.opset_import
        used = {node.op_type for node in graph.graph.node}
        check_operators(TARGETS["orin-jp62"], name, opset.version, used)
