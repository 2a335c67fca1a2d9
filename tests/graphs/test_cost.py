"""Costs against the printed digits of docs/methods.md, "Published cost figures"."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from visistage.graphs.plan.cost import (
    LLAVA_7B,
    LLAVA_13B,
    Geometry,
    Load,
    cost_of,
    dense_cost,
    plan_cost,
    reduction_percent,
)
from visistage.graphs.plan.plan import StagePlan
from visistage.graphs.plan.stages import Edge, Stage
from visistage.graphs.presets.presets import preset

MIB = 2**20
MOBILE_3B = Geometry(layers=32, hidden=2560, intermediate=6912, vocab=32000)
DENSE = preset("dense", 32, 576)


def visipruner(**options):
    return preset("visipruner", 32, 576, **options)


def with_first_stage(plan, **changes):
    """``plan`` with its first stage changed."""
    first = dataclasses.replace(plan.stages[0], **changes)
    return dataclasses.replace(plan, stages=(first, *plan.stages[1:]))


STATIC = visipruner(t=14, keep=32, e=23)
TIV = with_first_stage(STATIC, modes=("text_blind",) * 6 + ("dense",) * 9)
NOVV = with_first_stage(STATIC, modes=("text_blind_novv",) * 6 + ("dense",) * 9)


def flat(visual_tokens):
    return [Load("dense", visual_tokens, 32)]


def steps(*pairs):
    return [Load("dense", visual_tokens, count) for count, visual_tokens in pairs]


def average(shallow, middle, absent, kind="no_attention", keep=10.3):
    """A published average: K = 10.3 is no plan, but it has a cost."""
    tiv = [] if kind == "no_attention" else [Load("text_blind", 576, 6)]
    full = Load(kind, 576, shallow - 6 * len(tiv))
    return [*tiv, full, Load("dense", keep, middle), Load("dense", 0, absent)]


# mean tokens per layer | visual only % | prefill % at T=40 | at T=60 | visual KV MiB
TABLE = {
    "published average": (average(15, 9, 8, keep=10), "272.8 53.7 47.7 46.4 136.4"),
    "paper's ideal": (average(12, 10, 10, keep=10), "219.1 62.8 55.8 54.2 109.6"),
    "caption trace": (visipruner(t=18, keep=10, e=27), "344.8 40.1 35.7 34.6 172.4"),
    "t=9 K=32": (visipruner(t=9, keep=32, e=23), "194.0 66.4 58.9 57.2 97.0"),
    "t=11 K=32": (visipruner(t=11, keep=32, e=23), "228.0 60.5 53.7 52.1 114.0"),
    "t=14 K=16": (visipruner(t=14, keep=16, e=23), "274.5 52.4 46.5 45.2 137.25"),
    "t=14 K=32": (STATIC, "279.0 51.6 45.8 44.5 139.5"),
    "t=14 K=32, layer 0 blind": (TIV, "279.0 51.6 45.8 44.5 139.5"),
    "t=14 K=64": (visipruner(t=14, keep=64, e=23), "288.0 50.1 44.5 43.2 144.0"),
    "t=14 K=128": (visipruner(t=14, keep=128, e=23), "306.0 47.0 41.7 40.5 153.0"),
    "t=14 K=32 without V-V": (NOVV, "279.0 55.1 48.9 47.5 85.5"),
    "t=14 K=32 injected at 6": (
        steps((6, 0), (9, 576), (9, 32), (8, 0)),
        "171 70.3 62.4 60.6 85.5",
    ),
    "t=18 K=32": (visipruner(t=18, keep=32, e=27), "351.0 39.1 34.7 33.7 175.5"),
    "exit only": (preset("exit-only", 32, 576, e=24), "450 21.9 19.4 18.8 225"),
    "FastV k=3 r=.75": (preset("fastv", 32, 576), "184.5 68.4 60.7 58.9 92.25"),
    "FastV k=2 r=.5": (preset("fastv", 32, 576, k=2, r=0.5), "306 47.4 42.1 40.8 153"),
    "PDrop": (preset("pyramiddrop", 32, 576), "270 53.4 47.4 46.0 135"),
    "before the decoder 192": (flat(192), "192 67.2 59.6 57.9 96"),
    "before the decoder 128": (flat(128), "128 78.2 69.4 67.4 64"),
    "before the decoder 64": (flat(64), "64 89.1 79.1 76.8 32"),
    "EmbedLens alive only": (flat(346), "346 40.5 35.9 34.9 173"),
    "HiDrop 48": (
        steps((16, 0), (2, 576), (4, 87), (2, 10), (2, 5), (6, 1)),
        "48 91.7 81.4 79.0 24",
    ),
    "HiDrop 64": (
        steps((16, 0), (2, 576), (4, 215), (2, 10), (2, 5), (6, 1)),
        "64 89.0 78.9 76.6 32",
    ),
    "HiDrop 80": (
        steps((16, 0), (2, 576), (3, 453), (3, 10), (3, 5), (5, 1)),
        "80 86.1 76.4 74.2 40",
    ),
    "ViCA": (preset("vica", 32, 576), "144 95.9 86.0 83.5 72"),
    "text only": (flat(0), "0 100 88.7 86.2 0"),
}


def cost(plan_or_loads, text=40):
    if isinstance(plan_or_loads, StagePlan):
        return plan_cost(plan_or_loads, LLAVA_7B, 35, text)
    return cost_of(plan_or_loads, LLAVA_7B, 35, text)


def digits(value, printed):
    """``value`` with as many decimals as ``printed``."""
    return f"{value:.{len(printed.partition('.')[2])}f}"


@pytest.mark.parametrize("row", TABLE)
def test_plan_table_to_the_printed_digit(row):
    subject, line = TABLE[row]
    printed = line.split()
    dense = {text: cost(DENSE, text) for text in (40, 60)}
    found = [
        cost(subject).mean_visual_tokens,
        reduction_percent(cost(subject).visual_macs, dense[40].visual_macs),
        reduction_percent(cost(subject).prefill_macs, dense[40].prefill_macs),
        reduction_percent(cost(subject, 60).prefill_macs, dense[60].prefill_macs),
        cost(subject).visual_kv_bytes / MIB,
    ]
    assert [digits(*pair) for pair in zip(found, printed, strict=True)] == printed


@pytest.mark.parametrize(
    ("loads", "at_40", "at_60"),
    [
        (average(15, 9, 8, "dense"), "46.7", "45.4"),
        (average(12, 10, 10, "dense"), "55.0", "53.4"),
    ],
)
def test_averaged_rows_with_the_modes_of_this_version(loads, at_40, at_60):
    for text, printed in ((40, at_40), (60, at_60)):
        dense = cost(DENSE, text).prefill_macs
        assert digits(reduction_percent(cost(loads, text).prefill_macs, dense), printed) == printed


def test_one_layer_of_the_7b():
    (layer,) = cost_of([Load("dense", 576)], LLAVA_7B).loads
    d, m, n = 4096, 11008, 576
    assert f"{layer.visual_macs / 1e9:.3f}" == "119.286"
    assert f"{100 * 3 * n * d * m / layer.visual_macs:.1f}" == "65.3"
    assert f"{100 * 4 * n * d * d / layer.visual_macs:.1f}" == "32.4"
    assert f"{100 * 2 * n * n * d / layer.visual_macs:.2f}" == "2.28"
    (kept,) = cost_of([Load("dense", 10.3)], LLAVA_7B).loads
    assert f"{100 * kept.visual_macs / layer.visual_macs:.2f}" == "1.75"
    assert layer.visual_kv_bytes / 576 == 16 * 1024


@pytest.mark.parametrize(
    ("geometry", "visual_tokens", "tera"),
    [(LLAVA_7B, 576, "3.817"), (LLAVA_13B, 576, "7.444"), (MOBILE_3B, 144, "0.369")],
)
def test_visual_macs_of_the_dense_models(geometry, visual_tokens, tera):
    found = cost_of([Load("dense", visual_tokens, geometry.layers)], geometry)
    assert f"{found.visual_macs / 1e12:.3f}" == tera


@pytest.mark.parametrize(("text", "tera"), [(13, "4.143"), (40, "4.327"), (60, "4.464")])
def test_whole_prefill_of_the_dense_7b(text, tera):
    assert f"{cost(DENSE, text).prefill_macs / 1e12:.3f}" == tera


@pytest.mark.parametrize(
    ("loads", "percent"), [(average(12, 10, 10), "62.81"), (average(12, 12, 8), "62.70")]
)
def test_headline_of_the_paper(loads, percent):
    dense = cost(DENSE).visual_macs
    assert f"{reduction_percent(cost(loads).visual_macs, dense):.2f}" == percent


def test_headline_of_the_measured_average():
    dense = cost(DENSE).visual_macs
    found = reduction_percent(cost(average(15, 9, 8)).visual_macs, dense)
    assert 53.7 <= round(found, 1) <= 53.8
    exact = cost(average(14.93, 9.07, 8)).visual_macs
    assert f"{reduction_percent(exact, dense):.1f}" == "53.9"
    counted = cost([Load("dense", 576, 14.6), Load("dense", 10.3, 9.4), Load("dense", 0, 8)])
    assert f"{reduction_percent(counted.visual_macs, dense):.1f}" == "53.9"


@pytest.mark.parametrize("exit_", [28, 29, 30])
def test_headline_of_the_13b(exit_):
    dense = cost_of([Load("dense", 576, 40)], LLAVA_13B).visual_macs
    loads = [Load("no_attention", 576, 18), Load("dense", 10.3, exit_ - 18), Load("dense", 0, 10)]
    found = reduction_percent(cost_of(loads, LLAVA_13B).visual_macs, dense)
    assert 55.3 <= round(found, 1) <= 55.4


def test_sensitivities():
    dense = cost(DENSE).visual_macs

    def saved(**options):
        return reduction_percent(cost(visipruner(**options)).visual_macs, dense)

    assert f"{saved(t=14, keep=10, e=23) - saved(t=15, keep=10, e=23):.1f}" == "3.1"
    assert f"{saved(t=14, keep=10, e=23) - saved(t=14, keep=32, e=23):.1f}" == "1.1"
    assert f"{saved(t=14, keep=10, e=23) - saved(t=14, keep=10, e=24):.2f}" == "0.05"


def test_paper_accounting_drops_attention_of_the_whole_first_stage():
    plan = visipruner(t=11, keep=10, e=21)
    found = plan_cost(plan, LLAVA_7B, accounting="paper")
    loads = [Load("no_attention", 576, 12), Load("dense", 10, 10), Load("dense", 0, 10)]
    same = cost_of(loads, LLAVA_7B)
    assert found.visual_macs == same.visual_macs
    assert found.prefill_macs == same.prefill_macs
    assert plan_cost(DENSE, LLAVA_7B, accounting="paper").visual_macs == cost(DENSE).visual_macs


def test_graphs_accounting_counts_what_gates_do_not_skip():
    loads = steps((15, 576), (9, 32), (8, 0))
    found = plan_cost(NOVV, LLAVA_7B, accounting="graphs")
    assert found.prefill_macs == cost(loads).prefill_macs
    assert found.visual_kv_bytes / MIB == 139.5


def test_unknown_accounting():
    with pytest.raises(ValueError, match="expected one of modes, paper, graphs"):
        plan_cost(DENSE, LLAVA_7B, accounting="papers")


def test_bytes_of_a_decode_step():
    found = cost(DENSE)
    assert found.kv_bytes == (35 + 576 + 40) * 32 * 16 * 1024
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert found.weight_bytes == 2 * (32 * layer + 4096 * 32000)
    assert found.decode_read_bytes == found.weight_bytes + found.kv_bytes
    small = plan_cost(DENSE, LLAVA_7B, kv_element_bytes=1, weight_element_bytes=0.5)
    assert small.kv_bytes * 2 == found.kv_bytes
    assert small.weight_bytes * 4 == found.weight_bytes


def test_grouped_queries_make_keys_and_values_cheaper():
    class Text:
        layers, hidden, intermediate, vocab = 32, 4096, 11008, 32000
        heads, kv_heads, head_dim = 32, 8, 128

    grouped = plan_cost(DENSE, Geometry.of(Text()))
    assert grouped.visual_kv_bytes * 4 == cost(DENSE).visual_kv_bytes
    saved = cost(DENSE).prefill_macs - grouped.prefill_macs
    assert saved == 32 * (35 + 576 + 40) * 2 * 4096 * (4096 - 1024)


def test_dense_cost_has_the_plan_s_image():
    plan = preset("visipruner", 8, 144)
    geometry = Geometry(layers=8, hidden=64, intermediate=128, vocab=99)
    assert dense_cost(plan, geometry, 3, 5).prefill_macs == (
        plan_cost(preset("dense", 8, 144), geometry, 3, 5).prefill_macs
    )


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(["modes", "paper", "graphs"]))
def test_cost_grows_with_t_keep_and_e(data, accounting):
    layers, visual = data.draw(st.integers(4, 12)), data.draw(st.integers(2, 60))
    e = data.draw(st.integers(2, layers - 1))
    t = data.draw(st.integers(1, e - 1))
    shallow = data.draw(st.integers(0, t))
    keep = data.draw(st.integers(1, visual))
    geometry = Geometry(layers=layers, hidden=16, intermediate=40, vocab=50, kv_width=8)

    def costs(t=t, keep=keep, e=e):
        plan = preset("visipruner", layers, visual, shallow=shallow, t=t, keep=keep, e=e)
        found = plan_cost(plan, geometry, 3, 4, accounting=accounting)
        return found.visual_macs, found.prefill_macs, found.visual_kv_bytes, found.kv_bytes

    if t + 1 < e and not (accounting == "paper" and shallow):
        assert all(a <= b for a, b in zip(costs(), costs(t=t + 1), strict=True))
    if keep < visual:
        assert all(a < b for a, b in zip(costs(), costs(keep=keep + 1), strict=True))
    if e + 1 < layers:
        assert all(a < b for a, b in zip(costs(), costs(e=e + 1), strict=True))


def test_a_hand_made_plan_equals_its_preset():
    stages = (Stage((0, 25), 576, ("dense",) * 25), Stage((25, 32), 0, ("dense",) * 7))
    plan = StagePlan("mine", 32, 576, stages, (Edge("drop"),))
    assert cost(plan).loads == cost(preset("exit-only", 32, 576, e=24)).loads
