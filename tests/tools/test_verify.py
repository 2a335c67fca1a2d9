"""Verification: good bundles pass on every target, every planted fault is caught and named."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from io import BytesIO

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from visistage.calib.samples import Sample
from visistage.cli.main import main
from visistage.cli.show.verify_view import require_passed, verify_table
from visistage.compile.build import make_bundle
from visistage.compile.engines.engines import compile_engines
from visistage.compile.export.static_shapes import DECOMPOSABLE, compiler_peak
from visistage.graphs.bundle import Bundle
from visistage.graphs.errors import BundleError, DataError, ImageError, ModelError, ParityError
from visistage.graphs.plan.probing import Decision
from visistage.graphs.plan.stages import Probe
from visistage.graphs.targets import TENSORRT_RTX
from visistage.runtime.device.tensorrt import find_trt_variant
from visistage.runtime.hardware import GpuInfo
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.verified import (
    PLAN,
    change_graph,
    failing,
    fix_hashes,
    rewrite,
    run,
    statuses,
    swap,
)
from visistage.tools.verify import runtime_checks
from visistage.tools.verify.answer_checks import Tally
from visistage.tools.verify.chains import Trajectory
from visistage.tools.verify.checks import Check
from visistage.tools.verify.compare import BOUNDS, GATES, bounds_of, first_wrong, tensor_error
from visistage.tools.verify.hugging_face import compare_dense
from visistage.tools.verify.origin import open_origin
from visistage.tools.verify.token_choices import (
    APART,
    ProbeReading,
    Selection,
    SelectionMargins,
    forced_readings,
    selection_margin,
)
from visistage.tools.verify.variants import difference
from visistage.tools.verify.verify import DEFAULT_SAMPLES, chosen, run_check, verify
from visistage.tools.verify.verify_report import (
    FAILED,
    IMPOSSIBLE,
    JSON_FILE,
    NOTHING,
    PAGE_FILE,
    PASSED,
    CheckRecord,
    ImpossibleError,
    TensorError,
    VerifyReport,
    page,
)
from visistage.tools.verify.verify_target import VerifyTarget

PRODUCT = {  # gate and up are harmless, their product leaves FP16, its projection comes back
    "layers.3.mlp.gate_proj": 16.0,
    "layers.3.mlp.up_proj": 2.0**10,
    "layers.3.mlp.down_proj": 2.0**-10,
}
needs_rtx = pytest.mark.skipif(
    find_trt_variant(TENSORRT_RTX) is None, reason="pip install -e '.[rtx]'"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    toy.make_checkpoint(folder / "toy", dtype="float16")
    return folder


@pytest.fixture(scope="module")
def built(folder):
    """Bundles by target, each built once and verified once, with every check that there is."""
    made = {}

    def get(target):
        if target not in made:
            contexts = (128,) if target in ("rtx", "orin-jp62") else ()
            bundle = make_bundle(
                str(folder / "toy"), plan=PLAN, target=target, contexts=contexts, out=folder
            )
            if target == "rtx" and find_trt_variant(TENSORRT_RTX):
                compile_engines(bundle, capabilities=[(8, 6)])
            made[target] = (bundle, run(bundle, model=str(folder / "toy")))
        return made[target]

    return get


@pytest.fixture
def copy(built, tmp_path):
    """A bundle to be spoilt: the target's, every file its own."""

    def make(target):
        return Bundle.open(shutil.copytree(built(target)[0].path, tmp_path / "bundle"))

    return make


# --- good bundles ---------------------------------------------------------------------------------


def test_fp32_on_the_cpu(built):
    bundle, report = built("cpu")
    found = statuses(report)
    graphs = list(bundle.manifest.graphs)
    assert {"vision", "stage0", "select0", "stage1", "stage2"} == set(graphs)
    assert report.failed is None
    passing = ["files", "weights", "prefix", "hugging face", "runtime", "answers"]
    assert {found[name] for name in passing} == {PASSED}
    assert {found[f"graph {name}"] for name in graphs} == {PASSED}
    absent = ["quantisation", "half answers", "variants", "engines", "engine runs"]
    assert {found[name] for name in [*absent, *(f"half {name}" for name in graphs)]} == {NOTHING}


@needs_rtx
def test_fp16_with_engines(built):
    bundle, report = built("rtx")
    found = statuses(report)
    assert report.failed is None
    others = {name: status for name, status in found.items() if status != PASSED}
    assert others == {"quantisation": NOTHING, "engine runs": IMPOSSIBLE}
    runs = next(record for record in report.checks if record.name == "engine runs")
    assert runs.status == IMPOSSIBLE
    assert "need a GPU" in runs.reason
    variants = next(record for record in report.checks if record.name == "variants")
    assert set(variants.facts) == {
        file for fact in bundle.manifest.graphs.values() for file in fact.variants.values()
    }
    assert variants.facts["stage0.context128.onnx"].startswith("stage0.onnx with B = 1, S = 128")
    engines = next(record for record in report.checks if record.name == "engines")
    source = engines.facts["compiled from"]
    assert source["engines/stage0.context128.engine"] == "stage0.context128.onnx"


def test_fp16_for_onnxruntime_on_a_gpu(built):
    """Its graphs are tried on this CPU, and so is the runtime; a GPU is not needed to verify."""
    bundle, report = built("cuda")
    assert report.failed is None
    found = statuses(report)
    for name in bundle.manifest.graphs:
        assert found[f"graph {name}"] == found[f"half {name}"] == PASSED
    assert found["runtime"] == PASSED


def test_the_portable_lowering_for_a_board(built):
    _, report = built("orin-jp62")
    assert report.failed is None
    found = statuses(report)
    assert found["variants"] == found["engines"] == NOTHING
    assert found["answers"] == found["half answers"] == found["hugging face"] == PASSED


def test_parts_of_a_stage_are_graphs_of_their_own(folder):
    bundle = make_bundle(
        str(folder / "toy"),
        plan=PLAN,
        target="rtx",
        contexts=(128,),
        build_memory=compiler_peak(130_000),  # between one layer and two
        out=folder / "parts",
    )
    assert "stage0.part1" in bundle.manifest.graphs
    report = run(bundle)
    assert report.failed is None
    found = statuses(report)
    assert found["graph stage0.part1"] == found["half stage0.part1"] == PASSED
    assert found["answers"] == PASSED


@pytest.mark.parametrize(
    "plan", ["fastv:k=2,r=0.75", "v2drop:before=2,keep=4", "sparsevlm:before=2,keep=4"]
)
def test_a_selection_that_reads_no_values(folder, plan):
    """Graphs without an input for what their score does not read, or for the cache at all."""
    bundle = make_bundle(str(folder / "toy"), plan=plan, target="rtx", out=folder / "selections")
    assert "value" not in {spec.name for spec in bundle.manifest.graphs["select0"].spec.inputs}
    report = run(bundle)
    assert report.failed is None
    assert statuses(report)["graph select0"] == statuses(report)["half select0"] == PASSED


def test_a_second_run_finds_the_same(built):
    bundle, report = built("cpu")
    report.write(bundle.path)
    again = run(bundle, model=None)
    assert statuses(again) | dict.fromkeys(["weights", "prefix", "hugging face"], PASSED) == (
        statuses(report)
    )
    errors = [
        {
            e.tensor: e.relative
            for e in next(r for r in one.checks if r.name == "graph vision").errors
        }
        for one in (report, again)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.5)


# --- FP16 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A bundle of a model whose MLP products leave FP16, with the remedy that its build found."""
    folder = tmp_path_factory.mktemp("overflow")
    toy.make_half(folder / "toy", toy.scaled(PRODUCT))
    return make_bundle(str(folder / "toy"), plan=PLAN, target="rtx", contexts=(128,), out=folder)


def test_what_the_build_widened_is_widened_here(overflowing):
    assert overflowing.manifest.fallback.mlp_shift
    report = run(overflowing)
    assert report.failed is None
    assert statuses(report)["half answers"] == PASSED


def test_overflow_shows_in_half_and_nowhere_else(overflowing, tmp_path):
    """Without the remedy FP16 arithmetic overflows; ONNX Runtime on x86 cannot see it."""
    bundle = Bundle.open(shutil.copytree(overflowing.path, tmp_path / "bundle"))
    shifts = bundle.manifest.fallback.mlp_shift
    report = run(rewrite(bundle, fallback=replace(bundle.manifest.fallback, mlp_shift={})))
    (layer,) = shifts
    stage = next(
        index
        for index, stage in enumerate(bundle.manifest.plan.stages)
        if layer in range(*stage.layers)
    )
    name, reason = failing(report)
    assert name == f"half stage{stage}"
    assert "not finite" in reason
    found = statuses(report)
    assert found[f"graph stage{stage}"] == found["answers"] == PASSED
    assert found["half answers"] == FAILED


# --- planted faults -------------------------------------------------------------------------------


def test_a_flipped_byte(copy):
    bundle = copy("cpu")
    file = bundle.file("stage1.onnx")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    report = run(bundle)
    name, reason = failing(report)
    assert name == "files"
    assert "BUNDLE/stage1.onnx" in reason
    others = [record for record in report.checks if record.name != "files"]
    assert {record.status for record in others} == {IMPOSSIBLE}
    assert str(bundle.path) not in page(report)


def test_a_file_that_the_manifest_does_not_hash(copy):
    bundle = copy("cpu")
    files = {name: fact for name, fact in bundle.manifest.files.items() if name != "stage0.onnx"}
    name, reason = failing(run(rewrite(bundle, files=files)))
    assert (name, "stage0.onnx" in reason) == ("files", True)


def test_two_graphs_swapped_with_their_hashes(copy):
    """Stages 1 and 2 hold other layers; the hashes are right, the layers are not."""
    bundle = copy("cpu")
    one, other = bundle.file("stage1.onnx"), bundle.file("stage2.onnx")
    texts = one.read_bytes(), other.read_bytes()
    one.write_bytes(texts[1])
    other.write_bytes(texts[0])
    report = run(fix_hashes(bundle))
    name, reason = failing(report)
    assert name == "graph stage1"
    assert "stage1.onnx" in reason
    assert statuses(report)["files"] == PASSED
    assert statuses(report)["graph stage2"] == FAILED


@pytest.mark.parametrize("target", ["cpu", "orin-jp62"])
def test_a_graph_that_computes_something_else(copy, target):
    """One Add became a Sub: names, types and shapes are as they were."""

    def change(graph):
        adds = [node for node in graph.node if node.op_type == "Add"]
        adds[-1].op_type = "Sub"

    report = run(change_graph(copy(target), "stage1.onnx", change))
    name, reason = failing(report)
    assert name == "graph stage1"
    assert re.search(r"is off by \S+ of its spread", reason)
    assert statuses(report)["graph stage0"] == PASSED
    assert statuses(report)["answers"] == FAILED


def test_weights_swapped_inside_a_graph(copy, folder):
    """Keys and queries read each other's bytes. Torch reads them where the file says, too: only the
    checkpoint can tell."""
    names = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk")
    bundle = change_graph(copy("cpu"), "stage0.onnx", swap(*names))
    report = run(bundle, model=str(folder / "toy"))
    name, reason = failing(report)
    assert name == "weights"
    assert "model.layers.1.self_attn.q_proj.weight of stage0.onnx" in reason
    assert statuses(report)["hugging face"] == FAILED
    assert statuses(report)["graph stage0"] == PASSED


def test_a_changed_weight_needs_the_checkpoint(copy, folder):
    """A layer of the linked file was changed, its hash with it: consistent, and not the model."""
    bundle = copy("rtx")
    file = bundle.file("model.safetensors")
    tensors = load_file(file)
    changed = next(name for name in tensors if name.endswith("layers.2.mlp.down_proj.weight"))
    tensors[changed] = -tensors[changed]
    save_file(tensors, file, metadata={"format": "pt"})
    report = run(fix_hashes(bundle), model=str(folder / "toy"))
    name, reason = failing(report)
    assert name == "weights"
    assert "model.layers.2.mlp.down_proj.weight" in reason
    found = statuses(report)
    assert found["hugging face"] == FAILED
    assert found["graph stage0"] == found["graph stage2"] == PASSED


def test_a_prefix_of_another_text(copy, folder):
    bundle = copy("cpu")
    file = bundle.file("prefix.bin")
    file.write_bytes((-np.frombuffer(file.read_bytes(), np.float32)).tobytes())
    report = run(fix_hashes(bundle), model=str(folder / "toy"))
    name, reason = failing(report)
    assert (name, "prefix keys of layer 0" in reason) == ("prefix", True)
    assert statuses(report)["answers"] == FAILED
    assert statuses(report)["runtime"] == PASSED


def test_another_tokenizer_template(copy, folder):
    """Nothing but Hugging Face's own template knows that a word is missing."""
    bundle = copy("cpu")
    file = bundle.file(bundle.manifest.text_files["chat_template"])
    file.write_text(file.read_text().replace("ASSISTANT:", "USER:"))
    report = run(fix_hashes(bundle), model=str(folder / "toy"))
    assert failing(report)[0] == "hugging face"
    assert statuses(report)["answers"] == PASSED


def test_a_changed_attribute_in_a_variant(copy):
    changed = []

    def change(graph):
        node = next(node for node in graph.node if node.op_type == "RMSNormalization")
        next(one for one in node.attribute if one.name == "epsilon").f *= 10
        changed.append(node.name)

    bundle = change_graph(copy("rtx"), "stage0.context128.onnx", change)
    name, reason = failing(run(bundle))
    assert name == "variants"
    assert "stage0.context128.onnx" in reason
    assert changed[0] in reason


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model: model.graph.node.pop(), "nodes"),
        (lambda model: model.graph.input.pop(), "inputs"),
        (lambda model: setattr(model.graph.initializer[-1], "data_type", 1), "initializer"),
        (lambda model: setattr(model.opset_import[0], "version", 20), "graph"),
        (lambda model: set_batch(model, 2), "shape"),
        (lambda model: mark(model, "Add"), "node"),
    ],
)
def test_what_may_not_differ_in_a_variant(built, spoil, words):
    bundle, _ = built("rtx")
    source, variant = (
        onnx.load(bundle.file(file), load_external_data=False)
        for file in ("stage0.onnx", "stage0.context128.onnx")
    )
    copies = [onnx.ModelProto.FromString(one.SerializeToString()) for one in (source, variant)]
    assert difference(*copies, {"B": 1, "S": 128}) == ("", 0)
    spoil(variant)
    assert words in difference(source, variant, {"B": 1, "S": 128})[0]


def set_batch(model, batch):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch


def mark(model, kind):
    node = next(node for node in model.graph.node if node.op_type == kind)
    node.attribute.append(onnx.helper.make_attribute(DECOMPOSABLE, 1))


def test_leave_to_take_attention_apart_is_no_difference(built):
    bundle, _ = built("rtx")
    source, variant = (
        onnx.load(bundle.file(file), load_external_data=False)
        for file in ("stage1.onnx", "stage1.context128.onnx")
    )
    mark(variant, "Attention")
    assert difference(source, variant, {"B": 1, "S": 128}) == ("", 1)


@needs_rtx
def test_a_flipped_byte_in_an_engine(copy):
    bundle = copy("rtx")
    file = bundle.path / "engines" / "stage2.context128.engine"
    with file.open("r+b") as stream:
        stream.seek(5000)
        byte = stream.read(1)
        stream.seek(5000)
        stream.write(bytes([byte[0] ^ 1]))
    report = run(bundle)
    name, reason = failing(report)
    assert name == "engines"
    assert "stage2.context128.engine" in reason
    assert statuses(report)["answers"] == PASSED


@needs_rtx
def test_an_index_that_lacks_an_engine(copy):
    bundle = copy("rtx")
    file = bundle.path / "engines" / "engines.json"
    index = json.loads(file.read_text())
    dropped = index["engines"].pop()["name"]
    file.write_text(json.dumps(index))
    name, reason = failing(run(bundle))
    assert (name, dropped in reason) == ("engines", True)


@needs_rtx
def test_engines_run_on_a_gpu_that_fits_alone(built, monkeypatch):
    bundle, _ = built("rtx")
    monkeypatch.setattr(runtime_checks, "find_gpu", lambda: GpuInfo("it", (8, 6), 1 << 30))
    runtime_checks.require_engines_run(bundle)
    monkeypatch.setattr(runtime_checks, "find_gpu", lambda: GpuInfo("it", (9, 0), 1 << 30))
    with pytest.raises(ImpossibleError, match=re.escape("found it (sm_90)")):
        runtime_checks.require_engines_run(bundle)


# --- what a machine cannot do ---------------------------------------------------------------------


def test_too_little_memory_is_said_with_figures(built):
    bundle, _ = built("rtx")
    found = {record.name: record for record in run(bundle, memory=300_000).checks}
    assert {record.status for record in found.values()} <= {PASSED, IMPOSSIBLE, NOTHING}
    assert [name for name in found if found[name].status == NOTHING] == ["quantisation"]
    for name in ("graph stage0", "runtime", "answers", "half answers"):
        assert found[name].status == IMPOSSIBLE
        assert len(re.findall(r"\d+ [KM]iB", found[name].reason)) == 2, found[name].reason
    # What streams its weights needs no more than a layer.
    assert found["half stage0"].status == found["files"].status == PASSED


def test_without_torch_the_runtime_alone_is_verified(built, tmp_path):
    """As on a board: neither torch nor onnx can be imported, the other checks run all the same."""
    bundle = Bundle.open(shutil.copytree(built("orin-jp62")[0].path, tmp_path / "board"))
    code = f"""
import sys
from importlib.abc import MetaPathFinder
ABSENT = {{"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "yaml"}}
class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocked())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ABSENT else real(name, *rest)
from visistage.cli.main import main
main(["verify", {str(bundle.path)!r}, "--samples", "1", "--max-tokens", "3", "--json"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = {record["name"]: record for record in json.loads(done.stdout)["rungs"]}
    assert records["files"]["status"] == records["runtime"]["status"] == PASSED
    for name in ("weights", "hugging face", "graph stage0", "half stage0", "answers", "variants"):
        assert records[name]["status"] == IMPOSSIBLE
        assert "not installed" in records[name]["reason"]
        assert ".[compile]" in records[name]["reason"]


def test_a_checkpoint_that_was_not_named(built):
    bundle, _ = built("cpu")
    found = {record.name: record for record in run(bundle).checks}
    for name in ("weights", "prefix", "hugging face"):
        assert found[name].status == IMPOSSIBLE
        assert "--model" in found[name].reason


def test_a_checkpoint_of_another_shape_is_an_error(built, tmp_path):
    toy.make_checkpoint(tmp_path / "other", layers=5)
    with pytest.raises(ModelError, match="other sizes than the model 'toy'"):
        run(built("cpu")[0], model=str(tmp_path / "other"))


# --- how errors are judged ------------------------------------------------------------------------


def trajectory(tokens, kept=(1, 2), vocab=8):
    """Logits with a margin of 4 for each token; positions 2 and 3 score nearly the same."""
    logits = 4 * np.eye(vocab, dtype=np.float32)[list(tokens)]
    margins = SelectionMargins(({1: 9.0, 2: 5.0, 3: 4.99, 4: 1.0},))
    return Trajectory(logits, tuple(tokens), selected(kept), margins)


def selected(*kept):
    """Of one or more selections."""
    return Selection(kept[-1], at_edges=() if kept[-1] is None else kept)


def judged(precision, logits, kept=(1, 2), free=(3, 5, 1), forced_run=(3, 5, 1)):
    tally = Tally(BOUNDS[precision])
    want = trajectory((3, 5, 1))
    selection, got = selected(kept), np.asarray(logits, np.float32)
    tally.add("it", want, got, selection, free, lambda _: trajectory(forced_run))
    return tally.result(())


def test_equal_answers_pass():
    for precision in ("float32", "float16"):
        result = judged(precision, trajectory((3, 5, 1)).logits, free=(3, 5))
        assert result.failure == ""
        assert result.facts["teacher-forced"] == "3 of 3 tokens agree"
        assert result.facts["free-running"].startswith("1 of 1")


def test_a_token_may_differ_as_near_ties_do_and_in_fp16_only():
    want = trajectory((3, 5, 1))
    want.logits[1, 6] = 3.9  # nearly as likely as the token chosen
    got = want.logits.copy()
    got[1, 6] = 4.1

    def tried(precision, free):
        tally = Tally(BOUNDS[precision])
        tally.add("it", want, got, selected((1, 2)), free, lambda _: want)
        return tally.result(())

    result = tried("float16", (3, 6, 1))
    assert result.failure == ""
    assert result.facts["teacher-forced"] == "2 of 3 tokens agree"
    assert result.facts["first divergence, by prompt"] == {"it": 1}
    assert "off by" in tried("float32", (3, 6, 1)).failure
    assert "differs at token 0" in tried("float16", (6, 5, 1)).failure


def test_wrong_logits_tokens_and_selections_are_named():
    good = trajectory((3, 5, 1)).logits
    other = trajectory((3, 2, 1)).logits
    assert "logits of the answer is off" in judged("float16", other).failure
    assert (
        "free-running answer differs at token 2" in judged("float16", good, free=(3, 5, 2)).failure
    )
    assert "other visual tokens were kept" in judged("float32", good, kept=(1, 3)).failure
    assert "other visual tokens were kept" in judged("float16", good, kept=(1, 4)).failure
    assert "other visual tokens were kept" in judged("float16", good, kept=None).failure
    assert "not finite" in judged("float16", np.full_like(good, np.nan)).failure


def test_visual_tokens_that_score_alike_may_change_places_in_fp16():
    """Then the answer is held against the reference's answer for the same selection."""
    good = trajectory((3, 5, 1)).logits
    near = judged("float16", good, kept=(1, 3))
    assert near.failure == ""
    assert near.facts["prompts whose kept visual tokens differ"] == 1
    assert "is off by" in judged("float16", good, kept=(1, 3), forced_run=(3, 2, 1)).failure


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (((1, 2), (1,)), ((1, 3), (1,)), 0.01),
        (((1, 2), (1,)), ((1, 3), (3,)), 2.0),  # the second one is no near tie
        (((1, 2), (1,)), ((1, 3),), APART),
        (((1, 2), (1,)), ((1, 7), (1,)), APART),
    ],
)
def test_every_selection_must_be_a_near_tie(ours, theirs, expected):
    """Scores are those that the reference has where the first selection was theirs."""
    scores = {1: 2.0, 2: 0.0, 3: -0.01, 4: -2.0}, {1: 1.0, 3: -1.0}
    spreads = [np.std(list(each.values())) for each in scores]
    found = selection_margin(SelectionMargins(scores), selected(*ours), selected(*theirs))
    assert found * spreads[expected > 1] == pytest.approx(expected)


def test_of_rows_with_gates_half_a_tensor_must_be_near():
    kinds = {"float16", GATES}
    assert bounds_of(kinds) == replace(BOUNDS["float16"], whole=0.5, share=0.5)
    assert bounds_of({"float32", GATES}) == BOUNDS["float32"]
    want, far = np.arange(10.0), np.arange(10) >= 6
    for wrong, passes in ((far, True), (~far, False)):
        error = tensor_error("it", want + 9 * wrong, want, share=0.5)
        assert (first_wrong([error], bounds_of(kinds).whole) == "") == passes


PROBE = Probe(first=1, cosine=0.9, contribution=1.0, exit_cosine=0.98)
READINGS = {  # of three visual tokens; spread of the norms in layer 2: 1
    1: ProbeReading({0: 0.95, 1: 0.99, 2: 0.901}, {0: 0.5, 1: 0.2, 2: 0.4}),
    2: ProbeReading({0: 0.80, 1: 0.85, 2: 0.99}, {0: 1.0 + 1.5**0.5, 1: 1.0, 2: 1.0 - 1.5**0.5}),
    3: ProbeReading({0: 0.95, 1: 0.979}, {0: 1.0, 1: 1.0}),
}
OURS = Selection((0, 1), 2, None)


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (OURS, 0.0),
        (Selection((0,), 2, None), 0.0),  # token 1 lies on the threshold
        (Selection((1,), 2, None), 1.5**0.5),  # token 0 is far above it
        (Selection((0, 7), 2, None), APART),
        (Selection((2,), 1, None), 0.001 / 0.1),  # layer 1 nearly called for a selection
        (Selection(None, None, None), 0.1 / 0.1),  # layer 2 clearly did
        (Selection((0, 1), 2, 3), (0.98 - 0.95) / 0.02),
    ],
)
def test_choices_by_thresholds_differ_as_readings_lie_on_them(theirs, expected):
    margins = SelectionMargins(probe=PROBE, readings=READINGS)
    assert selection_margin(margins, OURS, theirs) == pytest.approx(expected)


def test_a_led_decision_chooses_what_it_is_led_to():
    positions = np.array([4, 5, 6, 7])
    for selection in (
        Selection((5, 7), 3, 6),
        Selection((), 2, 4),  # with no token left every layer is quiet
        Selection(None, None, None),
        Selection((4,), 1, 3),
    ):
        decision = Decision(PROBE)
        for layer in range(PROBE.first, 8):
            if decision.settled:
                break
            at = positions if decision.kept is None else positions[decision.kept]
            real = np.full((1, len(at)), 0.5, np.float32)
            cosines, norms = forced_readings(PROBE, selection, layer, at, real, real)
            decision.read(layer, cosines[0], norms[0])
        kept = (
            None if decision.kept is None else tuple(int(one) for one in positions[decision.kept])
        )
        assert Selection(kept, decision.trigger, decision.exit) == selection


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["visipruner-code", "visipruner-adaptive"])
def test_plans_that_decide_per_prompt_in_fp16(tmp_path, plan):
    """Their thresholds are read in FP16: what lies on one may fall on either side."""
    bundle = make_bundle("demo", plan=plan, target="orin-jp72", out=tmp_path)
    report = run(bundle, 6, model="demo")
    wrong = {record.name: record.reason for record in report.checks if record.status == FAILED}
    assert not wrong
    assert {"half answers", "answers"} <= {r.name for r in report.checks if r.status == PASSED}


def test_errors_are_relative_to_the_spread():
    want = np.array([0.0, 10.0, 20.0, 30.0])
    error = tensor_error("it", np.array([0.0, 10.0, 20.5, 30.0]), want)
    assert error.largest == pytest.approx(0.5)
    assert error.relative == pytest.approx(0.5 / want.std())
    assert tensor_error("it", np.array([2, 3]), np.array([2, 5])).relative == 2
    flat = tensor_error("it", np.full(4, 1.5), np.ones(4))
    assert (flat.spread, flat.relative) == (0, pytest.approx(0.5))
    assert tensor_error("it", np.array([np.inf]), np.array([1.0])).relative is None


def test_another_picture_is_beyond_every_tolerance(built, folder):
    """What the bounds are for: one picture's answer does not pass for another's."""
    from visistage import runtime

    bundle, _ = built("rtx")
    one, other = chosen("toy", None, 2)
    with runtime.load(bundle.path, backend="onnxruntime") as session:
        logits = [session.score(sample.image, one.prompt, ()) for sample in (one, other)]
    error = tensor_error("logits", logits[1], logits[0])
    assert error.relative > 2 * BOUNDS["float16"].whole


def test_whatever_a_library_raises_fails_its_check_only():
    def broken():
        raise RuntimeError("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF")

    record = run_check(Check("it", "this and that", "equal", broken))
    assert (record.status, "INVALID_PROTOBUF" in record.reason) == (FAILED, True)
    absent = run_check(Check("it", "this and that", "equal", broken, ("no_such_module",)))
    assert (absent.status, "no_such_module" in absent.reason) == (IMPOSSIBLE, True)


# --- prompts, report and command ------------------------------------------------------------------


def test_prompts_are_the_models_own_or_general(tmp_path):
    assert len(chosen("demo", None, None)) == DEFAULT_SAMPLES
    assert len({sample.prompt for sample in chosen("demo", None, 4)}) == 4
    general = chosen("llava-7b", None, None)
    assert len({(sample.prompt, sample.image) for sample in general}) == DEFAULT_SAMPLES
    assert all(sample.image.is_file() for sample in general)
    data = tmp_path / "mine.jsonl"
    data.write_text('{"image": "1.png", "prompt": "How many?", "answer": "2"}\n' * 3)
    assert [sample.name for sample in chosen("demo", data, 2)] == ["mine.jsonl:1", "mine.jsonl:2"]
    with pytest.raises(DataError, match="cannot read"):
        chosen("demo", tmp_path / "absent.jsonl", None)


def test_pictures_that_cannot_be_read_are_the_users_to_mend(built, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"image": "absent.png", "prompt": "How many?", "answer": "2"}\n')
    bundle, _ = built("cpu")
    with pytest.raises(ImageError, match=r"absent\.png"):
        verify(bundle, chosen("toy", data, None))


def test_pictures_are_taken_in_every_form(built, folder, tmp_path):
    """Hugging Face is asked about the picture that the runtime reads, whatever it comes as."""
    bundle, _ = built("cpu")
    file, pixels = tmp_path / "1.png", picture(3)
    clear = np.dstack([pixels, picture(4)[..., 0]])  # what is clear is white
    Image.fromarray(clear).save(file)
    forms = [file, file.read_bytes(), BytesIO(file.read_bytes()), Image.open(file), clear, pixels]
    with load(bundle.path) as session:
        forms.append(session.open(pixels))
        session.save_image(pixels, tmp_path / "1.safetensors")
    samples = [Sample(str(at), form, "Why?", "") for at, form in enumerate(forms)]
    origin = open_origin(bundle, str(folder / "toy"))
    with VerifyTarget(bundle, samples, origin, max_tokens=2) as target:
        result = compare_dense(target)
    assert (result.failure, len(result.errors)) == ("", len(forms))
    saved = Sample("1", tmp_path / "1.safetensors", "Why?", "")
    with pytest.raises(DataError, match="of an image, not the image, which is needed here"):
        verify(bundle, [saved], model=str(folder / "toy"), max_tokens=2)


def test_the_page_and_the_json_hold_everything(built, tmp_path):
    _, report = built("rtx")
    report.write(tmp_path)
    text = (tmp_path / PAGE_FILE).read_text()
    data = json.loads((tmp_path / JSON_FILE).read_text())
    assert data["passed"] is True
    assert len(data["rungs"]) == len(report.checks)
    for record in report.checks:
        assert f"| {record.name} | {record.compares} | {record.status} |" in text
        if record.status in (PASSED, FAILED):
            assert f"- {record.name}: {record.rule}" in text
        else:
            assert f"- {record.name}: {record.reason}" in text
    assert "stage0.onnx" in text
    worst = max((e for record in report.checks for e in record.errors), key=lambda e: e.relative)
    listed = text.split("## Largest errors by tensor")[1]
    assert f"| {worst.tensor} |" in listed.splitlines()[6]
    assert "| cores |" in text
    assert data["versions"]["onnxruntime"]
    assert str(tmp_path) not in text + json.dumps(data)
    assert sorted(file.name for file in tmp_path.iterdir()) == [JSON_FILE, PAGE_FILE]


def test_a_failed_report_says_so_first():
    bad = CheckRecord("it", "this | that", "equal", FAILED, "they are not", 0.1, errors=(
        TensorError("fine", 0.1, 1.0, 0.1), TensorError("gone", None, None, None),
    ))  # fmt: skip
    report = VerifyReport({"model": "toy"}, (bad,), {}, {})
    text = page(report)
    assert "**Failed: it.**" in text.splitlines()[2]
    assert "this \\| that" in text
    assert "not finite (gone)" in text
    with pytest.raises(ParityError, match=r"check 'it' failed .*Expected: equal.*/x/verify\.md"):
        require_passed(report, "/x/verify.md", "visistage build x")
    assert verify_table(report, "/x/verify.md")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / f"{JSON_FILE}.partial").mkdir()
    with pytest.raises(BundleError, match="cannot be written"):
        VerifyReport({}, (), {}, {}).write(tmp_path)


def command(*arguments):
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def test_the_command_leaves_its_report_and_ends_well(copy, folder):
    bundle = copy("cpu")
    done = command(bundle.path, "--model", folder / "toy", "--samples", 1, "--max-tokens", 3)
    assert done.exit_code == 0, done.output
    assert "graph stage1" in done.stderr
    assert "hugging face" in done.stdout
    assert str(bundle.path / PAGE_FILE) in done.stdout
    assert json.loads((bundle.path / JSON_FILE).read_text())["passed"] is True


def test_the_command_ends_with_one_error_and_its_report(copy):
    bundle = copy("cpu")
    bundle.file("stage1.onnx").write_bytes(b"")
    done = command(bundle.path, "--samples", 1, "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["passed"] is False
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    for word in ("check 'files' failed", "stage1.onnx", "Expected", "visistage build", PAGE_FILE):
        assert word in line
    assert "**Failed: files.**" in (bundle.path / PAGE_FILE).read_text()
