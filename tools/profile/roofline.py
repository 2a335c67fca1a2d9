"""The machine's best rates, measured now, and how near each part of a bundle comes to them.

Two graphs of one node, run by the same ONNX Runtime with the same threads as a bundle: a large
square product for operations, a product with one row for bytes. The latter reads a matrix as large
as what a decode step reads, since a small model's weights stay in the processor's caches.

The lower bound of a call is the slower of its operations at the measured rate and its bytes at the
measured bandwidth (``graphs/plan/call_cost.py``): no kernel beats it. A part whose share of it is
below 1 has room left; what the share cannot say is whether kernels or calls are to blame.

The product's graphs are files beside this module (a test builds them anew and compares): neither
torch nor onnx is needed to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...graphs.bundle import Manifest
from ...graphs.plan.call_cost import GraphCall, Sizes, Work, total_work, work_of
from ...runtime.backends.onnx_runtime import ort
from ...runtime.backends.ort import CPU_PROVIDER, CUDA_PROVIDER, load_session
from .timing import image_layout, repeated, timed_ms

PRODUCT_SIDE = 1536
"""Side of the square product: large enough for the best rate, 0.1 s on two cores."""

MOST_BYTES = 256 << 20
"""Largest matrix that is read: beyond it, memory is as slow as it gets."""

LEAST_BYTES = 4 << 20
PEAK_REPEATS = 5
WIDTH = 4096
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
        """Return the least time for ``work``: the slower of its operations and its bytes."""
        return 1e3 * max(work.flops / self.flops, work.nbytes / self.bandwidth)

    def bound(self, work: Work) -> str:
        """Return which of the two that is: ``compute`` or ``memory``."""
        return "compute" if work.flops / self.flops >= work.nbytes / self.bandwidth else "memory"

    def better(self, other: Peaks) -> Peaks:
        """Return the higher rates of both: a peak is what nothing disturbed."""
        flops, bandwidth = max(self.flops, other.flops), max(self.bandwidth, other.bandwidth)
        return replace(self, flops=flops, bandwidth=bandwidth)


def providers() -> list[str]:
    """Return what this machine's ONNX Runtime can compute with."""
    return ort.get_available_providers()


def measure_peaks(
    *,
    precision: str = "fp32",
    threads: int | None = None,
    provider: str = CPU_PROVIDER,
    read_bytes: float = MOST_BYTES,
) -> Peaks:
    """Measure both rates, in under a second on a CPU.

    Args:
        precision: of the products, a key of ``FILES``.
        threads: as a bundle's session has them; None: ONNX Runtime's choice.
        provider: who computes.
        read_bytes: bytes that a decode step reads; within ``LEAST_BYTES`` and ``MOST_BYTES``.
    """
    product = _product(precision, threads, provider)
    dtype = np.dtype(PRODUCT_DTYPES[precision])
    square = np.ones((PRODUCT_SIDE, PRODUCT_SIDE), dtype)
    flops = 2 * PRODUCT_SIDE**3 / _best_seconds(product(square, square))
    nbytes = int(min(max(read_bytes, LEAST_BYTES), MOST_BYTES))
    rows = max(1, nbytes // dtype.itemsize // WIDTH)
    matrix = np.ones((rows, WIDTH), dtype)
    seconds = _best_seconds(product(np.ones((1, rows), dtype), matrix))
    return Peaks(flops, matrix.nbytes / seconds, precision, threads, matrix.nbytes)


def _product(
    precision: str, threads: int | None, provider: str
) -> Callable[[np.ndarray, np.ndarray], Callable[[], None]]:
    """Load a product; return what places two matrices where the provider keeps its data."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    file = Path(__file__).with_name(FILES[precision])
    session = load_session(file, options, [provider])
    device = "cuda" if provider == CUDA_PROVIDER else "cpu"

    def bound(a: np.ndarray, b: np.ndarray) -> Callable[[], None]:
        binding = session.io_binding()
        held = [ort.OrtValue.ortvalue_from_numpy(x, device, 0) for x in (a, b)]
        for name, value in zip("ab", held, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("c", device)

        def run(held=held) -> None:  # bound arrays must outlive the call
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run

    return bound


def _best_seconds(run: Callable[[], None]) -> float:
    """Return the seconds of the fastest of some runs after a first one."""
    run()
    return min(repeated(partial(timed_ms, run), PEAK_REPEATS)) / 1e3


def parts_of(
    manifest: Manifest, calls: Sequence[GraphCall], measured_ms: Mapping[str, float], peaks: Peaks
) -> list[dict[str, Any]]:
    """Return every graph among ``calls``, in the order of its first call, as plain data.

    ``floor_ms`` is the lower bound of its calls, ``share`` that over what was measured: 1 is the
    roofline.
    """
    out = []
    for graph in dict.fromkeys(call.graph for call in calls):
        own = works_of(manifest, [call for call in calls if call.graph == graph])
        work, lower_bound = total_work(own), sum(map(peaks.lower_bound_ms, own))
        measured = measured_ms.get(graph, 0.0)
        out.append(
            {
                "graph": graph,
                "calls": len(own),
                "flops": work.flops,
                "nbytes": work.nbytes,
                "floor_ms": lower_bound,
                "measured_ms": measured,
                "share": lower_bound / measured if measured else 0.0,
                "bound": peaks.bound(work),
            }
        )
    return out


def works_of(manifest: Manifest, calls: Sequence[GraphCall]) -> list[Work]:
    """Return what each call does in the bundle's precision, of an image as ``prompts`` yields."""
    config, sizes = manifest.config, Sizes.of(manifest.precision)
    layout = image_layout(config)
    return [work_of(call, config, manifest.plan, sizes, layout) for call in calls]
