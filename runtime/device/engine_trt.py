"""TensorRT and TensorRT-RTX engines, driven through their Python API.

One execution context for every set of shapes that is used: a captured graph bakes in the state of
the context that it was captured from. Contexts are cheap, because they bring no memory of their
own: all share one scratch buffer, for one engine runs at a time.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...graphs.bundle import Bundle
from ...graphs.caches import appended
from ...graphs.commands import visistage
from ...graphs.contract import TensorSpec
from ...graphs.engine_index import EngineFact, Engines, compile_again
from ...graphs.errors import EngineError, MissingDependencyError
from ...graphs.targets import Target, show_capability
from ..backends.backend import BackendOptions
from ..hardware import GpuInfo, find_gpu
from .cuda import CudaDevice, missing_cuda_core
from .device_executor import DeviceExecutor
from .kernel_cache import KernelCache, kernels_of
from .protocol import ON_CPU, Buffer, Compiled, Shape
from .tensorrt import INSTALL, TensorRtVariant, find_trt_variant


def open_bundle(bundle: Bundle, options: BackendOptions) -> DeviceExecutor:
    """Load the bundle's engines onto this machine's GPU.

    Nothing is deserialised before its hash, its compiler's version and its GPU are known to be
    right: an engine is a program.

    Raises:
        EngineError: there are none yet, or they are not for this machine.
        BundleError: a file is missing or changed.
        MissingDependencyError: a library is.
    """
    engines = Engines.open(bundle)
    if engines is None:
        raise EngineError(
            f"{bundle.path} is for target '{bundle.manifest.target}' and has no engines yet. "
            "Compile them on the machine that runs them: "
            f"{visistage('build', bundle.path)}. {ON_CPU}"
        )
    trt_variant = check_machine(engines, find_trt_variant(engines.backend), find_gpu())
    engines.check()
    device = CudaDevice()
    kernels = kernels_of(engines, trt_variant, device.name)
    api = TrtApi(trt_variant, device.stream, kernels)
    return DeviceExecutor(bundle, device, api, compiled_engines(bundle, engines))


def missing(target: Target) -> Iterator[str]:
    """Yield what lacks to run engines for ``target`` here."""
    gpu = find_gpu()
    if gpu is None:
        yield "an NVIDIA GPU and its driver; verify runs their graphs on the CPU"
    elif target.capabilities and gpu.capability not in target.capabilities:
        yield f"another GPU than this {show_capability(gpu.capability)}"
    trt_variant = find_trt_variant(target.backend)
    if trt_variant is None:
        yield f"{target.backend} is not installed"
    elif not target.serves(trt_variant.version):
        yield f"{target.backend} {target.versions[0]}, found {trt_variant.version}"
    elif gpu is not None and (why := trt_variant.why_not_on(gpu)) is not None:
        yield why
    yield from missing_cuda_core()


def check_machine(
    engines: Engines, trt_variant: TensorRtVariant | None, gpu: GpuInfo | None
) -> TensorRtVariant:
    """Make sure that this machine can run ``engines``; call it before deserialising any.

    Raises:
        EngineError, MissingDependencyError: says what was found and what they were compiled for.
    """
    bundle = engines.folder.parent
    if gpu is None:
        raise EngineError(
            f"the engines of {bundle} need a GPU ({engines.gpus()}); this machine has none, or no "
            f"driver. {ON_CPU}"
        )
    if trt_variant is None:
        raise MissingDependencyError(
            f"the engines of {bundle} run on {engines.backend} {engines.version}, which is not "
            f"installed here. {INSTALL[engines.backend]}"
        )
    if trt_variant.version != engines.version:
        raise EngineError(
            f"the engines were compiled by {engines.backend} {engines.version}, found "
            f"{trt_variant.version}: they are not portable across versions. {compile_again(bundle)}"
        )
    if engines.capabilities and gpu.capability not in engines.capabilities:
        raise EngineError(
            f"the engines were compiled for {engines.gpus()}, found {gpu.name} "
            f"({show_capability(gpu.capability)}). {compile_again(bundle)}"
        )
    return trt_variant


def compiled_engines(bundle: Bundle, engines: Engines) -> list[Compiled]:
    """Return what the index says of every engine, with the contract that it must keep."""
    return [_compiled(bundle, engines, fact) for fact in engines.engines]


def _compiled(bundle: Bundle, engines: Engines, fact: EngineFact) -> Compiled:
    profiles = tuple(
        {name: (tuple(shapes[0]), tuple(shapes[2])) for name, shapes in profile.items()}
        for profile in fact.profiles
    )
    return Compiled(
        fact.graph,
        fact.context,
        engines.file(fact),
        bundle.manifest.graphs[fact.graph].spec,
        fact.slots,
        profiles,
        fact.nbytes,
    )


class TrtApi:
    """``protocol.EngineApi`` over a variant of TensorRT; ``stream`` is the device's, as integer.

    Call ``check_machine`` before. ``kernels``: those compiled here before.
    """

    def __init__(
        self, trt_variant: TensorRtVariant, stream: int, kernels: KernelCache | None = None
    ):
        self.trt_variant, self.stream = trt_variant, stream
        self.kernels = kernels or KernelCache()
        trt: Any = trt_variant.module
        self.messages: list[str] = []
        self._logger = _logger(trt, self.messages)
        self._runtime = trt.Runtime(self._logger)

    def load(self, compiled: Compiled) -> TrtEngine:
        """See ``protocol.EngineApi``. The file is mapped, not read: no copy on the host."""
        with (
            compiled.file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EngineError(
                f"{self.trt_variant.backend} {self.trt_variant.version} refuses {compiled.file}: "
                f"{self.said()}. {compile_again(compiled.file.parent.parent)}"
            )
        return TrtEngine(self, compiled, engine)

    def said(self) -> str:
        """Return its first complaint since it was last asked: the others follow from it."""
        said = self.messages[0] if self.messages else "it gives no reason"
        self.messages.clear()
        return said

    def close(self) -> None:
        self.kernels.save()
        self._runtime = None


class TrtEngine:
    """``protocol.DeviceEngine``; an engine whose tensors are not the contract's is an error."""

    def __init__(self, api: TrtApi, compiled: Compiled, engine: Any):
        self.api, self.compiled, self.engine = api, compiled, engine
        self._check_tensors()
        self._check_aliases()
        self.scratch_bytes = int(engine.device_memory_size_v2)

    def context(
        self, profile: int, scratch: Buffer | None, *, replayed: bool = False
    ) -> TrtContext:
        return TrtContext(self, profile, scratch, replayed)

    def create_context(self, replayed: bool) -> Any:
        """Return the library's own execution context, over memory that it is given; or None.

        TensorRT-RTX compiles kernels when a context is used. What will be captured waits for those
        made for its shapes, because a graph keeps what ran when it was captured; what comes once
        takes those for any shapes, which are there at once.
        """
        trt: Any = self.api.trt_variant.module
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        kinds = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if kinds is None or not hasattr(self.engine, "create_runtime_config"):
            return self.engine.create_execution_context(managed)
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        kind = kinds.EAGER if replayed else kinds.NONE
        config.dynamic_shapes_kernel_specialization_strategy = kind
        self.api.kernels.attach(config)
        return self.engine.create_execution_context(config)

    def _check_tensors(self) -> None:
        trt, engine = self.api.trt_variant.module, self.engine
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        for mode, specs in (
            (trt.TensorIOMode.INPUT, self.compiled.spec.inputs),
            (trt.TensorIOMode.OUTPUT, self.compiled.spec.outputs),
        ):
            found = {
                name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
                for name in names
                if engine.get_tensor_mode(name) == mode
            }
            wanted = {spec.name: spec.dtype for spec in specs}
            if found != wanted:
                differ = sorted(found.items() ^ wanted.items())
                raise EngineError(
                    f"{self.compiled.file} has other tensors than the bundle's contract: "
                    f"{differ}. {compile_again(self.compiled.file.parent.parent)}"
                )

    def _check_aliases(self) -> None:
        """Check that caches updated in place by the engine are those that we bind in place."""
        if not hasattr(self.engine, "get_aliased_input_tensor"):
            return
        inputs = {spec.name for spec in self.compiled.spec.inputs}
        for spec in self.compiled.spec.outputs:
            source = self.engine.get_aliased_input_tensor(spec.name)
            if source and (source not in inputs or appended(source) != spec.name):
                raise EngineError(
                    f"{self.compiled.file} writes '{spec.name}' over '{source}', which is not "
                    f"where the bundle keeps it. {compile_again(self.compiled.file.parent.parent)}"
                )


class TrtContext:
    """``protocol.ExecutionContext``."""

    def __init__(self, engine: TrtEngine, profile: int, scratch: Buffer | None, replayed: bool):
        self._engine, self._scratch = engine, scratch
        self.context = engine.create_context(replayed)
        if self.context is None:
            raise self._rejected("cannot be given an execution context")
        if not self.context.set_optimization_profile_async(profile, engine.api.stream):
            raise self._rejected(f"has no profile {profile}")
        if scratch is not None:
            self.context.set_device_memory(scratch.address, scratch.nbytes)
        self._inputs: dict[str, TensorSpec] = {s.name: s for s in engine.compiled.spec.inputs}
        self._shapes: dict[str, Shape] = {}
        self._inferred = False

    @property
    def capturable(self) -> bool:
        """Return whether its work may be captured, as far as TensorRT says before it is tried."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(self._engine.api.stream))

    def bind(self, name: str, shape: Shape, address: int) -> None:
        if self._shapes.get(name) != tuple(shape):
            if name in self._inputs and not self.context.set_input_shape(name, shape):
                raise self._rejected(f"does not take '{name}' in shape {list(shape)}")
            self._shapes[name], self._inferred = tuple(shape), False
        if not self.context.set_tensor_address(name, address):
            raise self._rejected(f"has no tensor '{name}'")

    def enqueue(self) -> None:
        if not self._inferred:
            self._check_shapes()
        if not self.context.execute_async_v3(self._engine.api.stream):
            raise self._rejected("did not run")

    def _check_shapes(self) -> None:
        """Check that the engine writes exactly what we made room for."""
        missing = self.context.infer_shapes()
        if missing:
            raise self._rejected(f"lacks {', '.join(missing)}")
        for name, shape in self._shapes.items():
            found = tuple(self.context.get_tensor_shape(name))
            if found != shape:
                raise self._rejected(f"writes '{name}' in shape {list(found)}, not {list(shape)}")
        self._inferred = True

    def _rejected(self, what: str) -> EngineError:
        compiled = self._engine.compiled
        return EngineError(
            f"engine {compiled.file.name} {what}: {self._engine.api.said()}. "
            f"{compile_again(compiled.file.parent.parent)}"
        )


def _logger(trt: Any, messages: list[str]) -> Any:
    """Return a logger that keeps errors for our own messages, and is silent otherwise."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self):
            super().__init__()

        def log(self, severity, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message)

    return Logger()
