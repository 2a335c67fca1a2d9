"""What this machine can do at best, measured now: operations and bytes per second.

Two graphs of one node, run by the same ONNX Runtime with the same threads as a bundle: a large
square product for operations, a product with one row for bytes. The latter reads a matrix as large
as what a decode step reads, since a small model's weights stay in the processor's caches.

The graphs lie beside this module (a test builds them anew and compares): neither torch nor onnx is
needed to run them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ...graphs.plan.call_cost import Work

PRODUCT_SIDE = 1536
"""Side of the square product: large enough for the best rate, 0.1 s on two cores."""

MOST_BYTES = 256 << 20
"""Largest matrix that is read: beyond it, memory is as slow as it gets."""

LEAST_BYTES = 4 << 20
PEAK_REPEATS = 5
WIDTH = 4096
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
FILES = {"fp32": "matmul.onnx", "fp16": "matmul-fp16.onnx"}
PRODUCT_DTYPES = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class Peaks:
    """FLOPs a second and bytes a second.

    precision: of the products; threads: as ONNX Runtime was given; nbytes: what was read.
    """

    flops: float
    bandwidth: float
    precision: str
    threads: int | None
    nbytes: int

    def lower_bound_ms(self, work: Work) -> float:
        """The least time that ``work`` can take: the slower of its operations and its bytes."""
        return 1e3 * max(work.flops / self.flops, work.nbytes / self.bandwidth)

    def bound(self, work: Work) -> str:
        """Which of the two that is: ``compute`` or ``memory``."""
        return "compute" if work.flops / self.flops >= work.nbytes / self.bandwidth else "memory"


def providers() -> list[str]:
    """What this machine's ONNX Runtime can compute with."""
    return ort.get_available_providers()


def measure_peaks(
    *,
    precision: str = "fp32",
    threads: int | None = None,
    provider: str = CPU_PROVIDER,
    read_bytes: float = MOST_BYTES,
) -> Peaks:
    """Measure both, in under a second on a CPU.

    Args:
        precision: of the products, a key of ``FILES``.
        threads: as a bundle's session has them; None: ONNX Runtime's choice.
        provider: who computes.
        read_bytes: bytes that a decode step reads; within ``LEAST_BYTES`` and ``MOST_BYTES``.
    """
    run = _Product(precision, threads, provider)
    dtype = np.dtype(PRODUCT_DTYPES[precision])
    square = np.ones((PRODUCT_SIDE, PRODUCT_SIDE), dtype)
    seconds = _best(run.bound(square, square))
    flops = 2 * PRODUCT_SIDE**3 / seconds
    nbytes = int(min(max(read_bytes, LEAST_BYTES), MOST_BYTES))
    rows = max(1, nbytes // dtype.itemsize // WIDTH)
    matrix = np.ones((rows, WIDTH), dtype)
    seconds = _best(run.bound(np.ones((1, rows), dtype), matrix))
    return Peaks(flops, matrix.nbytes / seconds, precision, threads, matrix.nbytes)


class _Product:
    """A session that multiplies two matrices where the provider keeps its data."""

    def __init__(self, precision: str, threads: int | None, provider: str):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        file = Path(__file__).with_name(FILES[precision])
        self.session = ort.InferenceSession(str(file), options, providers=[provider])
        self.device = "cuda" if provider == CUDA_PROVIDER else "cpu"

    def bound(self, a: np.ndarray, b: np.ndarray) -> Callable[[], None]:
        """One product, with everything in place before the clock starts."""
        binding = self.session.io_binding()
        held = [ort.OrtValue.ortvalue_from_numpy(x, self.device, 0) for x in (a, b)]
        for name, value in zip("ab", held, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("c", self.device)

        def run(held=held) -> None:  # bound arrays must outlive the call
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


def _best(run: Callable[[], None]) -> float:
    """Seconds of the fastest of some runs: a peak is what nothing disturbed."""
    run()
    times = []
    for _ in range(PEAK_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
