"""Runtime configuration of TensorRT-RTX: kernels for captured calls, for loose ones, and kept."""

import enum
from types import SimpleNamespace

import pytest
from visistage.graphs.files import user_cache
from visistage.runtime.device.engine_trt import TrtApi
from visistage.runtime.device.kernel_cache import KernelCache, kernels_of
from visistage.runtime.device.protocol import Compiled
from visistage.runtime.device.tensorrt import TensorRtVariant
from visistage.tests.support.trt_module import SPEC, STREAM, Trt


class Rtx(Trt):
    """``Trt`` with what TensorRT-RTX has besides; ``compiled`` counts kernels made."""

    __version__ = "1.7.1"

    class DynamicShapesKernelSpecializationStrategy(enum.Enum):
        LAZY, EAGER, NONE = range(3)

    def __init__(self, **facts):
        super().__init__(**facts)
        self.configs, self.caches, self.compiled = [], [], 0
        self.driver = b"580 "

    def _deserialise(self, data):
        engine = super()._deserialise(data)
        engine.create_runtime_config = lambda: Config(self)
        create = engine.create_execution_context

        def context(config):
            self.configs.append(config)
            if b"kernel" not in config.cache.data:
                self.compiled += 1
                config.cache.data += b"kernel"
            return create(config)

        engine.create_execution_context = context
        return engine


class Config:
    def __init__(self, trt):
        self.trt = trt
        kinds = trt.DynamicShapesKernelSpecializationStrategy
        self.dynamic_shapes_kernel_specialization_strategy = kinds.LAZY

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        cache = SimpleNamespace(data=b"")

        def deserialise(data):
            if not data.startswith(self.trt.driver):
                return False
            cache.data = data[len(self.trt.driver) :]
            return True

        cache.deserialize = deserialise
        cache.serialize = lambda: bytearray(self.trt.driver + cache.data)
        self.trt.caches.append(cache)
        return cache

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "visistage"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "bundle" / "engines"
    folder.mkdir(parents=True)
    (folder / "stage0.engine").write_bytes(b"plan")
    return folder


def start(folder, *, trt=None, sha256="a" * 64, gpu="NVIDIA RTX 4090 (Laptop)", close=True):
    """Load an engine, make a context of each kind, and end; return the stand-in."""
    trt = trt or Rtx()
    variant = TensorRtVariant("tensorrt_rtx", trt, True, False)
    engines = SimpleNamespace(folder=folder, engines=[SimpleNamespace(sha256=sha256)])
    api = TrtApi(variant, STREAM, kernels_of(engines, variant, gpu))
    engine = api.load(Compiled("stage0", None, folder / "stage0.engine", SPEC, 0, (), 4))
    for replayed in (True, False):
        engine.context(0, None, replayed=replayed)
    if close:
        api.close()
    return trt


def test_captured_calls_wait_for_their_kernels_and_loose_ones_take_any(folder):
    trt = start(folder)
    kinds = trt.DynamicShapesKernelSpecializationStrategy
    chosen = [config.dynamic_shapes_kernel_specialization_strategy for config in trt.configs]
    assert chosen == [kinds.EAGER, kinds.NONE]
    managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert [config.strategy for config in trt.configs] == [managed] * 2
    assert len(trt.caches) == 1
    assert all(config.cache is trt.caches[0] for config in trt.configs)


def test_kernels_are_compiled_once_for_engines_library_and_gpu(folder, home):
    assert start(folder).compiled == 1
    assert start(folder).compiled == 0
    (file,) = home.iterdir()
    assert file.name.startswith("kernels-tensorrt_rtx-1.7.1-NVIDIA-RTX-4090--Laptop--")
    before = file.read_bytes()
    assert start(folder, gpu="another").compiled == 1
    assert start(folder, sha256="b" * 64).compiled == 1  # and replaces what is of no use any more
    assert file.read_bytes() != before
    assert len(list(home.iterdir())) == 2


def test_what_another_driver_compiled_is_refused_by_the_library_and_replaced(folder):
    start(folder)
    other = Rtx()
    other.driver = b"590 "
    assert start(folder, trt=other).compiled == 1
    other = Rtx()
    other.driver = b"590 "
    assert start(folder, trt=other).compiled == 0


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x" * 99]
)
def test_a_damaged_file_is_not_given_to_the_library(folder, home, damage):
    start(folder)
    (file,) = home.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    trt = Rtx()
    given = []
    real = Config.create_runtime_cache

    def noted(self):
        cache = real(self)
        inner = cache.deserialize
        cache.deserialize = lambda data: (given.append(data), inner(data))[1]
        return cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "create_runtime_cache", noted)
        assert start(folder, trt=trt).compiled == 1
    assert not given
    assert start(folder).compiled == 0


def test_nothing_of_a_bundle_is_read_as_a_kernel(folder):
    """A bundle may come from anywhere; what lies in it was compiled by a stranger."""
    before = sorted(folder.iterdir())
    start(folder)
    assert sorted(folder.iterdir()) == before


def test_where_there_is_no_home_nothing_is_kept(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert user_cache() is None
    assert [start(folder).compiled for _ in range(2)] == [1, 1]


def test_tensorrt_proper_has_no_such_thing(folder, home):
    trt = Trt()
    api = TrtApi(TensorRtVariant("tensorrt", trt, False, True), STREAM, KernelCache("any.cache"))
    engine = api.load(Compiled("stage0", None, folder / "stage0.engine", SPEC, 0, (), 4))
    engine.context(0, None, replayed=True)
    api.close()
    assert not home.exists()
