"""The device over stand-ins for cuda-core and TensorRT, which do the work in this machine's memory.

The stand-in for cuda-core copies bytes and keeps what is captured until it is launched, so a bundle
runs through the device as it is; what only a GPU can show is in ``test_gpu``.
"""

import builtins
import ctypes
import enum
import gc
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from visistage.compile.build import make_bundle
from visistage.graphs.errors import CapacityError, EngineError, MissingDependencyError
from visistage.graphs.targets import TENSORRT_RTX
from visistage.runtime.device import engine_ort
from visistage.runtime.device.cuda import CudaDevice
from visistage.runtime.device.engine_ort import OrtApi
from visistage.runtime.device.engine_trt import TrtApi
from visistage.runtime.device.protocol import CaptureError, Compiled
from visistage.runtime.device.tensorrt import TensorRtVariant, find_trt_variant
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.stand_ins import GPU
from visistage.tests.support.trt_module import SPEC, STREAM, Trt

DRIVER = ["cuMemcpyAsync", "cuMemcpy2DAsync", "cuMemsetD8Async", "cuMemGetInfo", "cuMemPoolTrimTo"]


class Core:
    """``cuda.core`` and ``cuda.bindings.driver``, with one stream that works at once.

    captured: work of the capture under way, or None. open: builders that are not closed.
    """

    def __init__(self, free=8 << 30):
        self.free = free
        self.captured, self.mode = None, None
        self.open, self.closed = set(), []
        self.done = 0  # calls of the driver
        self.synchronised = False
        self.fail = None  # the name of a call that is to fail
        self.current = set()  # threads that have a context
        self.core, self.driver = ModuleType("cuda.core"), ModuleType("cuda.bindings.driver")
        self.core.Device = lambda number: self._device(number)
        self.core.EventOptions = lambda timing_enabled: ("timed", timing_enabled)
        pinned = SimpleNamespace(allocate=lambda nbytes: self._check_thread() or Memory(nbytes))
        self.core.LegacyPinnedMemoryResource = lambda: pinned
        self.driver.CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
        self.driver.CUDA_MEMCPY2D = SimpleNamespace
        self.pool = SimpleNamespace(
            handle="pool",
            attributes=SimpleNamespace(reserved_mem_current=0, used_mem_current=0),
        )
        for name in DRIVER:
            setattr(self.driver, name, self._call(name))

    def install(self, monkeypatch):
        package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
        package.core, package.bindings, bindings.driver = self.core, bindings, self.driver
        for name, module in {
            "cuda": package,
            "cuda.core": self.core,
            "cuda.bindings": bindings,
            "cuda.bindings.driver": self.driver,
        }.items():
            monkeypatch.setitem(sys.modules, name, module)
        return self

    def _device(self, number):
        if number:
            raise RuntimeError("CUDA_ERROR_INVALID_DEVICE")
        stream = SimpleNamespace(
            handle=STREAM,
            sync=lambda: setattr(self, "synchronised", True),
            close=lambda: self.closed.append("stream"),
            record=lambda options: Event(self, options),
            create_graph_builder=lambda: Builder(self, stream),
        )
        return SimpleNamespace(
            name="Stand-in",
            set_current=lambda: self.current.add(threading.get_ident()),
            create_stream=lambda: stream,
            memory_resource=self.pool,
            allocate=self._allocate,
        )

    def _check_thread(self):
        assert threading.get_ident() in self.current, "CUDA_ERROR_INVALID_CONTEXT"

    def _allocate(self, nbytes, stream):
        self._check_thread()
        assert stream.handle == STREAM
        if nbytes > self.free:
            raise MemoryError("CUDA_ERROR_OUT_OF_MEMORY")
        return Memory(nbytes)

    def _call(self, name):
        def call(*args):
            self.done += 1
            self._check_thread()
            if self.fail == name:
                return (Code.CUDA_ERROR_LAUNCH_FAILED,)
            if self.captured is None:
                getattr(self, f"_{name}")(*args)
            else:
                self.captured.append((name, args))
            free = (self.free, 16 << 30) if name == "cuMemGetInfo" else ()
            return (Code.CUDA_SUCCESS, *free)

        return call

    def _cuMemcpyAsync(self, to, source, nbytes, stream):
        assert stream == STREAM
        ctypes.memmove(to, source, nbytes)

    def _cuMemcpy2DAsync(self, plan, stream):
        assert stream == STREAM
        assert plan.srcMemoryType == plan.dstMemoryType == 2
        for row in range(plan.Height):
            to, source = plan.dstDevice + row * plan.dstPitch, plan.srcDevice + row * plan.srcPitch
            ctypes.memmove(to, source, plan.WidthInBytes)

    def _cuMemsetD8Async(self, to, value, nbytes, stream):
        assert stream == STREAM
        ctypes.memset(to, value, nbytes)

    def _cuMemGetInfo(self):
        """Answered by the caller."""

    def _cuMemPoolTrimTo(self, pool, keep):
        assert (pool, keep) == ("pool", 0)
        own = self.pool.attributes
        self.free += own.reserved_mem_current - own.used_mem_current
        own.reserved_mem_current = own.used_mem_current


class Code(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_LAUNCH_FAILED = 719


class Memory:
    def __init__(self, nbytes):
        self.array = np.full(nbytes + 256, 0xFF, np.uint8)
        self.handle = self.array.ctypes.data + -self.array.ctypes.data % 256


class Event:
    def __init__(self, core, options):
        assert options == ("timed", True)
        core._check_thread()
        self.at = core.done

    def sync(self):
        """Everything has been done already."""

    def __sub__(self, earlier):
        return float(self.at - earlier.at)


class Builder:
    def __init__(self, core, stream):
        self.core, self.stream = core, stream
        core._check_thread()
        core.open.add(self)

    def begin_building(self, mode):
        self.core.captured, self.core.mode = [], mode

    def end_building(self):
        self.work, self.core.captured = self.core.captured, None

    def complete(self):
        if self.core.fail == "complete":
            raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        return SimpleNamespace(launch=self._launch)

    def close(self):
        self.core.open.discard(self)

    def _launch(self, stream):
        assert stream.handle == STREAM
        for name, args in self.work:
            getattr(self.core, f"_{name}")(*args)


@pytest.fixture
def core(monkeypatch):
    return Core().install(monkeypatch)


# --- cuda-core ------------------------------------------------------------------------------------


def test_bytes_go_up_across_and_down(core):
    device = CudaDevice()
    up, there, down = device.allocate_host(64), device.allocate(64), device.allocate_host(64)
    up.array[:] = np.arange(64)
    device.zero(there.address, 64)
    device.copy(there.address, up.address, 32)
    device.copy_rows(there.address + 32, 8, there.address, 4, 4, 3)
    device.copy(down.address, there.address, 64)
    device.synchronize()
    assert down.array[:32].tolist() == list(range(32))
    assert down.array[32:56].reshape(3, 8)[:, :4].tolist() == np.arange(12).reshape(3, 4).tolist()
    assert not down.array[36:40].any()
    assert core.synchronised


def test_times_are_between_two_events(core):
    device = CudaDevice()
    buffer = device.allocate(8)
    events = [device.record()]
    for _ in range(2):
        device.zero(buffer.address, 8)
        events.append(device.record())
    events[-1].wait()
    assert 0 < events[1].since(events[0]) < events[2].since(events[0])


def test_what_is_captured_is_done_when_launched_and_as_often(core):
    device = CudaDevice()
    buffer, host = device.allocate(8), device.allocate_host(8)
    host.array[:] = 0xFF
    device.copy(buffer.address, host.address, 8)
    graph = device.capture(lambda: device.zero(buffer.address, 8))
    for expected in (0xFF, 0):
        device.copy(host.address, buffer.address, 8)
        assert (host.array == expected).all()
        graph.launch()
    assert core.mode == "relaxed"  # an engine may ask the driver things that others forbid
    assert not core.open


def test_a_capture_that_fails_says_so_and_leaves_the_stream_alone(core):
    device = CudaDevice()
    core.fail = "complete"
    with pytest.raises(CaptureError, match="INVALIDATED"):
        device.capture(lambda: None)
    assert not core.open

    with pytest.raises(EngineError, match="not with me"):
        device.capture(lambda: refuse("not with me"))
    assert core.captured is None
    assert not core.open


@pytest.mark.parametrize("collecting", [True, False])
def test_nothing_is_freed_in_a_capture(core, collecting):
    """A cycle that holds a buffer is garbage, and the collector is due with the next object."""
    device = CudaDevice()
    freed = []

    class Cycle:
        def __init__(self):
            self.buffer, self.self = device.allocate(8), self

        def __del__(self):
            freed.append(core.captured is not None)

    threshold = gc.get_threshold()
    gc.collect()

    def work():
        for _ in range(100):
            Cycle()

    try:
        gc.set_threshold(1)
        work()
        assert freed  # it is due at once
        freed.clear()
        (gc.enable if collecting else gc.disable)()
        device.capture(work)
        assert gc.isenabled() == collecting
        with pytest.raises(EngineError, match="in between"):
            device.capture(lambda: refuse("in between"))
        assert gc.isenabled() == collecting
    finally:
        gc.enable()
        gc.set_threshold(*threshold)
    gc.collect()
    assert freed
    assert not any(freed)


def refuse(why):
    raise EngineError(why)


def test_errors_of_the_driver_are_named(core):
    device = CudaDevice()
    core.fail = "cuMemcpyAsync"
    with pytest.raises(EngineError, match="Stand-in could not copy: CUDA_ERROR_LAUNCH_FAILED"):
        device.copy(0, 0, 4)


def test_memory_that_is_not_there_is_said_with_what_is(core):
    device = CudaDevice()
    core.free = 1 << 20
    with pytest.raises(CapacityError, match=r"no 2048 MiB left \(1 MiB free\).*--context"):
        device.allocate(2 << 30)


def test_what_the_pool_keeps_is_free_for_us_and_for_others_once_it_is_trimmed(core):
    device = CudaDevice()
    core.free, own = 1 << 30, core.pool.attributes
    own.reserved_mem_current, own.used_mem_current = 3 << 30, 1 << 30
    assert device.free_bytes() == 3 << 30
    core.synchronised = False
    device.trim()
    assert core.synchronised  # what is freed is so in the stream's order
    assert core.free == 3 << 30
    assert device.free_bytes() == 3 << 30
    core.pool.__dict__.clear()  # a device without pools
    device.trim()
    assert device.free_bytes() == core.free


def test_a_gpu_that_is_not_there_is_named(core):
    with pytest.raises(EngineError, match=r"GPU 1 cannot be opened.*--backend onnxruntime"):
        CudaDevice(1)


CALLS = {
    "allocate": lambda device, at: device.allocate(8),
    "allocate_host": lambda device, at: device.allocate_host(8),
    "copy": lambda device, at: device.copy(at, at + 4, 4),
    "copy_rows": lambda device, at: device.copy_rows(at, 1, at + 4, 1, 1, 2),
    "zero": lambda device, at: device.zero(at, 8),
    "record": lambda device, at: device.record(),
    "synchronize": lambda device, at: device.synchronize(),
    "capture": lambda device, at: device.capture(lambda: device.zero(at, 8)),
    "free_bytes": lambda device, at: device.free_bytes(),
    "trim": lambda device, at: device.trim(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("entered", [True, False])
def test_any_thread_may_ask(core, monkeypatch, call, entered):
    """The driver keeps a context for each thread; a reused thread's number is another thread."""
    device = CudaDevice()
    buffer = device.allocate(8)
    if not entered:  # a mistake: the context is set where the device was opened, and there alone
        monkeypatch.setattr(CudaDevice, "_enter", lambda self: None)
    errors = []
    for _ in range(2):
        before = set(core.current)

        def ask():
            core.current.discard(threading.get_ident())
            try:
                CALLS[call](device, buffer.address)
                CALLS[call](device, buffer.address)
            except AssertionError as error:
                errors.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        core.current &= before
    needs_one = call != "synchronize"  # of a stream, which has its own
    assert bool(errors) == (needs_one and not entered)


def test_a_device_is_closed_once(core):
    device = CudaDevice()
    device.close()
    device.close()
    assert core.closed == ["stream"]


def test_cuda_core_is_imported_when_a_device_is_opened(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "cuda":
            raise ImportError("No module named 'cuda'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install cuda-core 'cuda-bindings==13"):
        CudaDevice()


def test_the_runtime_imports_no_device_before_it_needs_one():
    code = (
        "import sys, visistage.runtime.session\n"
        "assert not [m for m in sys.modules if 'runtime.device' in m or m.startswith('cuda')]\n"
        "import visistage.runtime.device.engine_trt\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('cuda', 'tensorrt', 'torch')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- ONNX Runtime on the device -------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda_bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    checkpoint = toy.make_checkpoint(folder / "toy", kv_heads=2)
    return make_bundle(
        str(checkpoint), plan="visipruner:shallow=1,t=1,e=2,keep=4", target="cuda", out=folder
    )


def test_graphs_run_through_cuda_core_at_the_addresses_they_are_given(
    core, cuda_bundle, monkeypatch
):
    """The device as it is, over stand-ins; ONNX Runtime's CPU provider in place of CUDA's."""
    given = []

    def api(*, stream, threads, capture):
        given.append((stream, threads, capture))
        return OrtApi(threads=threads)

    monkeypatch.setattr(engine_ort, "find_gpu", lambda: GPU)
    monkeypatch.setattr(engine_ort, "OrtApi", api)
    answers = []
    for backend in ("onnxruntime", None):
        with load(cuda_bundle.path, backend=backend, threads=1) as session:
            session.eos = frozenset()
            long = "word " * 120
            asked = [(picture(1), "What is it?"), (None, "Hello"), (picture(2), long)]
            answers.append([session.infer(*one, max_tokens=12).tokens for one in asked])
            if backend is None:
                stages = session.executor.engine_set.stages
                assert stages[0].slots == 1024  # grown
    assert answers[0] == answers[1]
    assert given == [(STREAM, 1, False)]
    assert core.closed == ["stream"]


def test_onnx_runtime_is_told_to_use_our_stream_and_not_to_wait():
    api = OrtApi(stream=STREAM)
    name, given = api.providers[0]
    assert name == "CUDAExecutionProvider"
    assert given == {"user_compute_stream": str(STREAM), "use_tf32": "0"}  # FP32 is FP32
    entry = "disable_synchronize_execution_providers"
    assert api.run_options.get_run_config_entry(entry) == "1"
    assert not api.capturable
    assert OrtApi(stream=STREAM, capture=True).capturable
    assert not OrtApi(capture=True).capturable  # on a CPU a run is done, and not there to be kept


def test_a_provider_that_did_not_start_is_said(cuda_bundle):
    """ONNX Runtime falls back to the CPU in silence; addresses of a GPU would crash it there."""
    fact = cuda_bundle.manifest.graphs["select0"]
    file = cuda_bundle.file(fact.file)
    compiled = Compiled("select0", None, file, fact.spec, 0, (), 0)
    with pytest.raises(
        EngineError, match=r"could not start CUDA.*build for the CPU: visistage build"
    ):
        OrtApi(stream=STREAM).load(compiled)


def test_a_machine_without_a_gpu_says_why_and_what_runs_here(cuda_bundle, monkeypatch):
    monkeypatch.setattr(engine_ort, "find_gpu", lambda: None)
    with pytest.raises(EngineError, match=r"target 'cuda'.*no driver.*--backend onnxruntime"):
        load(cuda_bundle.path)


# --- TensorRT -------------------------------------------------------------------------------------


@pytest.fixture
def compiled(tmp_path):
    file = tmp_path / "bundle" / "engines" / "stage0.engine"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"plan")
    return Compiled("stage0", None, file, SPEC, 0, (), 4)


def api_of(trt):
    return TrtApi(TensorRtVariant("tensorrt", trt, False, True), STREAM)


def bind(context, rows=3):
    for number, name in enumerate(("rows", "rows.out")):
        context.bind(name, (1, rows, 8), 256 * (number + 1))
    for name in ("key.0", "key.0.out"):
        context.bind(name, (1, 2, 64, 4), 1024)


def test_a_context_has_profile_scratch_shapes_and_addresses_before_it_runs(compiled):
    trt = Trt()
    engine = api_of(trt).load(compiled)
    assert engine.scratch_bytes == 4096
    context = engine.context(1, SimpleNamespace(address=512, nbytes=4096))
    bind(context)
    context.enqueue()
    context.enqueue()
    state = {
        "profile": (1, STREAM),
        "scratch": (512, 4096),
        "shapes": {"rows": (1, 3, 8), "key.0": (1, 2, 64, 4)},
        "addresses": {"rows": 256, "rows.out": 512, "key.0": 1024, "key.0.out": 1024},
    }
    assert trt.runs == [(STREAM, state)] * 2
    assert context.capturable


def test_a_context_takes_other_shapes_and_infers_what_follows_from_them_again(compiled):
    trt = Trt()
    context = api_of(trt).load(compiled).context(0, None)
    for rows in (3, 3, 5):
        bind(context, rows)
        context.enqueue()  # which the stand-in refuses where shapes were set and not inferred
    assert [state["shapes"]["rows"][1] for _, state in trt.runs] == [3, 3, 5]
    bind(context, 4)
    context.bind("rows.out", (1, 5, 8), 512)  # a mistake: what was right for the call before
    with pytest.raises(EngineError, match=r"writes 'rows.out' in shape \[1, 4, 8\], not \[1, 5, 8"):
        context.enqueue()


@pytest.mark.parametrize(
    ("facts", "rows", "says"),
    [
        ({}, 9, r"does not take 'rows' in shape \[1, 9, 8\]"),
        ({"missing": ["rows"]}, 3, "lacks rows"),
        ({"runs": False}, 3, "did not run"),
    ],
)
def test_what_an_engine_refuses_is_an_error(compiled, facts, rows, says):
    context = api_of(Trt(**facts)).load(compiled).context(0, None)

    def run():
        bind(context, rows)
        context.enqueue()

    with pytest.raises(EngineError, match=f"{says}.*visistage build"):
        run()


def test_an_output_of_another_size_than_its_buffer_is_an_error(compiled):
    context = api_of(Trt()).load(compiled).context(0, None)
    bind(context)
    context.bind("rows.out", (1, 2, 8), 512)
    with pytest.raises(EngineError, match=r"writes 'rows.out' in shape \[1, 3, 8\], not \[1, 2, 8"):
        context.enqueue()
    with pytest.raises(EngineError, match="no tensor 'nobody'"):
        context.bind("nobody", (1,), 256)
    with pytest.raises(EngineError, match="no profile 2"):
        api_of(Trt()).load(compiled).context(2, None)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"dtype": "float32"}, "other tensors than the bundle's contract.*float32"),
        ({"alias": "rows"}, "writes 'key.0.out' over 'rows'"),
    ],
)
def test_an_engine_that_is_not_the_contracts_is_refused(compiled, facts, says):
    with pytest.raises(EngineError, match=f"{says}.*visistage build"):
        api_of(Trt(**facts)).load(compiled)


def test_an_engine_that_cannot_be_read_says_what_the_library_said(compiled):
    compiled.file.write_bytes(b"rubbish")
    with pytest.raises(EngineError, match=r"refuses .*: magic tag mismatch.*visistage build"):
        api_of(Trt()).load(compiled)


@pytest.mark.skipif(find_trt_variant(TENSORRT_RTX) is None, reason="pip install -e '.[rtx]'")
def test_the_real_library_takes_a_mapped_file(compiled):
    """Without a driver it reads the header and refuses; with one, too: this is no engine."""
    compiled.file.write_bytes(b"rubbish" * 1000)
    trt_variant = find_trt_variant(TENSORRT_RTX)
    with pytest.raises(EngineError, match=f"{trt_variant.version} refuses .*Serialization"):
        TrtApi(trt_variant, STREAM).load(compiled)
