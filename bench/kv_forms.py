"""Ways for ONNX Runtime to attend over an INT8 cache, at the shapes of small and large models.

    python -m visistage.bench.kv_forms

One layer's append and attention, caches written in place, all forms in turns:

    float      TensorScatter, Attention, FP32 caches
    restored   QuantizeLinear, TensorScatter, DequantizeLinear, Attention: what is built
    folded     scales multiplied into queries and outputs, the cache cast to float between them
    group      com.microsoft GroupQueryAttention over quantised caches: no engine has it, and it
               knows neither gates nor orders
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from ..runtime.backends.denormals import flushed
from .record import save

NAME = "kv-forms"
FORMS = ("float", "restored", "folded", "group")
SPARE = 64
"""Slots behind the last row that hold nothing."""


@dataclass(frozen=True)
class Shape:
    """Of one call: heads, key-value heads, head size, slots, new rows."""

    name: str
    heads: int
    groups: int
    width: int
    slots: int
    rows: int


def shapes() -> list[Shape]:
    """Decoding at two lengths and prefill of a picture, for three decoders."""
    sizes = (("llava-45m", 8, 8, 64), ("llava-7b", 32, 32, 128), ("7b, grouped", 32, 8, 128))
    calls = ((704, 1), (1152, 1), (704, 576))
    return [Shape(*size, *call) for size in sizes for call in calls]


def model(form: str, shape: Shape) -> bytes:
    """The graph of one form; scales are those of values within ±3."""
    group = form == "group"
    cached = TensorProto.FLOAT if form == "float" else TensorProto.INT8

    def rows(name: str, heads: int) -> Any:
        sizes = ["rows", heads * shape.width] if group else [heads, "rows", shape.width]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, *sizes])

    def cache(name: str) -> Any:
        return helper.make_tensor_value_info(name, cached, [1, shape.groups, "slots", shape.width])

    inputs = [rows("q", shape.heads), rows("k", shape.groups), rows("v", shape.groups)]
    inputs += [cache("keys"), cache("values")]
    outputs = [rows("out", shape.heads), cache("keys.out"), cache("values.out")]
    scale = np.full(shape.groups, 3 / 127, np.float32)
    constants = {"scale": scale, "zero": np.zeros(shape.groups, np.int8)}
    nodes = []

    def node(op: str, given: Sequence[str], out: str | Sequence[str], **attributes: Any) -> None:
        outs = [out] if isinstance(out, str) else list(out)
        nodes.append(helper.make_node(op, list(given), outs, **attributes))

    if group:
        constants = {"scale": np.full((1, shape.groups, 1, shape.width), 3 / 127, np.float32)}
        inputs += [
            helper.make_tensor_value_info("last", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("total", TensorProto.INT32, []),
        ]
        given = ["q", "k", "v", "keys", "values", "last", "total", "", "", "", "", ""]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [*given, "scale", "scale"],
                ["out", "keys.out", "values.out"],
                domain="com.microsoft",
                num_heads=shape.heads,
                kv_num_heads=shape.groups,
                kv_cache_bit_width=8,
                k_quant_type="PER_CHANNEL",
                v_quant_type="PER_CHANNEL",
            )
        )
    else:
        inputs += [
            helper.make_tensor_value_info("mask", TensorProto.BOOL, [1, 1, "rows", "slots"]),
            helper.make_tensor_value_info("at", TensorProto.INT64, [1]),
        ]
        for new, name in (("k", "keys"), ("v", "values")):
            if form != "float":
                node("QuantizeLinear", [new, "scale", "zero"], f"{new}.int", axis=1)
                new += ".int"
            node("TensorScatter", [name, new, "at"], f"{name}.out", axis=-2)
            if form == "restored":
                node("DequantizeLinear", [f"{name}.out", "scale"], f"{name}.float", axis=1)
            elif form == "folded":
                node("Cast", [f"{name}.out"], f"{name}.float", to=TensorProto.FLOAT)
        kept = [f"{n}.{'out' if form == 'float' else 'float'}" for n in ("keys", "values")]
        if form == "folded":
            per_head = np.repeat(scale, shape.heads // shape.groups).reshape(1, -1, 1, 1)
            constants["heads"] = per_head
            node("Mul", ["q", "heads"], "q.scaled")
            node("Attention", ["q.scaled", *kept, "mask"], "out.unscaled")
            node("Mul", ["out.unscaled", "heads"], "out")
        else:
            node("Attention", ["q", *kept, "mask"], "out")
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, form, inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def runner(form: str, shape: Shape) -> Callable[[], float]:
    """What runs one call and returns its milliseconds."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")  # as the runtime does
    session = flushed(
        ort.InferenceSession, model(form, shape), options, providers=["CPUExecutionProvider"]
    )
    random = np.random.default_rng(0)
    size = (1, shape.groups, shape.slots, shape.width)
    filled = random.uniform(-3, 3, size).astype(np.float32)
    if form != "float":
        filled = np.rint(filled * (127 / 3)).astype(np.int8)
    binding = session.io_binding()
    held: list[Any] = []
    for name in ("keys", "values"):
        value = ort.OrtValue.ortvalue_from_numpy(filled.copy())
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(f"{name}.out", value)
        held.append(value)
    used = shape.slots - SPARE
    feeds: dict[str, np.ndarray] = {"at": np.array([used - shape.rows])}
    feeds["mask"] = np.arange(shape.slots) <= np.arange(used - shape.rows, used)[:, None]
    feeds["mask"] = feeds["mask"][None, None]
    feeds |= {"last": np.array([used - 1], np.int32), "total": np.array(used, np.int32)}
    for name, heads in (("q", shape.heads), ("k", shape.groups), ("v", shape.groups)):
        rows = (1, heads, shape.rows, shape.width)
        if form == "group":
            rows = (1, shape.rows, heads * shape.width)
        feeds[name] = random.standard_normal(rows).astype(np.float32)
    wanted = {one.name for one in session.get_inputs()} - {"keys", "values"}
    for name in wanted:
        binding.bind_cpu_input(name, feeds[name])
    out = np.empty_like(feeds["q"])
    binding.bind_output("out", "cpu", 0, np.float32, out.shape, out.ctypes.data)
    held += [feeds, out]

    def run() -> float:
        start = time.perf_counter()
        flushed(session.run_with_iobinding, binding)
        assert held  # what is bound must live as long as this does
        return (time.perf_counter() - start) * 1e3

    return run


@click.command()
@click.option("--rounds", default=60, show_default=True)
@click.option("--dry", is_flag=True, help="Print the rows and leave the record alone.")
def main(rounds: int, dry: bool) -> None:
    """Measure every form at every shape, in turns; first deciles."""
    rows = []
    for shape in shapes():
        runners = {form: runner(form, shape) for form in FORMS}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(1 + (rounds if shape.rows == 1 else max(8, rounds // 6))):
            for form, run in runners.items():
                times[form].append(run())
        found = {f"{form}_p10_ms": quantiles(t[1:], n=10)[0] for form, t in times.items()}
        rows.append({**vars(shape), **found})
        click.echo(rows[-1], err=True)
    if not dry:
        save(NAME, f"python -m visistage.bench.kv_forms --rounds {rounds}", rows)


if __name__ == "__main__":
    main()
