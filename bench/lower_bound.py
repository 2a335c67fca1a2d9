"""The lower bound of a measurement: the least time at a machine's own rates.

Rates are measured, best of several, with the threads of every peer: products of large matrices, and
reading what no cache holds. Work is counted from the geometry (``graphs/plan/call_cost.py``), pairs
of rows that see each other only, weights and cached values read once. Neither depends on a peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from ..graphs.plan.call_cost import COUNTS, Work, head_work, layers_work, total_work
from ..graphs.plan.cost import Geometry
from ..graphs.text_config import TextConfig

ROWS, SIDE = 600, 2048
"""A prompt's rows through a square layer: enough to reach the rate, and soon over."""

READ_BYTES = 512 << 20
REPEATS = 7

PRECISIONS = {
    "fp32": ("float32", 4.0),
    "fp16": ("float32", 2.0),  # a CPU computes in FP32 from weights of two bytes
    "bf16": ("bfloat16", 2.0),
    "int8": ("int8", 1.0),
    # Weights in blocks: rows are rounded to eight bits within the product.
    "w8": ("int8", 1.0),
    "w4": ("int8", 0.5),
}
"""Precision -> the type whose rate bounds linear layers, and bytes of a weight."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of matrix products, by type (a multiply-add is two); bytes a second."""

    operations: dict[str, float]
    bandwidth: float

    def best(self, other: Rates) -> Rates:
        """Return the better of two measurements, each for itself: a disturbed one says nothing."""
        names = self.operations
        better = {name: max(self.operations[name], other.operations[name]) for name in names}
        return Rates(better, max(self.bandwidth, other.bandwidth))

    def to_dict(self) -> dict:
        """Return it as plain data, for the record."""
        return asdict(self)


def milliseconds(work: Work, rates: Rates, precision: str) -> float:
    """Return the longer of computing and reading ``work``, which counts numbers (``COUNTS``).

    Attention and caches are of FP32, or BF16 at that precision.
    """
    kind, weight_bytes = PRECISIONS[precision]
    half = kind == "bfloat16"
    attention = rates.operations["bfloat16" if half else "float32"]
    linear = (work.flops - work.attention_flops) / rates.operations[kind]
    read = work.weight_bytes * weight_bytes + work.cache_bytes * (2 if half else 4)
    return max(linear + work.attention_flops / attention, read / rates.bandwidth) * 1e3


def layer_work(text: TextConfig, rows: float, before: float) -> Work:
    """Count ``rows`` new, causal rows through one layer whose cache holds ``before``."""
    pairs = rows * before + rows * (rows + 1) / 2
    return layers_work(Geometry.of(text), 1, rows, pairs, before, COUNTS)


def prefill_layers(
    text: TextConfig,
    visual: Sequence[float],
    prefix: int,
    question: int,
    cached_layers: int | None = None,
) -> list[Work]:
    """Count every layer up to the first token's logits, and the output projection.

    Args:
        text: the decoder.
        visual: visual rows of every layer.
        prefix: rows before the image.
        question: rows after the image.
        cached_layers: None: caches are empty. Otherwise they hold the prefix, and in so many
            leading layers the image; later layers see the rows that this question keeps for the
            first time.
    """
    works = []
    for layer, count in enumerate(visual):
        if cached_layers is None:
            works.append(layer_work(text, prefix + count + question, 0))
        elif layer < cached_layers:
            works.append(layer_work(text, question, prefix + count))
        else:
            works.append(layer_work(text, count + question, prefix))
    return [*works, head_work(Geometry.of(text), COUNTS)]


def step_work(text: TextConfig, visual: Sequence[float], others: int) -> Work:
    """Count one token after a prompt with ``others`` rows of text."""
    layers = [layer_work(text, 1, others + count) for count in visual]
    return total_work([*layers, head_work(Geometry.of(text), COUNTS)])


def measure_rates(threads: int) -> Rates:
    """Measure the best rates of torch's and ONNX Runtime's products, and of reading memory."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        operations = {
            "float32": max(_torch_rate(torch.float32), _onnxruntime_rate("float32", threads)),
            "bfloat16": _torch_rate(torch.bfloat16),
            # Processors differ in whether the left side's sign costs anything.
            "int8": max(_onnxruntime_rate(left, threads) for left in ("int8", "uint8")),
        }
        values = torch.ones(READ_BYTES // 4)
        return Rates(operations, READ_BYTES / _best(values.sum))
    finally:
        torch.set_num_threads(before)


def _torch_rate(dtype) -> float:
    import torch

    rows, weights = torch.ones(ROWS, SIDE, dtype=dtype), torch.ones(SIDE, SIDE, dtype=dtype)
    return 2 * ROWS * SIDE**2 / _best(lambda: rows @ weights)


def _onnxruntime_rate(dtype: str, threads: int) -> float:
    """Measure a product of ``dtype`` with a constant, which is packed as a model's weights are."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from ..runtime.backends.onnx_runtime import ort

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    integer = dtype != "float32"
    out, name = (TensorProto.INT32, "MatMulInteger") if integer else (kind, "MatMul")
    right = np.ones((SIDE, SIDE), "int8" if integer else dtype)
    weights = numpy_helper.from_array(right, "weights")
    graph = helper.make_graph(
        [helper.make_node(name, ["rows", "weights"], ["product"])],
        "product",
        [helper.make_tensor_value_info("rows", kind, [ROWS, SIDE])],
        [helper.make_tensor_value_info("product", out, [ROWS, SIDE])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rows = np.ones((ROWS, SIDE), dtype)
    return 2 * ROWS * SIDE**2 / _best(lambda: session.run(None, {"rows": rows}))


def _best(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several calls, the first not counted."""
    call()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return min(taken)
