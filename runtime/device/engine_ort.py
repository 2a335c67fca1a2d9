"""ONNX Runtime as an engine: a graph with inputs and outputs at addresses, on the device's stream.

On CUDA nothing is copied and nothing waits: ONNX Runtime issues its work on our stream. Once it has
run with the same shapes it allocates nothing either, and can be captured where that is asked for.
On the CPU provider the same code runs over a device in host memory, which does its work when it is
waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ...graphs.bundle import Bundle
from ...graphs.errors import EngineError
from ...graphs.targets import Target
from ..backends.backend import BackendOptions
from ..backends.onnx_runtime import find_cuda_libraries, ort
from ..backends.ort import CPU_PROVIDER, CUDA_PROVIDER, load_session
from ..backends.ort import missing as missing_provider
from ..backends.ort_packages import collision, install_gpu
from ..hardware import find_gpu
from .cuda import CudaDevice, missing_cuda_core
from .cuda_session import why_no_session
from .device_executor import DeviceExecutor
from .protocol import ON_CPU, Buffer, Compiled, Shape

Submit = Callable[[str, Callable[[], None]], None]


def open_bundle(bundle: Bundle, options: BackendOptions) -> DeviceExecutor:
    """Load the bundle's graphs into ONNX Runtime's CUDA provider, on our stream.

    Raises:
        EngineError, MissingDependencyError: this machine has no GPU, or lacks a library.
    """
    if find_gpu() is None:
        raise EngineError(
            f"{bundle.path} is for target 'cuda' and this machine has no NVIDIA GPU or no driver. "
            f"{ON_CPU}"
        )
    device = CudaDevice()
    capture = bool(options.capture)
    api = OrtApi(stream=device.stream, threads=options.threads, capture=capture)
    graphs = [  # which take any sizes
        Compiled(name, None, bundle.file(fact.file), fact.spec, 0, (), 0)
        for name, fact in bundle.manifest.graphs.items()
    ]
    return DeviceExecutor(bundle, device, api, graphs)


def missing(target: Target) -> Iterator[str]:
    """Yield what lacks to run graphs for ``target`` here."""
    lacking = [*missing_provider(target, CUDA_PROVIDER), *missing_cuda_core()]
    if find_gpu() is None:
        lacking.append(f"an NVIDIA GPU and its driver. {ON_CPU}")
    if not lacking and (why := why_no_session()) is not None:
        lacking.append(f"a session on the GPU: {why}")
    yield from lacking


def _why() -> str:
    """Return what most likely keeps the provider from starting, and what to type."""
    if (both := collision()) is not None:
        return both
    said = find_cuda_libraries().splitlines()[:1] or ["its CUDA libraries are of another version"]
    return f"{said[0]}. Type: {install_gpu()}; visistage doctor says more"


class OrtApi:
    """``protocol.EngineApi`` over ONNX Runtime.

    ``stream``: the handle of the CUDA stream that the device works on; None: the CPU provider.
    ``submit``: is called to run a graph; by default it runs at once.
    ``capture``: whether runs on a stream may be captured.
    """

    def __init__(
        self,
        *,
        stream: int | None = None,
        submit: Submit | None = None,
        threads: int | None = None,
        capture: bool = False,
    ):
        self.submit = submit or (lambda name, work: work())
        self.device = "cpu" if stream is None else "cuda"
        # A run that happens now, on a CPU, is not there to be kept.
        self.capturable = submit is not None or (stream is not None and capture)
        self.options = ort.SessionOptions()
        self.options.log_severity_level = 3
        if threads is not None:
            self.options.intra_op_num_threads = threads
        self.run_options = ort.RunOptions()
        if stream is None:
            self.providers: list = [CPU_PROVIDER]
        else:
            # What is FP32 in a graph is so because it needs to be; TF32 has 10 bits of mantissa.
            cuda = {"user_compute_stream": str(stream), "use_tf32": "0"}
            self.providers = [(CUDA_PROVIDER, cuda), CPU_PROVIDER]
            self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def load(self, compiled: Compiled) -> OrtEngine:
        session = load_session(compiled.file, self.options, self.providers)
        if self.device == "cuda" and CUDA_PROVIDER not in session.get_providers():
            raise EngineError(
                f"ONNX Runtime {ort.__version__} could not start {CUDA_PROVIDER}: {_why()}; or "
                "build for the CPU: visistage build MODEL"
            )
        return OrtEngine(self, compiled, session)

    def close(self) -> None:
        """See ``protocol.EngineApi``; sessions share nothing."""


class OrtEngine:
    """``protocol.DeviceEngine``; ONNX Runtime allocates its own scratch."""

    scratch_bytes = 0

    def __init__(self, api: OrtApi, compiled: Compiled, session: ort.InferenceSession):
        self.api, self.compiled, self.session = api, compiled, session

    def context(
        self, profile: int, scratch: Buffer | None, *, replayed: bool = False
    ) -> OrtContext:
        return OrtContext(self)


class OrtContext:
    """``protocol.ExecutionContext``: an I/O binding."""

    def __init__(self, engine: OrtEngine):
        self.engine, self.capturable = engine, engine.api.capturable
        self._bound: dict[str, tuple[Shape, int]] = {}
        self._binding: ort.IOBinding | None = None
        spec = engine.compiled.spec
        self._inputs = {tensor.name: np.dtype(tensor.dtype) for tensor in spec.inputs}
        self._outputs = {tensor.name: np.dtype(tensor.dtype) for tensor in spec.outputs}

    def bind(self, name: str, shape: Shape, address: int) -> None:
        if name not in self._inputs and name not in self._outputs:
            raise EngineError(f"graph '{self.engine.compiled.graph}' has no tensor '{name}'")
        if self._bound.get(name) != (shape, address):
            self._bound[name] = (shape, address)
            self._binding = None  # what was asked for before keeps its own

    def enqueue(self) -> None:
        binding = self._binding = self._binding or self._bind_all()
        api, session = self.engine.api, self.engine.session
        api.submit(
            f"run {self.engine.compiled.graph}",
            lambda: session.run_with_iobinding(binding, api.run_options),
        )

    def _bind_all(self) -> ort.IOBinding:
        binding, device = self.engine.session.io_binding(), self.engine.api.device
        for name, (shape, address) in self._bound.items():
            if name in self._inputs:
                binding.bind_input(name, device, 0, self._inputs[name], shape, address)
            else:
                binding.bind_output(name, device, 0, self._outputs[name], shape, address)
        return binding
