"""What attention under a causal mask costs on this CPU where denormals are computed, or flushed.

    python -m visistage.bench.denormals [--threads 1]

ONNX Runtime decides for a process's calling thread when its first session is made, so each way runs
in a process of its own. Best of several calls.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import click
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from .record import save

SHAPES = ((4, 577, 64), (8, 576, 64), (32, 576, 128))
"""Heads, rows, width: llava-45m's tower under a mask, its decoder, a 7B's decoder."""

WAYS = {"computed": "0", "flushed": "1"}
ENTRY = "session.set_denormal_as_zero"
REPEATS = 15


@click.command()
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--only", hidden=True, type=click.Choice(list(WAYS)))
def main(threads: int, only: str | None) -> None:
    """Measure, record."""
    if only:
        print(json.dumps([_attention(*shape, threads, WAYS[only]) for shape in SHAPES]))
        return
    rows = [dict(zip(("heads", "rows", "width"), shape, strict=True)) for shape in SHAPES]
    for way in WAYS:
        command = [sys.executable, "-m", "visistage.bench.denormals", "--threads", str(threads)]
        done = subprocess.run([*command, "--only", way], capture_output=True, text=True, check=True)
        for row, ms in zip(rows, json.loads(done.stdout), strict=True):
            row[way] = ms
    save("denormals-cpu", f"python -m visistage.bench.denormals --threads {threads}", rows)


def _attention(heads: int, rows: int, width: int, threads: int, flush: str) -> float:
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
    options.add_session_config_entry(ENTRY, flush)
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
