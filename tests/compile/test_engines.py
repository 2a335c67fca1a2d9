"""Engines compiled by TensorRT-RTX, which needs no GPU: every graph, every failure, every kill."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from visistage.cli.main import main
from visistage.compile.build import make_bundle
from visistage.compile.engines import engines as trt_engines
from visistage.compile.engines import worker
from visistage.compile.engines.engines import can_compile, compile_engines, job_of
from visistage.compile.engines.worker_process import run_worker
from visistage.compile.export.static_shapes import DECOMPOSABLE
from visistage.graphs.bundle import MANIFEST, Bundle
from visistage.graphs.caches import stage_caches
from visistage.graphs.engine_index import Engines
from visistage.graphs.engine_spec import engine_specs_of
from visistage.graphs.errors import BundleError, EngineError, MissingDependencyError, TargetError
from visistage.graphs.targets import TARGETS, TENSORRT, TENSORRT_RTX
from visistage.runtime.device import engine_trt
from visistage.runtime.device import tensorrt as flavours
from visistage.runtime.device.engine_trt import check_machine
from visistage.runtime.device.tensorrt import TensorRtVariant, find_trt_variant
from visistage.runtime.hardware import GpuInfo, find_gpu
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.methods import Built

RTX = find_trt_variant(TENSORRT_RTX)
pytestmark = pytest.mark.skipif(RTX is None, reason="pip install -e '.[rtx]' (Linux only)")

SMS = [(8, 6), (12, 0)]
PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"


@pytest.fixture(scope="module")
def toy_bundle(tmp_path_factory):
    """A small bundle for RTX, its engines compiled."""
    folder = tmp_path_factory.mktemp("toy")
    checkpoint = toy.make_checkpoint(folder / "toy")
    bundle = make_bundle(
        str(checkpoint), plan=PLAN, target="rtx", contexts=(128,), out=folder / "out"
    )
    compile_engines(bundle, capabilities=SMS)
    return bundle


@pytest.fixture
def copy(toy_bundle, tmp_path):
    """The same, to be spoilt."""
    return Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "bundle"))


# --- what is built --------------------------------------------------------------------------------


def test_fp32_is_not_computed_in_tf32(toy_bundle, tmp_path, monkeypatch):
    flags = []

    def build(trt_variant, builder, network, config, output):
        flags.append(config.get_flag(trt_variant.module.BuilderFlag.TF32))

    monkeypatch.setattr(worker, "build_engine", build)
    spec = engine_specs_of(toy_bundle.manifest)[0]
    job = job_of(toy_bundle, spec, RTX, SMS, tmp_path / "engine")
    with pytest.raises(EngineError):  # nothing was built
        worker.compile_engine(RTX, job, io.StringIO())
    assert flags == [False]


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        *("dense", "visipruner:entry=scope-36", "fastv", "v2drop", "sparsevlm"),
        "vica:layers=0-1-4,prefix=frozen",
    ],
)
def test_every_graph_of_the_demo_is_compiled_in_fp16(tmp_path, plan):
    bundle = make_bundle("demo", plan=plan, target="rtx", out=tmp_path)
    engines = compile_engines(bundle, capabilities=SMS)
    text = bundle.manifest.config.text
    assert {one.graph for one in engines.engines} == set(bundle.manifest.graphs)
    assert engines.capabilities == tuple(SMS)
    layers = sum(one.fused_attention for one in engines.engines if one.graph.startswith("stage"))
    caches = sum(one.caches_in_place for one in engines.engines)
    assert layers == text.layers
    assert caches == 2 * text.layers
    for one in engines.engines:
        weighty = one.graph.startswith(("vision", "stage"))
        assert one.nbytes == (engines.folder / one.file).stat().st_size
        assert one.nbytes > (1 << 20 if weighty else 1 << 16)
        assert one.decomposable_attention == 0
        assert one.precisions["HALF"] > 0
        assert one.peak_bytes >= one.peak_anonymous_bytes > 0


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    return Built(tmp_path_factory.mktemp)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("late entry", "hidrop", "frozen rows", "depth", "vica", "internal fusion"),
        *("skipgpt", "skipgpt, capacity", "dllm", "mod", "mod, capacity"),
    ],
)
def test_every_graph_of_every_method_is_compiled_in_fp16(methods, name):
    bundle = methods.bundle(name, "rtx", contexts=(128,))
    engines = compile_engines(bundle, capabilities=SMS)
    assert {one.graph for one in engines.engines} == set(bundle.manifest.graphs)
    assert sum(one.decomposable_attention for one in engines.engines) == 0
    stages = [one for one in engines.engines if one.graph.startswith("stage")]
    attending = [layer for stage in bundle.manifest.plan.stages for layer in stage.attention_layers]
    assert sum(one.fused_attention for one in stages) == len(attending)
    caches = sum(map(len, stage_caches(bundle.manifest.plan)))
    assert sum(one.caches_in_place for one in stages) == caches


@pytest.mark.slow
def test_integers_ahead_are_compiled(methods):
    """Keys of the layer behind an edge come back row by row, as INT8."""
    given = {"calibration": methods.calibration("hidrop"), "precision": "fp16:cache=int8"}
    bundle = methods.bundle("hidrop", "rtx", contexts=(128,), **given)
    engines = compile_engines(bundle, capabilities=SMS)
    assert {one.graph for one in engines.engines} == set(bundle.manifest.graphs)
    assert all(one.caches_in_place == 0 for one in engines.engines)


@pytest.mark.slow
def test_the_portable_lowering_is_compiled_too(tmp_path):
    """RTX stands in for TensorRT 10.3: the same parser family, and basic operators only."""
    bundle = make_bundle("demo", plan="visipruner", target="orin-jp62", out=tmp_path)
    assert can_compile(TARGETS["orin-jp62"], None) is not None
    for engine_spec in engine_specs_of(bundle.manifest):
        job = job_of(bundle, engine_spec, RTX, [(8, 6)], tmp_path / "engine")
        outcome = run_worker(job, engine_spec.name, tmp_path / "log")
        assert outcome.facts["fused_attention"] == 0
        model = onnx.load(bundle.path / engine_spec.source, load_external_data=False)
        assert {opset.version for opset in model.opset_import} == {20}
        used = {node.op_type for node in model.graph.node}
        assert used <= TARGETS["orin-jp62"].operators


def test_fp32_engines_take_attention_apart(tmp_path):
    checkpoint = toy.make_checkpoint(tmp_path / "toy", layers=2)
    bundle = make_bundle(
        str(checkpoint), plan="dense", target="rtx", precision="fp32", out=tmp_path
    )
    engines = compile_engines(bundle)
    assert sum(one.decomposable_attention for one in engines.engines) == 2 + 2  # tower, decoder
    assert sum(one.fused_attention for one in engines.engines) == 0
    with load(bundle.path, backend="onnxruntime") as session:
        assert session.infer(picture(), "What?", max_tokens=2).tokens


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_what_the_compiler_reads_differs_from_what_onnx_runtime_ran_in_sizes_only(
    tmp_path, precision
):
    checkpoint = toy.make_checkpoint(tmp_path / "toy")
    bundle = make_bundle(
        str(checkpoint), plan=PLAN, target="rtx", precision=precision, contexts=(128,), out=tmp_path
    )
    sizes = {"B": 1, "S": 128}
    hints = 0
    for fact in bundle.manifest.graphs.values():
        ours = onnx.load(bundle.path / fact.file, load_external_data=False)
        (variant,) = fact.variants.values()
        theirs = onnx.load(bundle.path / variant, load_external_data=False)
        for node in theirs.graph.node:
            for attribute in [a for a in node.attribute if a.name == DECOMPOSABLE]:
                node.attribute.remove(attribute)
                assert (node.op_type, precision) == ("Attention", "fp32")
                hints += 1
        later = fact.spec.has("S") and stage_of_slots(bundle, variant)
        for model in (ours, theirs):
            graph = model.graph
            for value in (*graph.input, *graph.output, *graph.value_info):
                for dim in value.type.tensor_type.shape.dim:
                    if dim.dim_param in sizes:
                        fixed = (later or 128) if dim.dim_param == "S" else 1
                        dim.Clear()
                        dim.dim_value = fixed
            kept = sorted(graph.value_info, key=lambda value: value.name)
            del graph.value_info[:]
            graph.value_info.extend(kept)
        assert ours == theirs, fact.file
    assert hints == (2 + 4 if precision == "fp32" else 0)


def stage_of_slots(bundle, variant):
    return next(r.slots for r in engine_specs_of(bundle.manifest) if r.source == variant)


def picture():
    return np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8)


# --- what is kept, what is refused ----------------------------------------------------------------


def test_compiling_again_keeps_what_is_there(copy):
    before = {file.name: file.stat().st_mtime_ns for file in (copy.path / "engines").iterdir()}
    engines = compile_engines(copy, capabilities=SMS)
    after = {file.name: file.stat().st_mtime_ns for file in (copy.path / "engines").iterdir()}
    assert {n: t for n, t in after.items() if n.endswith(".engine")} == {
        n: t for n, t in before.items() if n.endswith(".engine")
    }
    engines.check(rehash=True)
    other = compile_engines(copy, capabilities=[(8, 9)])  # another GPU, other engines
    assert other.capabilities == ((8, 9),)


def test_a_changed_byte_is_noticed_and_mended(copy):
    engines = Engines.open(copy)
    engines.check()
    file = engines.folder / engines.engines[1].file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=rf"{file.name} is not the file.*visistage build"):
        Engines.open(copy).check()
    compile_engines(copy, capabilities=SMS)  # what the message says to type
    Engines.open(copy).check(rehash=True)
    file.unlink()
    with pytest.raises(BundleError, match=rf"{file.name} is missing"):
        Engines.open(copy).check()
    compile_engines(copy, capabilities=SMS)
    Engines.open(copy).check(rehash=True)


def test_an_index_that_cannot_be_read_or_is_foreign(copy):
    index = copy.path / "engines" / "engines.json"
    good = index.read_text()
    for bad in ("", "[]", "{}", good[:300]):
        index.write_text(bad)
        with pytest.raises(EngineError, match=r"engines\.json.*visistage build"):
            Engines.open(copy)
    index.write_text(good.replace('"format": 1', '"format": 9'))
    with pytest.raises(EngineError, match="has format 9, this version reads format 1"):
        Engines.open(copy)
    index.write_text(good)
    manifest = copy.path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"source": "', '"source": "0'))
    with pytest.raises(EngineError, match="compiled from another build of this bundle"):
        Engines.open(Bundle.open(copy.path))


def test_wrong_machines_are_refused_with_found_and_expected(toy_bundle):
    engines = Engines.open(toy_bundle)
    ampere, hopper = (GpuInfo("a GPU", sm, 1 << 30) for sm in ((8, 6), (9, 0)))
    check_machine(engines, RTX, ampere)
    for trt_variant, device, message in (
        (None, ampere, "is not installed here"),
        (RTX, None, "this machine has none.*--backend onnxruntime"),
        (RTX, hopper, r"compiled for sm_86, sm_120, found a GPU \(sm_90\).*visistage build"),
        (other_version(), ampere, r"by tensorrt_rtx .*, found 9\.9\.9: they are not portable"),
    ):
        with pytest.raises((EngineError, MissingDependencyError), match=message):
            check_machine(engines, trt_variant, device)


def other_version():
    return replace(RTX, module=type("Other", (), {"__version__": "9.9.9"}))


@pytest.mark.parametrize(
    ("target", "capabilities", "error", "message"),
    [
        ("rtx", [(8, 7)], TargetError, "does not compile for sm_87. It compiles for: .*SM86"),
        ("dgx-spark", [(8, 6)], TargetError, "is sm_121, not sm_86"),
        ("h100", [], MissingDependencyError, "tensorrt, which is not installed"),
        ("cpu", [], TargetError, "there is nothing to compile"),
    ],
)
def test_targets_that_cannot_be_compiled_here(copy, target, capabilities, error, message):
    bundle = replace(copy, manifest=replace(copy.manifest, target=target))
    with pytest.raises(error, match=message):
        compile_engines(bundle, capabilities=capabilities)


def test_a_compiler_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(flavours, "find_trt_variant", lambda _: other_version())
    with pytest.raises(TargetError, match=r"wants tensorrt_rtx 1\.7 or newer.*found 9\.9\.9"):
        flavours.load_trt_variant(TARGETS["rtx"])


def test_tensorrt_proper_compiles_on_its_own_gpu_only(monkeypatch):
    proper = TensorRtVariant(
        TENSORRT, type("TensorRT", (), {"__version__": "10.16.2"}), False, True
    )
    monkeypatch.setattr(trt_engines, "find_trt_variant", lambda _: proper)
    orin, h100 = TARGETS["orin-jp72"], TARGETS["h100"]
    assert "there is none" in can_compile(orin, None)
    assert can_compile(orin, GpuInfo("Orin", (8, 7), 1 << 30)) is None
    assert "this GPU is sm_87, the target's sm_90" in can_compile(h100, GpuInfo("Orin", (8, 7), 1))


def test_what_shall_run_here_must_be_for_this_gpu(monkeypatch):
    """Compiling for other machines is another matter: it needs no GPU at all."""
    rtx, spark = TARGETS["rtx"], TARGETS["dgx-spark"]
    ampere, hopper = (GpuInfo("a GPU", sm, 1 << 30) for sm in ((8, 6), (9, 0)))
    assert can_compile(rtx, hopper) is None
    assert can_compile(rtx, None, to_run_here=True) is None
    assert can_compile(rtx, ampere, to_run_here=True) is None
    why = can_compile(rtx, hopper, to_run_here=True)
    assert why.endswith("does not compile for this GPU, a GPU (sm_90)")
    assert "the target's sm_121" in can_compile(spark, ampere, to_run_here=True)
    for gpu in (ampere, hopper):
        monkeypatch.setattr(engine_trt, "find_gpu", lambda gpu=gpu: gpu)
        assert (why in engine_trt.missing(rtx)) == (gpu is hopper)


def test_no_gpu_is_no_error():
    assert find_gpu() is None or find_gpu().memory_bytes > 0


def test_a_full_disk_is_noticed_first(copy, monkeypatch):
    from visistage.compile import disk
    from visistage.graphs.errors import CapacityError

    shutil.rmtree(copy.path / "engines")
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: full)
    with pytest.raises(CapacityError, match="the set of engines needs"):
        compile_engines(copy)
    assert not list(copy.path.rglob("*.engine*"))


# --- from the command line ------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(main, [str(one) for one in arguments])


def test_inspect_shows_the_engines(toy_bundle):
    facts = json.loads(run("inspect", toy_bundle.path, "--json").stdout)["engines"]
    assert facts["gpus"] == "sm_86, sm_120"
    by_name = {one["name"]: one for one in facts["engines"]}
    stage = by_name["stage0.context128"]
    text = toy_bundle.manifest.config.text
    row = 2 * 2 * text.kv_heads * text.head_dim  # key and value, two bytes a number
    assert stage["cache_bytes"] == 2 * 128 * row  # two layers
    assert facts["memory_bytes"]["128"] == sum(
        one["nbytes"] + one["cache_bytes"] for one in facts["engines"]
    )
    table = run("inspect", toy_bundle.path).stdout
    assert "stage0.context128" in table
    assert "4 in place" in table
    assert "1-8" in table


def test_engines_stops_at_a_portable_bundle_where_it_must(tmp_path):
    checkpoint = toy.make_checkpoint(tmp_path / "toy", layers=2)
    common = ("engines", "--model", checkpoint, "--plan", "dense", "--out", tmp_path / "out")
    for options, why in (
        (("--target", "rtx", "--portable"), "--portable was given"),
        (("--target", "orin-jp72"), "tensorrt is not installed"),
    ):
        done = run(*common, *options)
        assert done.exit_code == 0, done.stderr
        assert f"the bundle will be portable: {why}" in done.stderr
        path = Path(done.stdout.splitlines()[-1])
        assert Engines.open(Bundle.open(path)) is None
    compiled = run(*common, "--target", "rtx", "--json")  # the portable bundle is finished
    facts = json.loads(compiled.stdout)
    assert [step["name"][:7] for step in facts["steps"]] == ["engine "] * len(facts["engines"])
    again = run(*common, "--target", "rtx")
    assert "cached" in again.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "cpu", "--portable"], "--portable means nothing there"),
        (["--target", "cpu", "--sm", "86"], "--sm means nothing there"),
        (["--target", "cpu", "--context", "512"], "--context fixes nothing"),
        (["--target", "cpu", "--build-memory", "4GiB"], "--build-memory limits nothing"),
        (["--target", "orin-jp72", "--sm", "87"], "--sm cannot be honoured"),
        (["--target", "rtx", "--sm", "large"], "no compute capability"),
        (["--target", "rtx", "--context", "100000"], "a context of 100000 rows cannot be"),
        (["--target", "rtx", "--build-memory", "100MiB"], "Give more: --build-memory"),
    ],
)
def test_options_that_cannot_be_honoured(tmp_path, options, message):
    done = run("engines", "--model", "demo", "--out", tmp_path / "out", *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


# --- how compiling fails --------------------------------------------------------------------------


def job(model, tmp_path, **changes):
    """A worker's job for a small ONNX model."""
    onnx.save(model, tmp_path / "graph.onnx")
    names = {
        TensorProto.FLOAT16: "float16",
        TensorProto.FLOAT: "float32",
        TensorProto.INT64: "int64",
    }

    def dtypes(values):
        return {value.name: names[value.type.tensor_type.elem_type] for value in values}

    shapes = {
        value.name: [[dim.dim_value for dim in value.type.tensor_type.shape.dim]] * 3
        for value in model.graph.input
    }
    told = {
        "backend": TENSORRT_RTX,
        "source": str(tmp_path / "graph.onnx"),
        "output": str(tmp_path / "graph.engine"),
        "inputs": dtypes(model.graph.input),
        "outputs": dtypes(model.graph.output),
        "profiles": [shapes],
        "capabilities": [(8, 6)],
        "timing_cache": None,
    }
    return {**told, **changes}


def attention(inputs, dtype=TensorProto.FLOAT16, **attributes):
    """One attention node; ``nonpad`` is an integer, all else [1, 2, 8, 64]."""
    values = [
        helper.make_tensor_value_info(
            name,
            TensorProto.INT64 if name == "nonpad" else dtype,
            [1] if name == "nonpad" else [1, 2, 8, 64],
        )
        for name in dict.fromkeys(name for name in inputs if name)
    ]
    out = helper.make_tensor_value_info("y", dtype, [1, 2, 8, 64])
    node = helper.make_node("Attention", inputs, ["y"], **attributes)
    graph = helper.make_graph([node], "g", values, [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def test_a_good_graph_compiles(tmp_path):
    told = []
    outcome = run_worker(
        job(attention(["q", "k", "v"]), tmp_path), "engine 'g'", tmp_path / "log", told.append
    )
    data = (tmp_path / "graph.engine").read_bytes()
    assert outcome.facts["sha256"] == hashlib.sha256(data).hexdigest()
    assert outcome.facts["fused_attention"] == 1
    assert sum(told) == outcome.facts["steps"] > 0
    assert outcome.seconds > 0


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (attention(["q", "q", "q"]), {}, r"the compiler crashed \(SIG"),
        (attention(["q", "k", "v", "", "", "", "nonpad"]), {}, "an input was dropped.*nonpad"),
        (attention(["q", "k", "v"], softcap=2.0), {}, "the parser refuses the graph: .*softcap"),
        (
            attention(["q", "k", "v"], TensorProto.FLOAT),
            {},
            "Attention operation was not supported",
        ),
        (
            attention(["q", "k", "v"]),
            {"inputs": {"q": "float32"}},
            "other inputs than the contract",
        ),
        (attention(["q", "k", "v"]), {"outputs": {}}, "other outputs than the contract"),
        (attention(["q", "k", "v"]), {"backend": TENSORRT}, "tensorrt cannot be loaded"),
        (attention(["q", "k", "v"]), {"capabilities": [(8, 7)]}, "does not compile for sm_87"),
        (attention(["q", "k", "v"]), {"output": "/nowhere/x"}, "ended with code 1: .*nowhere"),
    ],
)
def test_every_failure_is_one_clear_error(tmp_path, model, changes, message):
    with pytest.raises(EngineError, match=message) as failure:
        run_worker(job(model, tmp_path, **changes), "engine 'stage0'", tmp_path / "the.log")
    said = str(failure.value)
    assert said.startswith("engine 'stage0' was not compiled: ")
    assert said.endswith(f"All the compiler said: {tmp_path / 'the.log'}")
    assert "\n" not in said
    assert (tmp_path / "the.log").is_file()


def test_a_worker_killed_for_memory_says_so(tmp_path, monkeypatch):
    """The kernel's way to say that memory is out is SIGKILL."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    real = subprocess.Popen
    monkeypatch.setattr(
        "visistage.compile.engines.worker_process.subprocess.Popen",
        lambda command, **options: real([sys.executable, "-c", code], **options),
    )
    with pytest.raises(EngineError, match=r"was killed.*memory runs out.*--build-memory"):
        run_worker({}, "engine 'x'", tmp_path / "log")


def test_a_timing_cache_is_kept_where_there_is_one(tmp_path):
    cache = tmp_path / "timing.cache"
    told = job(attention(["q", "k", "v"]), tmp_path, timing_cache=str(cache))
    for _ in range(2):
        assert run_worker(told, "engine 'g'", tmp_path / "log").facts["sha256"]
        assert cache.stat().st_size > 0
    cache.write_bytes(b"not a cache")
    assert run_worker(told, "engine 'g'", tmp_path / "log").facts["sha256"]


# --- killed at any moment -------------------------------------------------------------------------


@pytest.mark.slow
def test_builds_killed_at_any_moment_go_on(toy_bundle, tmp_path):
    """SIGKILL, ten times at random: every file under a final name is whole, the last run finishes.

    Bytes are held against what was noted of each engine, not against another compilation: on a busy
    machine the compiler was seen to give other bytes for equal input.
    """
    bundle = shutil.copytree(toy_bundle.path, tmp_path / "bundle")
    wanted = set(hashes(bundle / "engines"))
    shutil.rmtree(bundle / "engines")
    command = [sys.executable, "-m", "visistage", "build", str(bundle)]
    command += [part for sm in ("86", "120") for part in ("--sm", sm)]
    moments = random.Random(7)
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(moments.uniform(0.2, 3.0))
        process.kill()
        process.wait()
        process.stderr.close()
        Bundle.open(bundle).check(rehash=True)
        engines = Engines.open(Bundle.open(bundle))  # complete or not there at all
        if engines is not None:
            engines.check(rehash=True)
        for name, digest in hashes(bundle / "engines").items():
            noted = json.loads((bundle / "engines" / name).with_suffix(".json").read_text())
            assert noted["sha256"] == digest, name
    subprocess.run(command, check=True, capture_output=True)
    assert set(hashes(bundle / "engines")) == wanted
    assert not list(bundle.rglob("*.partial"))
    Engines.open(Bundle.open(bundle)).check(rehash=True)


def hashes(folder):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.engine")
    }


def test_the_compiler_dies_with_the_build(toy_bundle, tmp_path):
    """Nobody else would stop it, and the next build must not meet it."""
    bundle = shutil.copytree(toy_bundle.path, tmp_path / "bundle")
    shutil.rmtree(bundle / "engines")
    command = [sys.executable, "-m", "visistage", "build", str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (children := workers(process.pid)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return listed.read_text().split() if listed.exists() else []


def test_ctrl_c_while_compiling(toy_bundle, tmp_path):
    bundle = shutil.copytree(toy_bundle.path, tmp_path / "bundle")
    shutil.rmtree(bundle / "engines")
    command = [sys.executable, "-m", "visistage", "build", str(bundle)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(bundle.rglob("vision.engine*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert not (bundle / "engines" / "engines.json").exists()


# --- on the device --------------------------------------------------------------------------------

DEVICE_ONLY = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    names = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "polygraphy",
             "huggingface_hub", "yaml"}

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from visistage.cli.main import main
main()
"""


def device(*arguments):
    """The command line where neither torch nor onnx are installed."""
    command = [sys.executable, "-c", DEVICE_ONLY, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ})


def test_a_portable_bundle_is_finished_and_answers_on_the_device(toy_bundle, tmp_path):
    bundle = shutil.copytree(toy_bundle.path, tmp_path / "moved")
    shutil.rmtree(bundle / "engines")
    done = device("build", bundle, "--sm", "86", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engines"][0]["name"] == "vision"
    from PIL import Image

    Image.fromarray(picture()).save(tmp_path / "picture.png")
    question = ["infer", tmp_path / "picture.png", "What is it?", "--bundle", bundle, "--json"]
    rejected = device(*question)
    assert rejected.returncode == 2
    assert "--backend onnxruntime" in rejected.stderr
    answered = device(*question, "--backend", "onnxruntime", "--max-tokens", "4")
    assert answered.returncode == 0, answered.stderr
    with load(toy_bundle.path, backend="onnxruntime") as session:
        here = session.infer(tmp_path / "picture.png", "What is it?", max_tokens=4)
    assert json.loads(answered.stdout)["tokens"] == list(here.tokens)
    missing = device("engines", "--model", "demo")
    assert missing.returncode == 2
    assert "not installed" in missing.stderr


# --- TensorRT proper ------------------------------------------------------------------------------


def test_old_compilers_hand_back_the_whole_plan(tmp_path):
    """TensorRT 10.3 cannot stream: the bytes are the same, held in memory once more."""

    class Old:
        def build_serialized_network(self, network, config):
            return memoryview(b"a plan") if network else None

    proper = TensorRtVariant(TENSORRT, type("TensorRT", (), {"__version__": "10.3.0"}), False, True)
    digest = worker.build_engine(proper, Old(), "network", None, tmp_path / "engine")
    assert (tmp_path / "engine").read_bytes() == b"a plan"
    assert digest == hashlib.sha256(b"a plan").hexdigest()
    assert worker.build_engine(proper, Old(), None, None, tmp_path / "engine") is None


def test_timing_caches_are_kept_per_version(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    proper = TensorRtVariant(TENSORRT, type("TensorRT", (), {"__version__": "10.3.0"}), False, True)
    kept = trt_engines.timing_cache_file(proper)
    assert kept == tmp_path / "visistage" / "timing-tensorrt-10.3.0.cache"
    assert kept.parent.is_dir()
    assert trt_engines.timing_cache_file(RTX) is None  # there it does nothing
