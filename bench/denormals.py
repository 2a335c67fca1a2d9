"""What attention under a causal mask costs on this CPU where denormals are computed, or flushed.

    python -m visistage.bench.denormals [--threads 1]

Best of several calls.
"""

from __future__ import annotations

import time

import click
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from ..runtime.backends.denormals import AVAILABLE, flushed
from .record import save

SHAPES = ((4, 577, 64), (8, 576, 64), (32, 576, 128))
"""Heads, rows, width: llava-45m's tower under a mask, its decoder, a 7B's decoder."""

REPEATS = 15


@click.command()
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
def main(threads: int) -> None:
    """Measure, record."""
    if not AVAILABLE:
        raise click.ClickException("the runtime cannot flush denormals on this machine")
    rows = [
        {
            **dict(zip(("heads", "rows", "width"), shape, strict=True)),
            "computed": _attention(*shape, threads, flush=False),
            "flushed": flushed(_attention, *shape, threads, flush=True),
        }
        for shape in SHAPES
    ]
    save("denormals-cpu", f"python -m visistage.bench.denormals --threads {threads}", rows)


def _attention(heads: int, rows: int, width: int, threads: int, *, flush: bool) -> float:
    """Milliseconds of attention of ``rows`` rows to those before them."""
    shape = [1, heads, rows, width]
    graph = helper.make_graph(
        [helper.make_node("Attention", ["q", "k", "v", "mask"], ["out"])],
        "attention",
        [
            *(helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "qkv"),
            helper.make_tensor_value_info("mask", TensorProto.BOOL, [1, 1, rows, rows]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.set_denormal_as_zero", str(int(flush)))
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shape, np.float32) for name in "qkv"}
    feeds["mask"] = np.tri(rows, dtype=bool)[None, None]
    taken = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        session.run(None, feeds)
        taken.append((time.perf_counter() - started) * 1e3)
    return min(taken[1:])


if __name__ == "__main__":
    main()
