"""Attention in its forms: each is the reference's sum, and what lets calls be cut holds."""

import numpy as np
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.branched_attention import (
    APPENDING,
    DOMAIN,
    OPERATOR,
    PIECES,
    write_conditional_attention,
)
from visistage.compile.export.export import prefix_node_names
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.contract import MANY_ROWS, PADDING_ORDER
from visistage.graphs.modules.ops import Eager, Gate, View
from visistage.graphs.presets.presets import preset
from visistage.runtime.session import load
from visistage.tests.support import toy

LAYERS = 6
WIDTH = 8
PLANS = ["dense", "visipruner", "fastv", "pyramiddrop", "visipruner-adaptive"]


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
"""Type and rank of what ``onnx_ops.CONDITIONAL_ATTENTION`` takes, gates last."""


def branched(
    heads: int, groups: int, width: int, gates: int, in_order: bool, layers: int = 1
) -> onnx_ir.Model:
    """Return ``layers`` calls of the operator, written out; each reads the output before it."""
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


def session_of(model):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = onnx_ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 6), st.integers(MANY_ROWS, MANY_ROWS + 7)),
    before=st.integers(0, 9),
    spare=st.integers(0, 5),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    gates=st.integers(0, 2),
    in_order=st.booleans(),
    seed=st.integers(0, 9),
)
def test_both_forms_are_the_reference(rows, before, spare, batch, heads, gates, in_order, seed):
    """Any number of rows, batch, groups of heads; slots that hold nothing hold anything."""
    if not gates and not in_order:
        in_order = True  # nothing to branch on: ops emit plain attention
    generator = torch.Generator().manual_seed(seed)
    used = before + rows
    shape = (batch, heads[1], used + spare, WIDTH)
    q = torch.randn(batch, heads[0], rows, WIDTH, generator=generator)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    v[:, :, used:] = 1e4
    if in_order:
        visible = torch.arange(used + spare) <= torch.arange(before, used)[:, None]
        visible = visible.expand(batch, 1, -1, -1).clone()
    else:
        visible = torch.rand(batch, 1, rows, used + spare, generator=generator) < 0.6
        visible[..., used:] = False
    visible[..., before] |= ~visible.any(-1)  # no row sees nothing
    gate = None
    if gates:
        value = torch.randint(0, 2, (batch, used + spare), generator=generator).float()
        sink = (1 - value) if gates == 2 else None
        gate = Gate(value, sink, renorm=False)
    view = View(torch.full((batch,), before), visible)
    want = q
    for _ in range(2):
        want = Eager().gated_attention(want, k, v, view, gate)
    feeds = {"q": q, "k": k, "v": v, "visible": visible, "write_index": view.write_index}
    if gate is not None:
        feeds |= {"value_gate": gate.value, **({} if gates == 1 else {"sink_gate": gate.sink})}
    session = session_of(branched(*heads, WIDTH, gates, in_order, layers=2))
    (got,) = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    assert np.abs(got - want.numpy()).max() < 2e-5


def appending(heads: int, groups: int, in_order: bool) -> onnx_ir.Model:
    """Return a call that appends its rows, written out."""
    dims = {
        "q": ["B", heads, "Q", WIDTH],
        **{name: ["B", groups, "Q", WIDTH] for name in ("k", "v")},
        **{name: ["B", groups, "S", WIDTH] for name in ("key", "value")},
    }
    kinds = dict.fromkeys(dims, FLOAT) | {"visible": onnx_ir.DataType.BOOL}
    kinds |= {"write_index": onnx_ir.DataType.INT64}
    dims |= {"visible": ["B", 1, "Q", "S"], "write_index": ["B"]}
    inputs = [
        onnx_ir.Value(name=n, type=onnx_ir.TensorType(kinds[n]), shape=onnx_ir.Shape(shape))
        for n, shape in dims.items()
    ]
    facts = {"in_order": int(in_order), "heads": heads, "groups": groups, "width": WIDTH}
    node = onnx_ir.node(APPENDING, inputs, facts, domain=DOMAIN, num_outputs=3)
    for out, like in zip(node.outputs, ("q", "key", "value"), strict=True):
        out.name, out.type = f"{like}.out", onnx_ir.TensorType(FLOAT)
        out.shape = onnx_ir.Shape(dims[like])
    graph = onnx_ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 24}, name="a")
    model = onnx_ir.Model(graph, ir_version=10)
    write_conditional_attention(model)
    return model


@settings(max_examples=60, deadline=None)
@given(
    rows=st.one_of(st.just(1), st.integers(2, 6), st.integers(MANY_ROWS, MANY_ROWS + 7)),
    before=st.integers(0, 9),
    apart=st.integers(0, 3),
    spare=st.integers(0, 5),
    hole=st.booleans(),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    in_order=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_form_appends(rows, before, apart, spare, hole, heads, in_order, seed):
    """Two lanes, as full as each other or not, with a slot that nothing sees or without."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.tensor([before, before + (apart if rows == 1 else 0)])
    slots = int(first.max()) + rows + spare
    q = torch.randn(2, heads[0], rows, WIDTH, generator=generator)
    new = [torch.randn(2, heads[1], rows, WIDTH, generator=generator) for _ in range(2)]
    held = [torch.randn(2, heads[1], slots, WIDTH, generator=generator) for _ in range(2)]
    own = first[:, None] + torch.arange(rows)
    visible = (torch.arange(slots) <= own[..., None])[:, None]
    if hole and before:
        visible[1, ..., before - 1] = False
    whole = [cache.clone() for cache in held]
    for cache, appended in zip(whole, new, strict=True):
        for lane, at in enumerate(first):
            cache[lane, :, at : at + rows] = appended[lane]
    want = Eager().attend(q, *whole, visible)
    feeds = {"q": q, "k": new[0], "v": new[1], "key": held[0], "value": held[1]}
    feeds |= {"visible": visible, "write_index": first}
    session = session_of(appending(*heads, in_order))
    got, *caches = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    assert np.abs(got - want.numpy()).max() < 2e-5
    for mine, cache in zip(caches, whole, strict=True):
        for lane, at in enumerate(first):
            assert (mine[lane, :, : at + rows] == cache[lane, :, : at + rows].numpy()).all()


@pytest.mark.parametrize(("rows", "hole", "reads"), [(1, False, False), (1, True, True)])
def test_a_row_that_sees_all_reads_no_slot_behind_it(rows, hole, reads):
    """Poison in a free slot meets the scores of every other form."""
    shape = (1, 1, rows, WIDTH)
    feeds = {name: np.ones(shape, np.float32) for name in "qkv"}
    feeds |= {name: np.ones((1, 1, 6, WIDTH), np.float32) for name in ("key", "value")}
    feeds["key"][:, :, 5] = np.nan
    feeds["visible"] = (np.arange(6) <= 3).reshape(1, 1, 1, 6).copy()
    feeds["visible"][..., 1] = not hole
    out = session_of(appending(1, 1, True)).run(None, feeds | {"write_index": np.array([3])})[0]
    assert np.isnan(out).any() == reads


def test_what_is_hidden_is_not_computed():
    """Poison in slots that a row of a piece cannot see never meets its scores."""
    rows = 4 * MANY_ROWS
    q, k, v = (np.ones((1, 1, rows, WIDTH), np.float32) for _ in range(3))
    k[:, :, rows // 2 :] = np.nan
    visible = np.tril(np.ones((rows, rows), bool))[None, None]
    feeds = {"q": q, "k": k, "v": v, "visible": visible, "write_index": np.zeros(1, np.int64)}
    (got,) = session_of(branched(1, 1, WIDTH, 0, True)).run(None, feeds)
    assert np.isfinite(got[:, :, : rows // 2]).all()
    assert np.isnan(got[:, :, rows // 2 :]).all()


def test_a_gate_shut_on_the_weights_keeps_a_few_rows_from_reading_values():
    """A token's values are read as they are stored: no copy of them is made under gates."""
    model = branched(2, 2, WIDTH, 2, True)
    (branch, *_) = (node for node in model.graph if node.op_type == "If")
    few = branch.attributes["else_branch"].as_graph()
    products = [node for node in few if node.op_type == "MatMul"]
    values = model.graph.inputs[2]
    assert any(values in node.inputs for node in products)
    readers = {node.op_type for node in few if values in node.inputs}
    assert readers == {"MatMul", "GatherElements", "Shape"}


def test_branches_share_what_cuts_a_call_and_carry_names_of_layers():
    model = branched(2, 2, WIDTH, 0, True, layers=2)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("If") == 2
    assert kinds.count("Split") == 2
    many = next(n for n in model.graph if n.op_type == "If").attributes["then_branch"].as_graph()
    assert sum(node.op_type == "Attention" for node in many) == PIECES
    weight = onnx_ir.Value(
        name="model.layers.3.q.weight", const_value=onnx_ir.tensor([1.0], name="w")
    )
    model.graph.register_initializer(weight)
    model.graph.insert_before(
        model.graph[0], onnx_ir.Node("", "Add", [weight, weight], name="first")
    )
    prefix_node_names(model)
    assert all(node.name.startswith("layers.3/") for node in model.graph.all_nodes())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("toy"), layers=LAYERS, kv_heads=2)


def in_order(stage, order, slot_order, write_index):
    """Whether no row of a call of the first stage may see a slot behind its own."""
    if stage:
        return True
    slots = np.arange(slot_order.shape[1])
    own = write_index + np.arange(order.shape[1])
    sees = slot_order[:, None, :] <= order[:, :, None]
    behind = slots[None, None, :] > own[None, :, None]
    real = order[:, :, None] < PADDING_ORDER  # a padding row may see anything: nobody reads it
    return not (sees & behind & real).any()


@pytest.mark.parametrize("plan", PLANS)
def test_calls_of_the_first_stage_come_in_order(checkpoint, tmp_path, plan):
    """What ``in_order`` takes for granted: pictures, several, none, kept ones, long answers."""
    bundle = make_bundle(str(checkpoint), plan=plan, target="cpu", out=tmp_path)
    seen = []
    with load(bundle.path) as session:
        session.eos = frozenset()
        run = session.executor.append

        def append(stage, rows, positions, order, slot_order, write_index, *more):
            seen.append(in_order(stage, order, slot_order, write_index))
            return run(stage, rows, positions, order, slot_order, write_index, *more)

        session.executor.append = append
        images = [np.full((40, 40, 3), shade, np.uint8) for shade in (10, 90, 200)]
        for shown, question in (
            (images[:1], "What is this?"),
            (images[:1], "And now?"),
            (images[1:], "Which is larger?"),
            ([], "Say something."),
            (images[:1], "Again?"),
        ):
            session.infer(shown, question, max_tokens=9)
    assert len(seen) > 40
    assert all(seen)


@pytest.mark.parametrize("plan", PLANS)
def test_so_do_those_of_a_batch(checkpoint, monkeypatch, plan):
    """Pictures elsewhere in every sample, two of them, or none."""
    opened = open_checkpoint(str(checkpoint))
    text = toy.make_config(layers=LAYERS, kv_heads=2)["text_config"]
    text |= {"rope_theta": text["rope_parameters"]["rope_theta"]}
    weights = {name: opened.load(name) for name in opened.tensors}
    count = opened.config.visual_tokens
    rows = torch.randn(3, 2 * count + 12, opened.config.text.hidden)
    spans = [[(4, 4 + count)], [(2, 2 + count), (5 + count, 5 + 2 * count)], []]
    seen, run = [], chain.TorchExecutor.append

    def append(self, stage, rows, positions, order, slot_order, write_index, *more):
        seen.append(in_order(stage, order, slot_order, write_index))
        return run(self, stage, rows, positions, order, slot_order, write_index, *more)

    monkeypatch.setattr(chain.TorchExecutor, "append", append)
    if plan == "visipruner-adaptive":  # decides for one prompt at a time
        rows, spans = rows[:1], spans[:1]
    chain.run(weights, text, rows, spans, preset(plan, LAYERS, count), 5)
    assert len(seen) > 5
    assert all(seen)
