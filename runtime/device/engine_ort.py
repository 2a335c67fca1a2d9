"""ONNX Runtime as an engine: a graph with inputs and outputs at addresses, on the device's stream.

On CUDA nothing is copied and nothing waits: ONNX Runtime issues its work on our stream. Its own
allocations make that work unfit for capture. On the CPU provider the same code runs over a
a device in host memory, which does the work when somebody waits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort

from ...graphs.errors import BundleError, EngineError
from .protocol import Buffer, Compiled, Shape

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"

Submit = Callable[[str, Callable[[], None]], None]


class OrtApi:
    """``protocol.EngineApi`` over ONNX Runtime.

    ``stream``: the handle of the CUDA stream that the device works on; None: the CPU provider.
    ``submit``: who is asked to run a graph; by default it is run at once.
    """

    def __init__(
        self,
        *,
        stream: int | None = None,
        submit: Submit | None = None,
        threads: int | None = None,
    ):
        self.submit = submit or _now
        self.device = "cpu" if stream is None else "cuda"
        self.capturable = submit is not None  # a run that happens now is not there to be kept
        self.options = ort.SessionOptions()
        self.options.log_severity_level = 3
        if threads is not None:
            self.options.intra_op_num_threads = threads
        self.run_options = ort.RunOptions()
        if stream is None:
            self.providers: list = [CPU_PROVIDER]
        else:
            self.providers = [(CUDA_PROVIDER, {"user_compute_stream": str(stream)}), CPU_PROVIDER]
            self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def load(self, compiled: Compiled) -> OrtEngine:
        """See ``protocol.EngineApi``."""
        try:
            session = ort.InferenceSession(
                str(compiled.file), self.options, providers=self.providers
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base but this
            raise BundleError(
                f"ONNX Runtime {ort.__version__} cannot load {compiled.file}: {error}. "
                "Build the bundle again with this version: make engines MODEL=..."
            ) from error
        if self.device == "cuda" and CUDA_PROVIDER not in session.get_providers():
            raise EngineError(
                f"ONNX Runtime {ort.__version__} could not start {CUDA_PROVIDER}: its CUDA or "
                f"cuDNN "
                "libraries are missing or of another version. Type: pip install "
                "'visistage[gpu]', or build for the CPU: make engines TARGET=cpu"
            )
        return OrtEngine(self, compiled, session)

    def close(self) -> None:
        """See ``protocol.EngineApi``; sessions share nothing."""


class OrtEngine:
    """``protocol.Engine``; ONNX Runtime allocates its own scratch."""

    scratch_bytes = 0

    def __init__(self, api: OrtApi, compiled: Compiled, session: ort.InferenceSession):
        self.api, self.compiled, self.session = api, compiled, session

    def context(self, profile: int, scratch: Buffer | None) -> OrtContext:
        """See ``protocol.Engine``."""
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
        """See ``protocol.ExecutionContext``."""
        if name not in self._inputs and name not in self._outputs:
            raise EngineError(f"graph '{self.engine.compiled.graph}' has no tensor '{name}'")
        if self._bound.get(name) != (shape, address):
            self._bound[name] = (shape, address)
            self._binding = None  # what was asked for before keeps its own

    def enqueue(self) -> None:
        """See ``protocol.ExecutionContext``."""
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


def _now(name: str, work: Callable[[], None]) -> None:
    work()
