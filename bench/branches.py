"""Attention in one form for every call, and as graphs for a CPU branch it, at the shapes of models.

    python -m visistage.bench.branches [--threads 2] [--rounds 40]

One layer's attention over its cache, first deciles of turns. One form: gates on values where the
layer has any, then ``Attention`` over all slots. Branched:
``compile/export/branched_attention.py``.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import quantiles

import click
import numpy as np
import onnx_ir
import onnxruntime as ort

from ..compile.export.branched_attention import DOMAIN, OPERATOR, write_conditional_attention
from ..graphs.contract import INVISIBLE
from ..runtime.backends.denormals import flushed
from .record import save

NAME = "branches-cpu"
FORMS = ("one", "branched")
BEFORE = 5
"""Rows before the picture."""

QUESTION, ANSWERED = 25, 40

FLOAT = onnx_ir.DataType.FLOAT
TYPES = {
    "q": (FLOAT, 4),
    "k": (FLOAT, 4),
    "v": (FLOAT, 4),
    "visible": (onnx_ir.DataType.BOOL, 4),
    "write_index": (onnx_ir.DataType.INT64, 1),
    "value_gate": (FLOAT, 2),
    "sink_gate": (FLOAT, 2),
}
"""Type and rank of what ``ops.CONDITIONAL_ATTENTION`` takes, gates last."""


@dataclass(frozen=True)
class AttentionCall:
    """One call: ``rows`` behind ``before`` others; heads, for queries and cache alike, of ``width``
    channels; ``gates``: 0, or 2 in a layer where text does not see vision.
    """

    name: str
    heads: int
    width: int
    slots: int
    before: int
    rows: int
    gates: int


def calls() -> list[AttentionCall]:
    """A picture, a question about it, and a token of the answer."""
    out = []
    for name, heads, width, visual in (
        ("llava-45m, 576", 8, 64, 576),
        ("llava-45m, 2 304", 8, 64, 2304),
        ("llava-7b, 576", 32, 128, 576),
    ):
        seen = BEFORE + visual
        slots = -(-(seen + QUESTION + ANSWERED) // 128) * 128
        for gates in (0, 2):
            for before, rows in ((BEFORE, visual), (seen, QUESTION), (seen + ANSWERED, 1)):
                out.append(AttentionCall(name, heads, width, slots, before, rows, gates))
    return out


def branched(
    heads: int, groups: int, width: int, gates: int, in_order: bool, layers: int = 1
) -> onnx_ir.Model:
    """``layers`` calls of the operator, written out; each reads what the one before gives."""
    inputs = [
        onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(kind),
            shape=onnx_ir.Shape([f"{name}.{axis}" for axis in range(rank)]),
        )
        for name, (kind, rank) in list(TYPES.items())[: 5 + gates]
    ]
    facts = {"in_order": int(in_order), "heads": heads, "groups": groups, "width": width}
    nodes, (rows, *others) = [], inputs
    for layer in range(layers):
        node = onnx_ir.node(OPERATOR, [rows, *others], facts, domain=DOMAIN, name=f"call{layer}")
        rows = node.outputs[0]
        rows.name, rows.type = f"out{layer}", onnx_ir.TensorType(FLOAT)
        rows.shape = onnx_ir.Shape(["B", heads, "Q", width])
        nodes.append(node)
    graph = onnx_ir.Graph(inputs, [rows], nodes=nodes, opset_imports={"": 24}, name="attention")
    model = onnx_ir.Model(graph, ir_version=10)
    write_conditional_attention(model)
    return model


def model_of(form: str, call: AttentionCall) -> bytes:
    """The graph of one form."""
    model = branched(call.heads, call.heads, call.width, call.gates, form == "branched")
    if form == "one":  # what many rows take in a layer whose rows are in no order
        (node,) = (node for node in model.graph if node.op_type == "If")
        branch = node.attributes["then_branch"].as_graph()
        inside, out = list(branch), branch.outputs[0]
        branch.outputs.clear()
        branch.remove(inside)
        model.graph.insert_before(node, inside)
        model.graph.outputs[0] = out
        model.graph.remove(node)
    return onnx_ir.to_proto(model).SerializeToString()


def feeds_of(call: AttentionCall) -> dict[str, np.ndarray]:
    """Random rows and caches; the picture's values are hidden, and its first stands for them."""
    random = np.random.default_rng(0)
    used = call.before + call.rows
    order = np.where(np.arange(call.slots) < used, np.arange(call.slots), INVISIBLE)
    gate = np.ones((1, call.slots), np.float32)
    gate[:, BEFORE : call.slots * 3 // 4] = 0
    size = (1, call.heads, call.slots, call.width)
    feeds = {
        "q": random.standard_normal((1, call.heads, call.rows, call.width), np.float32),
        "k": random.standard_normal(size, np.float32),
        "v": random.standard_normal(size, np.float32),
        "visible": (order <= np.arange(call.before, used)[:, None])[None, None],
        "write_index": np.array([call.before]),
        "value_gate": gate,
        "sink_gate": 1 - gate,
    }
    return {name: feeds[name] for name in list(TYPES)[: 5 + call.gates]}


def times(call: AttentionCall, threads: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each form, which take turns and must give the same."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")  # as the runtime does
    options.add_session_config_entry("session.force_spinning_stop", "1")
    feeds = feeds_of(call)
    taken: dict[str, list[float]] = {form: [] for form in FORMS}
    sessions = {
        form: flushed(
            ort.InferenceSession,
            model_of(form, call),
            options,
            providers=["CPUExecutionProvider"],
        )
        for form in FORMS
    }
    found = {}
    for _ in range(1 + rounds):
        for form, session in sessions.items():
            # A form without cuts has no use for the place that the rows were written to.
            given = {one.name: feeds[one.name] for one in session.get_inputs()}
            start = time.perf_counter()
            (found[form],) = flushed(session.run, None, given)
            taken[form].append((time.perf_counter() - start) * 1e3)
    one, other = found.values()
    assert np.abs(one - other).max() < 1e-4, call
    return {f"{form}_p10_ms": quantiles(ms[1:], n=10)[0] for form, ms in taken.items()}


@click.command()
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(20), default=40, show_default=True)
@click.option("--dry", is_flag=True, help="Print the rows and leave the record alone.")
def main(threads: int, rounds: int, dry: bool) -> None:
    """Measure every call, record."""
    rows = []
    for call in calls():
        few = rounds * 10 if call.rows == 1 else rounds
        rows.append({**asdict(call), **times(call, threads, few)})
        click.echo(rows[-1], err=True)
    if not dry:
        command = f"python -m visistage.bench.branches --threads {threads} --rounds {rounds}"
        save(NAME, command, rows)


if __name__ == "__main__":
    main()
