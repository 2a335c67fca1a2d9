"""``visistage profile``: its numbers add up, its commands are real, its page needs nothing."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from PIL import Image
from visistage.cli.main import main
from visistage.cli.show.profile_view import closing_lines
from visistage.compile.build import make_bundle
from visistage.compile.export.export import prefix_node_names
from visistage.demo.gallery import IMAGES_FOLDER, bundled
from visistage.graphs.bundle import ANY_CONTEXT, Bundle
from visistage.graphs.errors import BundleError, CapacityError, PromptError
from visistage.graphs.plan.call_cost import GraphCall, Work, question_calls, token_calls
from visistage.runtime.hardware import peak_memory
from visistage.runtime.session import Session
from visistage.tests.support import toy
from visistage.tools.findings import answer_words
from visistage.tools.profile import peak_memory as memory
from visistage.tools.profile import polygraphy_runs as stock
from visistage.tools.profile import roofline
from visistage.tools.profile.answers import MAX_TOKENS, image_questions
from visistage.tools.profile.machine import clock_words, clocks, machine_facts, parse_power_mode
from visistage.tools.profile.operators import OTHER, operator_times
from visistage.tools.profile.power import (
    Ina3221,
    JetsonStats,
    Meter,
    Nvml,
    PowerSample,
    Tegrastats,
    energy,
    parse_jtop,
    parse_tegrastats,
)
from visistage.tools.profile.profile import baseline_bundle, profile
from visistage.tools.profile.profile_facts import above_roofline, speed_up
from visistage.tools.profile.profile_page import render_profile, round_step, ticks
from visistage.tools.profile.roofline import FILES, Peaks, measure_peaks, parts_of
from visistage.tools.profile.sweep import counts_of
from visistage.tools.profile.timing import (
    Settings,
    Spread,
    measure_bundles,
    prompts,
    repeated,
    time_questions,
    timed_calls,
)

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
TARGETS = ("rtx", "orin-jp62", "orin-jp72")
QUICK = Settings(repetitions=3, warm_up=1, tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    checkpoint = toy.make_checkpoint(folder / "toy", scale=2.0)
    for plan in ("dense", PLAN):
        make_bundle(str(checkpoint), plan=plan, out=folder / "engines")
    return folder


@pytest.fixture(scope="module")
def bundles(folder):
    found = {}
    for file in (folder / "engines").rglob("manifest.json"):
        bundle = Bundle.open(file.parent)
        found["dense" if bundle.manifest.plan.is_dense else "pruned"] = bundle
    return found


@pytest.fixture(scope="module")
def series(bundles):
    with Session(bundles["pruned"], threads=1) as one, Session(bundles["dense"], threads=1) as two:
        return measure_bundles({"plan": one, "against": two}, QUICK)


@pytest.fixture(scope="module")
def facts(bundles):
    return profile(bundles["pruned"].path, settings=QUICK, threads=1)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 10, 99, 100, 101])
def test_percentiles_are_the_nearest_ranks(n):
    values = np.random.default_rng(n).permutation(n).astype(float)
    found = Spread.of(list(values))
    assert found.median == np.median(values)
    for share, value in ((90, found.p90), (99, found.p99)):
        assert value == np.percentile(values, share, method="inverted_cdf")
    assert (found.least, found.n) == (0.0, n)


def test_a_run_is_repeated_until_its_time_is_over():
    assert repeated(lambda: 1, 3) == [1, 1, 1]
    assert repeated(lambda: 1, 3, seconds=0) == [1]
    assert repeated(lambda: time.sleep(0.03), 100, seconds=0.05) == [None, None]


def test_no_image_and_no_question_comes_twice():
    source = prompts()
    seen = [next(source) for _ in range(30)]
    assert len({one.image for one in seen}) == 30
    assert len({one.first for one in seen} | {one.second for one in seen}) == 60
    assert next(prompts()) == seen[0]


def test_the_parts_of_an_answer_add_up_to_the_whole(series):
    for one in series.values():
        assert len(one.cold) == len(one.again) == QUICK.repetitions
        for question in [*one.cold, *one.again]:
            graphs = sum(question.graphs.values())
            assert question.preprocess + graphs + question.host == pytest.approx(
                question.first_token
            )
            assert question.host > 0
            assert 0 < question.step_host < question.per_token
            whole = question.first_token + question.later * question.per_token
            assert whole == pytest.approx(question.total)
            assert question.later == QUICK.tokens - 1


def test_cold_questions_pay_for_the_picture_and_second_ones_do_not(series):
    for question in series["plan"].cold:
        assert {"vision", "stage0", "select0", "stage1", "stage2"} == set(question.graphs)
    for question in series["plan"].again:
        assert "vision" not in question.graphs


def test_the_watched_calls_are_those_that_the_work_model_expects(bundles, series):
    manifest = bundles["pruned"].manifest
    cold, again, step = series["plan"].calls()
    text = again[0].rows
    shape = {
        "prefix": len(manifest.prefix.ids) if manifest.prefix else 0,
        "visual": manifest.config.visual_tokens,
        "slots": lambda stage, held: -(-held // 128) * 128,
    }
    assert again == question_calls(manifest.plan, text=text, cached=True, **shape)
    first = [call.rows for call in cold if call.graph == "stage0"][-1]
    known = question_calls(manifest.plan, text=first, **shape)
    assert sorted(map(str, cold)) == sorted(map(str, known))
    assert step == token_calls(manifest.plan, text=first + QUICK.tokens - 2, **shape)
    for question in series["plan"].cold:
        assert len(question.prefill) == len(cold)


def test_bundles_take_turns_in_alternating_order(bundles, monkeypatch):
    from visistage.tools.profile import timing as module

    asked = []
    monkeypatch.setattr(
        module, "time_questions", lambda session, *rest: (asked.append(session), session)[:2]
    )
    with Session(bundles["pruned"]) as one, Session(bundles["dense"]) as two:
        measure_bundles({"a": one, "b": two}, Settings(2, 1, 5))
        assert asked == [two, one, one, two, two, one]


def test_a_model_that_ends_every_answer_at_once_is_timed_all_the_same(bundles):
    with Session(bundles["pruned"]) as session:
        session.eos = ends = frozenset(range(bundles["pruned"].manifest.config.text.vocab))
        for answer in time_questions(session, next(prompts()), 5):
            assert answer.later == 4
        assert session.eos == ends  # the model's own end is back


def test_a_watched_executor_is_left_as_it_was(bundles):
    with Session(bundles["pruned"]) as session:
        with timed_calls(session.executor) as events:
            session.executor.encode(np.zeros((1, 3, 32, 32), np.float32))
        assert [event.call for event in events] == [GraphCall("vision", 0, 0)]
        assert events[0].stop > events[0].start
        session.executor.encode(np.zeros((1, 3, 32, 32), np.float32))
        assert len(events) == 1


def test_operators_are_noted_by_layer_and_kind(bundles):
    times = operator_times(bundles["pruned"], tokens=4, threads=1)
    for phase, graphs in (
        ("prefill", {"vision", "stage0", "select0", "stage1", "stage2"}),
        ("decode", {"stage0", "stage1", "stage2"}),
    ):
        assert set(times[phase]["kinds"]) == set(times[phase]["layers"]) == graphs
        for graph in graphs:
            assert sum(times[phase]["kinds"][graph].values()) > 0
    layers = [key for stage in range(3) for key in times["decode"]["layers"][f"stage{stage}"]]
    assert [key for key in layers if key != OTHER] == ["0", "1", "2", "3"]
    assert "Attention" in times["prefill"]["kinds"]["stage1"]
    assert list(times["decode"]["layers"]["stage2"])[-1] == OTHER


def test_nodes_are_named_after_the_layer_whose_weights_they_read():
    def node(name, *inputs):
        return onnx_ir.Node("", "Add", list(inputs), name=name)

    def weight(name):
        return onnx_ir.Value(name=name, const_value=onnx_ir.tensor([1.0], name=name))

    x = onnx_ir.Value(name="x")
    head, first, second = (
        weight(n) for n in ("norm.weight", "model.layers.3.q.weight", "model.layers.4.q.weight")
    )
    nodes = [node("mask", x, x), node("a", x, first), node("b", x, x), node("c", x, second)]
    nodes.append(node("d", x, head))
    graph = onnx_ir.Graph([x], [], nodes=nodes, initializers=[head, first, second])
    assert prefix_node_names(onnx_ir.Model(graph, ir_version=10)) == 3
    assert [n.name for n in graph] == ["mask", "layers.3/a", "layers.3/b", "layers.4/c", "d"]


def test_only_counts_that_fit_are_swept(bundles):
    plan = bundles["pruned"].manifest.plan
    assert counts_of(plan, 16, 2048, 20, parts=True) == [4, 8, 12, 16, 32, 64]
    assert counts_of(plan, 16, 2048, 20, parts=False) == [16, 32, 64]
    assert counts_of(plan, 16, 60, 20, parts=True) == [4, 8, 12, 16, 32]


# --- peaks and the roofline -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", FILES)
def test_the_products_are_what_their_source_makes(precision):
    kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[precision]
    shapes = {"a": ["M", "K"], "b": ["K", "N"], "c": ["M", "N"]}
    values = {n: helper.make_tensor_value_info(n, kind, shape) for n, shape in shapes.items()}
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "product", [values["a"], values["b"]], [values["c"]])
    opset = [helper.make_opsetid("", 20)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=9, producer_name="visistage")
    file = Path(roofline.__file__).with_name(FILES[precision])
    assert onnx.load(file) == made


def test_peaks_are_measured_within_reason():
    peaks = measure_peaks(threads=1, read_bytes=1)
    assert peaks.nbytes == 4 << 20
    assert 1e9 < peaks.flops < 1e14
    assert 1e8 < peaks.bandwidth < 1e13


def test_a_lower_bound_is_the_slower_of_computing_and_reading():
    peaks = Peaks(flops=1e9, bandwidth=1e8, precision="fp32", threads=1, nbytes=1)
    assert peaks.lower_bound_ms(Work(2e6, 1e4)) == pytest.approx(2.0)
    assert peaks.bound(Work(2e6, 1e4)) == "compute"
    assert peaks.lower_bound_ms(Work(2e6, 4e5, 1e5)) == pytest.approx(5.0)
    assert peaks.bound(Work(2e6, 4e5, 1e5)) == "memory"


def test_parts_sum_the_lower_bounds_of_their_calls(bundles):
    manifest = bundles["pruned"].manifest
    peaks = Peaks(1e9, 1e9, "fp32", 1, 1)
    calls = [GraphCall("stage0", 8, 128), GraphCall("stage0", 1, 128), GraphCall("stage1", 1, 128)]
    stage0, stage1 = parts_of(manifest, calls, {"stage0": 4.0, "stage1": 0.0}, peaks)
    alone = [parts_of(manifest, [call], {}, peaks)[0]["floor_ms"] for call in calls]
    assert stage0["floor_ms"] == pytest.approx(alone[0] + alone[1])
    assert stage0["share"] == pytest.approx(stage0["floor_ms"] / 4.0)
    assert (stage0["calls"], stage1["calls"], stage1["share"]) == (2, 1, 0.0)


# --- power and machine ----------------------------------------------------------------------------

TEGRASTATS = {
    "RAM 3347/7467MB (lfb 896x4MB) SWAP 0/3733MB (cached 0MB) CPU [21%@1190,19%@1190] EMC_FREQ "
    "13%@2133 GR3D_FREQ 61% APE 150 MTS fg 0% bg 0% VDD_IN 5336/4970 VDD_CPU_GPU_CV 2617/2336 "
    "VDD_SOC 1478/1318": (
        {"VDD_IN": 5336, "VDD_CPU_GPU_CV": 2617, "VDD_SOC": 1478},
        5336,
        3347 << 20,
    ),
    "11-14-2024 12:34:56 RAM 3162/30536MB (lfb 6x4MB) SWAP 0/15268MB (cached 0MB) CPU [1%@729,off] "
    "GR3D_FREQ 0%@[305] cpu@47.968C VDD_GPU_SOC 3175mW/3100mW VDD_CPU_CV 800mW/900mW VIN_SYS_5V0 "
    "2500mW/2400mW NC 0mW/0mW VDDQ_VDD2_1V8AO 600mW/600mW": (
        {"VDD_GPU_SOC": 3175, "VDD_CPU_CV": 800, "VIN_SYS_5V0": 2500, "VDDQ_VDD2_1V8AO": 600},
        6475,
        3162 << 20,
    ),
    "thermal@41.7C VDD_IN 5765mW VDD_CPU_GPU_CV 1548mW VDD_SOC 1497mW": (
        {"VDD_IN": 5765, "VDD_CPU_GPU_CV": 1548, "VDD_SOC": 1497},
        5765,
        None,
    ),
    "RAM 2100/3964MB POM_5V_IN 4000/3900 POM_5V_GPU 900/850": (
        {"POM_5V_IN": 4000, "POM_5V_GPU": 900},
        4000,
        2100 << 20,
    ),
    "nothing to see": ({}, 0, None),
}


@pytest.mark.parametrize("line", TEGRASTATS)
def test_rails_of_any_board_are_read_off_tegrastats(line):
    rails, total, ram = TEGRASTATS[line]
    sample = parse_tegrastats(line)
    assert sample.rails == rails
    assert sample.total_mw == total
    assert sample.memory_bytes == ram


def test_tegrastats_is_read_as_a_process_and_ended():
    line = next(iter(TEGRASTATS))
    source = Tegrastats([sys.executable, "-uc", f"for _ in range(2): print({line!r})"])
    assert source.read().total_mw == source.read().total_mw == 5336
    with pytest.raises(EOFError):
        source.read()
    source.close()
    assert source.process.returncode is not None


def test_sensors_in_sysfs_are_multiplied(tmp_path):
    chip = tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    chip.mkdir(parents=True)
    for channel, rail, millivolts, milliamperes in (
        (1, "VDD_IN", 5000, 1200),
        (2, "VDD_SOC", 5008, 250),
        (3, "NC", 5000, 1),
        (7, "Sum of shunt voltages", 1, 1),
    ):
        (chip / f"in{channel}_label").write_text(rail + "\n")
        (chip / f"in{channel}_input").write_text(f"{millivolts}\n")
        (chip / f"curr{channel}_input").write_text(f"{milliamperes}\n")
    sample = Ina3221(tmp_path).read()
    assert sample.rails == {"VDD_IN": 6000.0, "VDD_SOC": 1252.0}
    assert sample.total_mw == 6000.0
    assert Meter.find(tmp_path).source.name == "ina3221"


def test_jetson_stats_and_nvml_hand_out_what_they_know():
    power = {"rail": {"VDD_GPU": {"power": 900}, "NC": {"power": 1}}, "tot": {"power": 4200}}
    assert parse_jtop(power) == PowerSample({"VDD_GPU": 900.0, "VIN": 4200.0})
    assert parse_jtop({"rail": {"VDD_IN": {"power": 7}}, "tot": {"power": 9}}).total_mw == 7

    class Service:
        def __init__(self):
            self.power, self.closed = power, False

        def start(self):
            pass

        def ok(self):
            return True

        def close(self):
            self.closed = True

    stats = JetsonStats(Service)
    assert stats.read().total_mw == 4200.0
    stats.close()
    assert stats.jtop.closed

    class Driver:
        NVMLError = RuntimeError
        tells = True

        def nvmlInit(self):
            pass

        def nvmlDeviceGetHandleByIndex(self, index):
            return f"card {index}"

        def nvmlDeviceGetMemoryInfo(self, handle):
            return type("Memory", (), {"used": 5 << 30})

        def nvmlDeviceGetPowerUsage(self, handle):
            if not self.tells:
                raise RuntimeError("not supported")
            return 71_000

    card = Nvml(Driver())
    assert card.read() == PowerSample({"GPU": 71_000.0}, 5 << 30)
    card.nvml.tells = False
    assert card.read() == PowerSample({}, 5 << 30)


def test_energy_is_the_area_under_the_power():
    samples = [(0.0, 1000.0), (1.0, 3000.0), (2.0, 3000.0), (3.0, 0.0)]
    assert energy(samples, 0.0, 3.0) == pytest.approx(2.0 + 3.0 + 1.5)
    assert energy(samples, 0.5, 1.5) == pytest.approx(0.5 * 2.5 + 0.5 * 3.0)
    assert energy(samples, -0.1, 1.0) is None
    assert energy(samples, 2.0, 3.1) is None
    assert energy([], 0.0, 1.0) is None


def test_a_meter_samples_beside_the_work_and_knows_what_is_too_short():
    class Source:
        name = "stand-in"

        def read(self):
            return PowerSample({"VDD_IN": 2000.0}, 100)

    with Meter(Source(), interval=0.01) as meter:
        start = time.perf_counter()
        time.sleep(0.2)
        stop = time.perf_counter()
        time.sleep(0.05)
    assert meter.joules(start + 0.02, stop) == pytest.approx(2.0 * (stop - start - 0.02), rel=0.01)
    assert meter.joules(start, start + 0.02) is None
    assert meter.rails_mw() == {"VDD_IN": 2000.0}
    assert meter.peak_memory_bytes() == 100


def test_a_machine_without_sensors_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    meter = Meter.find(tmp_path)
    assert meter.source is None
    for word in ("tegrastats", "ina3221", "jetson-stats", "nvidia-ml-py"):
        assert word in meter.reason


def test_clocks_governors_and_power_modes_are_noted(tmp_path):
    policy = tmp_path / "sys/devices/system/cpu/cpufreq/policy0"
    gpu = tmp_path / "sys/class/devfreq/17000000.gpu"
    for folder in (policy, gpu):
        folder.mkdir(parents=True)
    (policy / "scaling_governor").write_text("schedutil\n")
    (policy / "scaling_cur_freq").write_text("1190400\n")
    (gpu / "governor").write_text("nvhost_podgov\n")
    (gpu / "cur_freq").write_text("918000000\n")
    assert clocks(tmp_path) == {
        "cpu.policy0": {"governor": "schedutil", "now_mhz": 1190.4},
        "devfreq.17000000.gpu": {"governor": "nvhost_podgov", "now_mhz": 918.0},
    }
    assert clock_words(clocks(tmp_path) | {"cpu.policy4": {"now_mhz": 2265.6}}) == [
        "cpu 1190 to 2266 MHz (schedutil)",
        "devfreq 918 MHz (nvhost_podgov)",
    ]
    assert parse_power_mode("NV Power Mode: MAXN_SUPER\n2\n") == "MAXN_SUPER"
    assert parse_power_mode("command not understood") is None
    model = tmp_path / "proc/device-tree/model"
    model.parent.mkdir(parents=True)
    model.write_text("NVIDIA Jetson AGX Orin Developer Kit\0")
    assert machine_facts(tmp_path)["board"] == "NVIDIA Jetson AGX Orin Developer Kit"
    assert "clocks" not in machine_facts(tmp_path / "none")


# --- the whole command ----------------------------------------------------------------------------


def test_dense_stands_beside_the_plan_by_itself(facts, bundles):
    assert set(facts["runs"]) == {"plan", "against"}
    assert facts["runs"]["against"]["plan"] == "dense"
    assert facts["how_to_compare"] is None
    up = facts["speed_up"]
    plan, dense = facts["runs"]["plan"], facts["runs"]["against"]
    assert up["per_token"] == pytest.approx(
        dense["cold"]["per_token"]["median"] / plan["cold"]["per_token"]["median"]
    )
    assert up["prefill_share"] == pytest.approx(up["prefill"] / up["prefill_promised"])
    assert up["prefill_promised"] > 1
    assert [p["visual_tokens"] for p in plan["sweep"]] == [4, 8, 12, 16, 32, 64]
    assert plan["memory"]["peak_bytes"] >= plan["memory"]["loaded_bytes"] > 10 << 20


def test_a_roofline_that_is_beaten_is_called_wrong(facts):
    found = json.loads(json.dumps(facts["runs"]))
    for part in (p for run in found.values() for phase in run["roofline"].values() for p in phase):
        part["share"] = 0.9
    assert above_roofline(found) == []
    found["against"]["roofline"]["token"][0]["share"] = 1.4
    assert above_roofline(found) == ["stage0"]
    found["plan"]["roofline"] = None  # another precision than the peaks'
    assert above_roofline(found) == ["stage0"]
    shown = render_profile({**facts, "beaten": ["stage0"]})
    assert "stage0 beat it" in shown


def test_what_takes_most_is_named(facts):
    top, cold = facts["dominant"], facts["runs"]["plan"]["cold"]
    before = [n for n in cold if list(cold).index(n) < list(cold).index("first_token")]
    assert top["ms"] == max(cold[name]["median"] for name in before)
    assert cold[top["part"]]["median"] == top["ms"]


class Strict(HTMLParser):
    """Collects addresses and scripts."""

    def __init__(self):
        super().__init__()
        self.foreign, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                self.foreign.append(value)


def test_the_page_needs_nothing_else(facts):
    html = render_profile(facts)
    page = Strict()
    page.feed(html)
    assert not page.foreign
    assert "script" not in page.tags
    assert not re.search(r"https?://(?!www\.w3\.org)", html)
    plan = facts["runs"]["plan"]
    assert f'<p class="headline">{plan["cold"]["first_token"]["median"]:.1f} ms' in html
    assert html.count('class="track"') == 2
    assert html.count("<svg") == 3


def test_the_page_escapes_what_it_is_given(facts):
    nasty = json.loads(json.dumps(facts).replace('"toy"', '"<script>alert(1)</script>"'))
    assert "<script>" not in render_profile(nasty)


def test_the_page_lives_without_its_optional_parts(facts):
    bare = json.loads(json.dumps(facts))
    del bare["runs"]["against"]
    run = bare["runs"]["plan"]
    run |= {"operators": None, "roofline": None, "sweep": []}
    bare |= {"speed_up": None, "peaks": None, "no_peaks": "no product of precision int8"}
    bare |= {"how_to_compare": "visistage build --plan dense", "commands": []}
    html = render_profile(bare)
    assert "no product of precision int8" in html
    assert "visistage build --plan dense" in html


def test_the_page_compares_two_bundles_without_a_roofline(facts):
    """As of integers: there is a speed-up, and none that a roofline promises."""
    bare = json.loads(json.dumps(facts))
    for run in bare["runs"].values():
        run["roofline"] = None
    bare |= {"speed_up": speed_up(*bare["runs"].values()), "peaks": None, "no_peaks": "none"}
    html = render_profile(bare)
    assert "second question" in html
    assert "of the promised speed-up" not in html
    assert "of the promised speed-up" in render_profile(facts)


def test_a_browser_shows_the_page_without_complaints(facts, browser, tmp_path):
    file = tmp_path / "profile.html"
    file.write_text(render_profile(facts), encoding="utf-8")
    shown, complaints = browser(file.as_uri(), "--dump-dom")
    assert "How near to the roofline" in shown
    assert not complaints


@pytest.mark.parametrize("most", [0.3, 7.0, 49.0, 61.0, 12345.0])
def test_axes_have_round_ticks_within_their_range(most):
    step = round_step(most)
    assert 2 < most / step <= 6
    assert all(0 <= progress["left"] <= 100 for progress in ticks(most))


def run(*arguments):
    return CliRunner().invoke(main, ["profile", *map(str, arguments)])


def test_the_command_prints_tables_and_commands(folder, bundles, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = ("--repetitions", 2, "--warm-up", 0, "--tokens", 3, "--threads", 1, "--no-operators")
    done = run(bundles["pruned"].path, *flags)
    assert done.exit_code == 0, done.output
    for word in (
        "first token",
        "each later token",
        "of the roofline",
        "no energy",
        "the page, and the commands of Polygraphy for each graph: profile.html",
    ):
        assert word in done.stdout
    assert "polygraphy run" not in done.stdout  # a screen of each graph's shapes
    assert "polygraphy run" in (tmp_path / "profile.html").read_text()
    done = run(bundles["dense"].path, *flags, "--json")
    found = json.loads(done.stdout)
    assert found["page"] == "profile.html"
    assert set(found["runs"]) == {"plan"}
    assert found["how_to_compare"] is None


def test_what_cannot_be_compared_is_refused(folder, bundles, tmp_path):
    with pytest.raises(BundleError, match="is the bundle that is profiled"):
        baseline_bundle(bundles["pruned"], bundles["pruned"].path)
    own = bundles["dense"].manifest
    config = replace(own.config, text=replace(own.config.text, rms_eps=0.1))
    (tmp_path / "manifest.json").write_text(replace(own, config=config).to_json())
    with pytest.raises(BundleError, match="another model"):
        baseline_bundle(bundles["pruned"], tmp_path)


def test_wrong_settings_name_the_option(bundles):
    with pytest.raises(PromptError, match="--tokens is 1"):
        profile(bundles["pruned"].path, settings=Settings(tokens=1))
    with pytest.raises(PromptError, match="--repetitions is 0"):
        profile(bundles["pruned"].path, settings=Settings(repetitions=0))


def test_a_page_that_cannot_be_written_is_one_message(bundles, tmp_path):
    done = run(
        *(bundles["dense"].path, "--repetitions", 1, "--warm-up", 0, "--tokens", 2),
        *("--no-operators", "--out", tmp_path / "nowhere" / "p.html"),
    )
    assert done.exit_code == 2
    assert "--out profile.html" in done.stderr


def test_a_peak_is_that_of_the_child_alone(bundles):
    found = memory.footprint(bundles["dense"].path, tokens=2)
    assert found.loaded_bytes <= found.peak_bytes < peak_memory()  # this process has torch


def test_a_child_that_dies_says_why(bundles):
    with pytest.raises(CapacityError, match="unknown back end 'none'"):
        memory.footprint(bundles["dense"].path, tokens=2, backend="none")


# --- answers --------------------------------------------------------------------------------------

ONE_KEPT, ALL_KEPT = "visipruner:shallow=0,t=0,e=1,keep=1", "fastv:k=1,r=0"
BRIEF = Settings(repetitions=1, warm_up=0, tokens=6)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Bundles of one checkpoint: the unpruned model's, one of a plan that takes nearly all that
    is seen, and one that selects all tokens."""
    folder = tmp_path_factory.mktemp("answers")
    checkpoint = toy.make_checkpoint(folder / "toy", scale=2.0)
    plans = {"dense": "dense", "one": ONE_KEPT, "all": ALL_KEPT}
    return {
        name: make_bundle(str(checkpoint), plan=plan, out=folder / "engines").path
        for name, plan in plans.items()
    }


def test_changed_answers_are_the_headline_everywhere(answered, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("visistage.tools.profile.profile.busy_machine", lambda: "Busy.")
    flags = ("--repetitions", 1, "--warm-up", 0, "--tokens", 6, "--no-operators")
    done = run(answered["one"], *flags)
    assert done.exit_code == 0, done.output
    headline = re.match(r"Pruning changed ([1-4]) of 4 answers\. The first, to '", done.stdout)
    assert headline, done.stdout
    assert "gives the same" not in done.stdout

    found = json.loads(run(answered["one"], *flags, "--json").stdout)
    assert found["findings"][0].startswith(headline[0])
    assert "Busy." in found["findings"]  # times may mean nothing then, answers do
    answers = found["answers"]
    assert (answers["dense"], answers["asked"]) == ("dense-fp32-cpu", 4)
    changed = [asked for asked in answers["questions"] if not asked["same"]]
    assert answers["changed"] == len(changed) == int(headline[1])
    for name in ("plan", "dense"):
        bundle = Bundle.open(answered["one" if name == "plan" else "dense"])
        with Session(bundle) as session:
            said = session.infer(
                IMAGES_FOLDER / changed[0]["image"], changed[0]["question"], max_tokens=MAX_TOKENS
            )
        assert changed[0][name] == answer_words(said)

    html = (tmp_path / "profile.html").read_text(encoding="utf-8")
    assert html.index("Pruning changed") < html.index("to the first token of a new image")
    assert html.count('<th scope="row">scene-') == len(changed)


def test_equal_answers_are_no_headline(answered):
    facts = profile(answered["all"], settings=BRIEF, operators=False)
    assert facts["answers"]["asked"] == 4
    assert facts["answers"]["changed"] == 0
    assert not [finding for finding in facts["findings"] if "answer" in finding]
    assert "dense-fp32-cpu gives the same 4 answers about images" in closing_lines(facts)
    html = render_profile(facts)
    assert "gives the same 4 answers" in html
    assert "Changed answers" not in html


def test_answers_are_compared_with_the_unpruned_model_whatever_times_are(answered, tmp_path):
    """``--against`` another plan: its answers may be as wrong."""
    facts = profile(answered["one"], against=answered["all"], settings=BRIEF, operators=False)
    assert facts["findings"][0].startswith("Pruning changed")
    assert facts["answers"]["dense"] == "dense-fp32-cpu"
    assert facts["runs"]["against"]["name"] == answered["all"].name

    alone = shutil.copytree(answered["one"], tmp_path / "one")
    facts = profile(alone, against=answered["all"], settings=BRIEF, operators=False)
    assert facts["answers"] is None
    assert any("not known whether pruning changes" in line for line in closing_lines(facts))
    assert "Not known whether pruning changes answers" in render_profile(facts)
    facts = profile(alone, against=answered["dense"], settings=BRIEF, operators=False)
    assert facts["answers"]["changed"]
    assert facts["dense_hint"] is None


def test_the_demo_is_asked_its_own_questions():
    asked = image_questions("demo")
    assert len(asked) == len(set(asked)) == sum(len(image.questions) for image in bundled())
    general = image_questions("llava-7b")
    assert [image for image, _ in general] == [image.path for image in bundled()]


# --- stock commands -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def portable(bundles):
    """The bundle as it would be for engines that nobody has compiled, as far as commands read."""
    built = bundles["pruned"]
    own, fixed = built.manifest, {}
    for name, fact in own.graphs.items():
        context = 256 if fact.spec.has("S") else ANY_CONTEXT
        fixed[name] = replace(fact, variants={context: f"{name}.fixed.onnx"})

    def bundle(target, graphs):
        facts = {"target": target, "contexts": (256,), "graphs": graphs}
        return replace(built, manifest=replace(own, **facts))

    return {
        "rtx": bundle("rtx", fixed),
        "orin-jp62": bundle("orin-jp62", own.graphs),
        "orin-jp72": bundle("orin-jp72", fixed),
    }


def generated(bundle: Bundle, command) -> str:
    """The script that Polygraphy makes of a command, instead of running it."""
    arguments = [*command.arguments, "--gen-script", "-"]
    arguments[0] = str(Path(sys.executable).with_name("polygraphy"))
    done = subprocess.run(arguments, cwd=bundle.path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_polygraphy_takes_the_command_of_every_engine(portable, target):
    bundle = portable[target]
    made = stock.polygraphy_runs(bundle)
    stages = [one for one in made if one.about.startswith("stage")]
    assert len(stages) == 2 * 3  # decoding and prefill
    assert len(made) == len(stages) + 2  # and the vision encoder and the selection
    for command in made:
        script = generated(bundle, command)
        assert "TrtRunner" in script
        assert "strongly_typed=True" in script
        assert (command.environment != "") == (target == "rtx")
        if command in stages:
            which = int(command.about.split(", ")[1].split()[0]) > 8
            assert f"optimization_profile={int(which)}" in script
            assert script.count("Profile()") == 2
    assert shlex.split(made[0].text)[0 if target != "rtx" else 1] == "polygraphy"


def test_polygraphy_takes_the_command_of_every_graph(bundles, series):
    bundle = bundles["pruned"]
    cold, _, step = series["plan"].calls()
    made = stock.polygraphy_runs(bundle, [*cold, *step])
    assert len(made) == len(set([*cold, *step]))
    for command in made:
        assert "OnnxrtRunner" in generated(bundle, command)


def test_polygraphy_runs_every_graph_of_this_cpu(facts, bundles, series):
    """In its own runner, on the right graphs: feeds fit them, and outputs have their shapes."""
    found = facts["polygraphy"]
    assert found["reason"] is None
    assert found["runner"] == "OnnxrtRunner"
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["version"])
    cold, _, step = series["plan"].calls()
    shapes = [(call.graph, call.rows, call.slots) for call in dict.fromkeys([*cold, *step])]
    assert [(run["graph"], run["rows"], run["slots"]) for run in found["runs"]] == shapes
    for run in found["runs"]:
        assert run["n"] == QUICK.repetitions
        assert 0 < run["least"] <= run["median"] <= run["p99"]
        assert run["own_ms"] > 0


def test_polygraphys_runner_gets_each_graph_and_what_it_takes(bundles):
    from polygraphy.backend.onnxrt import OnnxrtRunner

    bundle, asked = bundles["pruned"], []

    class Noting:
        def __init__(self, session):
            self.session = session

        def __getattr__(self, name):
            return getattr(self.session, name)

        def run(self, names, feeds):
            outputs = self.session.run(names, feeds)
            asked.append((self.session, feeds, outputs))
            return outputs

    call_ms = {GraphCall("stage1", 9, 128): 1.0, GraphCall("select0", 0, 128): 2.0}
    with Session(bundle, threads=1) as session:
        sessions = dict(session.executor.sessions)
        noting = {name: Noting(one) for name, one in sessions.items()}
        facts = stock.polygraphy_facts(bundle, "onnxruntime", call_ms, noting, 2)
    assert facts["runner"] == OnnxrtRunner.__name__
    assert [(run["graph"], run["n"], run["own_ms"]) for run in facts["runs"]] == [
        ("stage1", 2, 1.0),
        ("select0", 2, 2.0),
    ]
    assert [used for used, *_ in asked] == [sessions["stage1"]] * 3 + [sessions["select0"]] * 3
    for name, (_, feeds, outputs) in zip(("stage1", "select0"), asked[::3], strict=True):
        spec = bundle.manifest.graphs[name].spec
        sizes = {"B": 1, "Q": 9, "S": 128, "N": 16}
        for tensor, array in zip(
            (*spec.inputs, *spec.outputs), (*feeds.values(), *outputs), strict=True
        ):
            assert array.dtype == tensor.dtype
            assert array.shape == tuple(sizes.get(d, d) for d in tensor.shape), tensor.name
        assert all(np.isfinite(array).all() for array in outputs)


def test_without_polygraphy_or_its_runner_one_line_says_so(bundles, facts, monkeypatch):
    def times(backend):
        return stock.polygraphy_facts(bundles["pruned"], backend, {}, {}, 1)

    assert times("openvino")["reason"] == "Polygraphy has no runner for openvino"
    with monkeypatch.context() as patched:
        patched.setattr(stock.util, "find_spec", lambda name: None)
        missing = times("onnxruntime")
    assert missing["runs"] == []
    assert "pip install -e '.[compile]'" in missing["reason"]
    assert any(
        missing["reason"] in line for line in closing_lines({**facts, "polygraphy": missing})
    )
    assert "polygraphy is not installed" in render_profile({**facts, "polygraphy": missing})


def test_engines_run_in_polygraphys_tensorrt_runner(portable, monkeypatch):
    """Through a stand-in of the runner, for want of a GPU: each engine, in each profile."""
    from polygraphy.backend import trt

    loaded = []

    class Runner:
        def __init__(self, engine, optimization_profile):
            self.engine, self.profile = engine, optimization_profile

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def infer(self, feeds):
            loaded.append((self.engine.args[0].args[0], self.profile, feeds))

        def last_inference_time(self):
            return 0.002

    class Load:
        def __init__(self, *args):
            self.args = args

    monkeypatch.setattr(trt, "TrtRunner", Runner)
    monkeypatch.setattr(trt, "EngineFromBytes", Load)
    monkeypatch.setattr("polygraphy.backend.common.BytesFromPath", Load)
    bundle = portable["rtx"]
    facts = stock.polygraphy_facts(bundle, "tensorrt_rtx", {}, {}, 2)
    assert (facts["reason"], facts["runner"]) == (None, "TrtRunner")
    runs = stock.polygraphy_runs(bundle)
    assert [run["graph"] for run in facts["runs"]] == [run.call.graph for run in runs]
    assert all(run["median"] == 2.0 for run in facts["runs"])
    assert [(Path(file).name, profile) for file, profile, _ in loaded[::3]] == [
        (run.file, run.profile) for run in runs
    ]
    for run, (_, _, feeds) in zip(runs, loaded[::3], strict=True):
        assert {name: feed.shape for name, feed in feeds.items()} == run.shapes


def test_an_engine_that_polygraphy_cannot_run_is_no_end_of_the_profile(portable):
    facts = stock.polygraphy_facts(portable["rtx"], "tensorrt_rtx", {}, {}, 2)
    assert facts["runs"] == []
    assert facts["reason"].startswith("TrtRunner failed with vision")


def test_integers_of_a_command_stay_inside_the_cache(bundles):
    (command,) = stock.polygraphy_runs(bundles["pruned"], [GraphCall("select0", 0, 128)])
    assert "visual_slots:[0,127]" in command.arguments
    assert "slot_order:[0,0]" in command.arguments
    assert "query_order:[128,128]" in command.arguments


def test_images_of_prompts_are_real_images():
    import io

    with Image.open(io.BytesIO(next(prompts()).image)) as image:
        assert image.format == "JPEG"
        assert image.size == (640, 480)
