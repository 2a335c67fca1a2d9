"""On a real GPU: the device itself, ONNX Runtime's CUDA provider, and engines compiled here.

Each test says what is missing where it cannot run.
"""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from visistage.compile.build import make_bundle
from visistage.compile.engines.engines import can_compile, compile_engines
from visistage.graphs.targets import TARGETS, TENSORRT, TENSORRT_RTX
from visistage.runtime.hardware import find_gpu
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture

GPU = find_gpu()
CUDA_CORE = importlib.util.find_spec("cuda") is not None
WHY = "no GPU, or no driver" if GPU is None else "pip install cuda-core 'cuda-bindings==13.*'"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPU is None or not CUDA_CORE, reason=WHY)]

PLANS = ["dense", "visipruner:shallow=1,t=1,e=2,keep=4"]


@pytest.fixture
def device():
    from visistage.runtime.device.cuda import CudaDevice

    one = CudaDevice()
    yield one
    one.close()


def test_bytes_go_up_across_and_down(device):
    from visistage.runtime.device.memory import Memory

    memory = Memory(device)
    source = np.arange(6 * 8, dtype=np.float32).reshape(1, 6, 8)
    array = memory.empty(source.shape, source.dtype)
    memory.write(array.address, source)
    assert np.array_equal(np.asarray(array[:, 2:5]), source[:, 2:5])
    other = memory.empty((6, 4), np.float32)
    device.zero(other.address, other.nbytes)
    device.copy_rows(other.address, 16, array.address + 16, 32, 16, 6)
    assert np.array_equal(np.asarray(other), source[0, :, 4:])
    large = np.random.default_rng(0).standard_normal(3 << 20).astype(np.float32)
    there = memory.empty(large.shape, large.dtype)
    memory.write(there.address, large)
    assert np.array_equal(np.asarray(there), large)


def test_what_is_captured_is_done_when_launched(device):
    from visistage.runtime.device.memory import Memory

    memory = Memory(device)
    one, other = (memory.empty((1024,), np.float32) for _ in range(2))
    memory.write(one.address, np.zeros(1024, np.float32))
    memory.write(other.address, np.zeros(1024, np.float32))
    graph = device.capture(lambda: device.copy(other.address, one.address, one.nbytes))
    memory.write(one.address, np.ones(1024, np.float32))
    assert not np.asarray(other).any()
    graph.launch()
    assert np.asarray(other).all()
    start = device.record()
    graph.launch()
    stop = device.record()
    stop.wait()
    assert 0 < stop.since(start) < 1000


def answers(bundle, **options):
    asked = [(picture(1), "What is it?"), (None, "Hello"), (picture(2), "Which? " * 12)]
    asked += [(picture(1), "And now?"), ([picture(2), picture(1)], "Both?")]
    with load(bundle.path, **options) as session:
        session.eos = frozenset()
        scores = session.score(picture(1), "What is it?", [5, 6, 7])
        tokens = [session.infer(*given, max_tokens=24).tokens for given in asked]
        stages = getattr(session.executor, "engine_set", None)
        rejected = [stage.rejected for stage in stages.stages] if stages else []
    return scores, tokens, rejected


def check(bundle):
    """The device's numbers against the CPU's: equal within FP16, most tokens the same."""
    expected, tokens, _ = answers(bundle, backend="onnxruntime")
    found, ours, rejected = answers(bundle)
    spread = np.ptp(expected, axis=1).max()
    assert np.abs(found - expected).max() < 2e-2 * spread
    assert [one[0] for one in ours] == [one[0] for one in tokens]
    pairs = [pair for both in zip(tokens, ours, strict=True) for pair in zip(*both, strict=True)]
    same = [a == b for a, b in pairs]
    assert np.mean(same) > 0.5  # a near tie may tip, and an answer differs from there on
    return rejected


@pytest.mark.parametrize("plan", PLANS)
def test_onnx_runtime_on_cuda_says_what_the_cpu_says(tmp_path, plan):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("pip install onnxruntime-gpu: this ONNX Runtime has no CUDA provider")
    checkpoint = toy.make_checkpoint(tmp_path / "toy", kv_heads=2)
    check(make_bundle(str(checkpoint), plan=plan, target="cuda", out=tmp_path))


CAPTURED = """
import json, sys
from visistage.runtime.session import load
from visistage.tests.support.asking import picture
found = []
for capture in (False, True):
    with load(sys.argv[1], capture=capture) as session:
        session.eos = frozenset()
        asked = [(picture(1), "What is it?"), (picture(1), "And now?")]
        found.append([session.infer(*given, max_tokens=24).tokens for given in asked])
        stages = session.executor.engine_set.stages
        found.append([capture, all(stage.replays[1].graph is not None for stage in stages)])
print(json.dumps(found))
"""


@pytest.mark.parametrize("plan", PLANS)
def test_what_onnx_runtime_does_in_a_step_can_be_captured(tmp_path, plan):
    """In a process of its own: where a capture goes wrong, the driver may end it."""
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("pip install onnxruntime-gpu: this ONNX Runtime has no CUDA provider")
    checkpoint = toy.make_checkpoint(tmp_path / "toy", kv_heads=2)
    bundle = make_bundle(str(checkpoint), plan=plan, target="cuda", out=tmp_path)
    command = [sys.executable, "-c", CAPTURED, str(bundle.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    direct, never, replayed, always = json.loads(done.stdout.splitlines()[-1])
    assert (never, always) == ([False, False], [True, True])
    assert direct == replayed  # the same kernels over the same numbers


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("backend", [TENSORRT, TENSORRT_RTX])
def test_engines_compiled_here_say_what_the_cpu_says(tmp_path, plan, backend):
    targets = [target for target in TARGETS.values() if target.backend == backend]
    reasons = {target.name: can_compile(target, GPU, to_run_here=True) for target in targets}
    fitting = [name for name, why in reasons.items() if why is None]
    if not fitting:
        pytest.skip("; ".join(f"{name}: {why}" for name, why in reasons.items()))
    checkpoint = toy.make_checkpoint(tmp_path / "toy", kv_heads=2)
    bundle = make_bundle(
        str(checkpoint), plan=plan, target=fitting[0], contexts=(256, 1024), out=tmp_path
    )
    capabilities = [GPU.capability] if backend == TENSORRT_RTX else []
    compile_engines(bundle, capabilities=capabilities)
    assert check(bundle) == [None] * len(bundle.manifest.plan.stages)  # all were captured
