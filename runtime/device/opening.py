"""From a bundle to an executor on this machine's device, or to one reason why not.

Nothing is deserialised before its hash, its compiler's version and its GPU are known to be right:
an engine is a program.
"""

from __future__ import annotations

from ...graphs.bundle import Bundle
from ...graphs.engine_index import EngineFact, Engines
from ...graphs.errors import EngineError, MissingDependencyError
from ...graphs.targets import ONNXRUNTIME, find_target
from .cuda import CudaDevice
from .device_executor import DeviceExecutor
from .engine_ort import OrtApi
from .engine_trt import TrtApi
from .probe import check_machine, find_gpu
from .protocol import Compiled
from .tensorrt import INSTALL, find_trt_variant

ON_CPU = f"Its graphs run on this CPU, the same numbers more slowly: --backend {ONNXRUNTIME}"


def open_engines(bundle: Bundle) -> DeviceExecutor:
    """The bundle's engines on this machine's GPU.

    Raises:
        EngineError: there are none yet, or they are not for this machine.
        BundleError: a file is missing or changed.
        MissingDependencyError: a library is.
    """
    engines = checked_engines(bundle)
    trt_variant = find_trt_variant(engines.backend)
    assert trt_variant is not None
    device = CudaDevice()
    return DeviceExecutor(
        bundle,
        device,
        TrtApi(trt_variant, device.stream),
        compiled_engines(bundle, engines),
    )


def open_cuda(bundle: Bundle, threads: int | None) -> DeviceExecutor:
    """The bundle's graphs through ONNX Runtime's CUDA provider, on our stream.

    Raises:
        EngineError, MissingDependencyError: this machine has no GPU, or lacks a library.
    """
    if find_gpu() is None:
        raise EngineError(
            f"{bundle.path} is for target 'cuda' and this machine has no NVIDIA GPU or no driver. "
            f"{ON_CPU}"
        )
    device = CudaDevice()
    api = OrtApi(stream=device.stream, threads=threads)
    return DeviceExecutor(bundle, device, api, compiled_graphs(bundle))


def checked_engines(bundle: Bundle) -> Engines:
    """The index of the bundle's engines, once they are known to be whole and for this machine.

    Raises:
        EngineError, BundleError, MissingDependencyError: see ``open_engines``.
    """
    target = find_target(bundle.manifest.target)
    engines = Engines.open(bundle)
    device = find_gpu()
    if engines is None:
        raise EngineError(
            f"{bundle.path} is for target '{target.name}' and has no engines yet. Compile them on "
            f"the machine that shall run them: visistage build {bundle.path}. {ON_CPU}"
        )
    if device is not None and find_trt_variant(engines.backend) is None:
        raise MissingDependencyError(
            f"the engines of {bundle.path} run on {engines.backend} {engines.version}, which is "
            f"not installed here. {INSTALL[engines.backend]}"
        )
    if device is None:
        raise EngineError(
            f"the engines of {bundle.path} need a GPU ({engines.gpus()}); this machine has none, "
            f"or no driver. {ON_CPU}"
        )
    check_machine(engines, find_trt_variant(engines.backend), device)
    engines.check()
    return engines


def compiled_engines(bundle: Bundle, engines: Engines) -> list[Compiled]:
    """What the index says of every engine, with the contract that it must keep."""
    return [_compiled(bundle, engines, fact) for fact in engines.engines]


def compiled_graphs(bundle: Bundle) -> list[Compiled]:
    """The graphs themselves, which take any sizes."""
    return [
        Compiled(name, None, bundle.file(fact.file), fact.spec, 0, (), 0)
        for name, fact in bundle.manifest.graphs.items()
    ]


def _compiled(bundle: Bundle, engines: Engines, fact: EngineFact) -> Compiled:
    if fact.graph not in bundle.manifest.graphs:
        raise EngineError(
            f"{engines.folder} has an engine for '{fact.graph}', which the bundle does not. "
            f"Compile the engines again: visistage build {bundle.path}"
        )
    profiles = tuple(
        {name: (tuple(shapes[0]), tuple(shapes[2])) for name, shapes in profile.items()}
        for profile in fact.profiles
    )
    return Compiled(
        fact.graph,
        fact.context,
        engines.folder / fact.file,
        bundle.manifest.graphs[fact.graph].spec,
        fact.slots,
        profiles,
        fact.nbytes,
    )
