"""The device runtime on NumPy: addresses, lifetimes, order of work, profiles, captures, growth.

A ``HostDevice`` does its work late and forgets what was freed; engines are graphs that ONNX Runtime
runs at the addresses they are given (``stand_ins``). Whole prompts must give the tokens that the
ONNX Runtime back end gives.
"""

import gc
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from visistage.compile.build import make_bundle
from visistage.compile.export.static_shapes import compiler_peak
from visistage.graphs.bundle import Bundle
from visistage.graphs.engine_index import Engines
from visistage.graphs.errors import (
    BundleError,
    CapacityError,
    EngineError,
    MissingDependencyError,
    TargetError,
    VisistageError,
)
from visistage.graphs.parts import PROBE
from visistage.runtime import autotune
from visistage.runtime.device import engine_trt
from visistage.runtime.device.calls import ASK_AGAIN, Replay
from visistage.runtime.device.memory import (
    PINNED_BLOCK,
    PINNED_BLOCKS,
    DeviceArray,
    Layers,
    Memory,
    Place,
)
from visistage.runtime.device.protocol import CaptureError, Compiled
from visistage.runtime.device.stage import DeviceStage
from visistage.runtime.hardware import GpuInfo
from visistage.runtime.prompt_parts import visual_rows
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.numpy_device import HostDevice
from visistage.tests.support.stand_ins import stand_in, write_engines
from visistage.tools.verify import runtime_checks
from visistage.tools.verify.runtime_checks import compare_engines
from visistage.tools.verify.verify_target import VerifyTarget

pytest.importorskip("onnxruntime")

QUESTION = "What is in the picture?"
PLANS = {
    "pruned": ("visipruner:shallow=1,t=1,e=2,keep=4", {"contexts": (128, 256)}),
    "dense": ("dense", {"contexts": (128,)}),
    "adaptive": (
        "visipruner-adaptive:boundaries=1-2,cosine=0.95,contribution=0.5,exit_cosine=0.9",
        {"contexts": (128,)},
    ),
    "parts": ("fastv:k=2,r=0.75", {"contexts": (128,), "build_memory": compiler_peak(120_000)}),
    "v2drop parts": (
        "v2drop:before=2,keep=4",
        {"contexts": (128, 256), "build_memory": compiler_peak(120_000)},
    ),
    "sparsevlm": ("sparsevlm", {"contexts": (128,)}),
    "v2drop portable": ("v2drop", {"target": "orin-jp62"}),
    "portable": ("visipruner:shallow=1,t=1,e=2,keep=4", {"target": "orin-jp62"}),
    "entered": ("scope:keep=6", {"contexts": (128,)}),
    "merged": ("visionzip:keep=7", {"contexts": (128,)}),
    "projected": ("fastv:k=2,r=0.5,entry=divprune-9", {"target": "orin-jp62"}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("toy"), kv_heads=2)


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    """Bundles with stand-ins for engines, each built once."""
    built = {}

    def get(name):
        if name not in built:
            plan, options = PLANS[name]
            options = {"target": "rtx", "contexts": (1024,), **options}
            out = tmp_path_factory.mktemp("engines")
            built[name] = write_engines(make_bundle(str(checkpoint), plan=plan, out=out, **options))
        return built[name]

    return get


@pytest.fixture
def machine(monkeypatch):
    return stand_in(monkeypatch)


@pytest.fixture
def copy(bundles, tmp_path):
    """The pruned bundle, to be spoilt."""
    return Bundle.open(shutil.copytree(bundles("pruned").path, tmp_path / "bundle"))


def ask(session, images, question=QUESTION, new=12):
    """Greedy tokens without an end: random checkpoints end whenever they like."""
    session.eos = frozenset()
    return session.infer(images, question, max_tokens=new).tokens


def on_cpu(bundle, *questions):
    """What ONNX Runtime answers, each question with nothing paid for."""
    answers = []
    for images, question, new in questions:
        with load(bundle.path, backend="onnxruntime", cache_bytes=0) as session:
            answers.append(ask(session, images, question, new))
    return answers


# --- the stand-in itself --------------------------------------------------------------------------


def test_work_is_done_when_somebody_waits_and_not_before():
    device = HostDevice()
    one, other = device.allocate(8), device.allocate(8)
    assert (one.array == 0xFF).all()
    device.zero(one.address, 8)
    device.copy(other.address, one.address, 8)
    event = device.record()
    assert (one.array == 0xFF).all()
    event.wait()
    assert (other.array == 0).all()
    assert device.log == ["zero", "copy", "record"]


def test_memory_is_freed_after_the_work_that_was_asked_for_before():
    device = HostDevice()
    one, other = device.allocate(8), device.allocate(8)
    device.zero(one.address, 8)
    device.copy(other.address, one.address, 8)
    address = one.address
    del one
    device.synchronize()
    assert (other.array == 0).all()
    device.synchronize()
    device.zero(address, 8)
    with pytest.raises(AssertionError, match="not in one living buffer"):
        device.synchronize()


def test_captured_work_is_kept_and_not_done():
    device = HostDevice()
    buffer = device.allocate(8)
    graph = device.capture(lambda: device.zero(buffer.address, 8))
    device.synchronize()
    assert (buffer.array == 0xFF).all()
    graph.launch()
    device.synchronize()
    assert (buffer.array == 0).all()


@pytest.mark.parametrize("work", ["synchronize", "allocate"])
def test_what_a_capture_forbids_is_refused(work):
    device = HostDevice()
    with pytest.raises(CaptureError, match=work):
        device.capture(lambda: device.allocate(1) if work == "allocate" else device.synchronize())
    device.synchronize()  # and the device goes on


# --- memory ---------------------------------------------------------------------------------------


def test_an_array_may_change_as_soon_as_it_was_uploaded():
    """More uploads than there are pinned blocks, nobody waiting in between."""
    memory = Memory(HostDevice())
    source = np.zeros(100, np.float32)
    there = [memory.empty((100,), np.float32) for _ in range(3 * PINNED_BLOCKS)]
    for number, array in enumerate(there):
        source[:] = number
        memory.write(array.address, source)
    for number, array in enumerate(there):
        assert (np.asarray(array) == number).all()


def test_what_is_larger_than_a_pinned_block_goes_in_pieces():
    memory = Memory(HostDevice())
    source = np.arange(PINNED_BLOCK, dtype=np.int32)  # four blocks
    array = memory.empty(source.shape, source.dtype)
    memory.write(array.address, source)
    assert np.array_equal(np.asarray(array), source)


def test_arrays_are_sliced_where_that_leaves_them_in_one_piece():
    memory = Memory(HostDevice())
    source = np.arange(24, dtype=np.int32).reshape(1, 6, 4)
    array = memory.empty(source.shape, source.dtype)
    memory.write(array.address, source)
    assert np.array_equal(np.asarray(array[:, 2:5]), source[:, 2:5])
    assert np.array_equal(np.asarray(array[:, -2:][:, 1:]), source[:, 5:])
    assert np.array_equal(np.asarray(array[0][-1]), source[0, -1])
    for index in [(slice(1), slice(1)), (slice(None), slice(0, 4, 2))]:
        with pytest.raises(IndexError, match="not one piece"):
            array[index]
    with pytest.raises(IndexError, match="out of"):
        array[1]


def test_what_is_still_held_is_moved_before_it_is_overwritten():
    device = HostDevice()
    memory = Memory(device)
    place = Place(memory, 16)
    memory.write(place.address, np.arange(4, dtype=np.int32))
    held = place.lend((1, 4), np.int32)
    part = held[:, 1:3]
    assert part.address == place.address + 4
    place.reclaim()
    memory.write(place.address, np.zeros(4, np.int32))
    assert part.address != place.address + 4
    assert np.asarray(part).tolist() == [[1, 2]]
    assert np.asarray(held).tolist() == [[0, 1, 2, 3]]


def test_what_nobody_holds_is_not_copied():
    device = HostDevice()
    place = Place(Memory(device), 16)
    place.lend((4,), np.int32)
    place.reclaim()
    device.synchronize()
    assert "copy" not in device.log


def test_layers_of_several_parts_are_indexed_as_one():
    memory = Memory(HostDevice())
    parts = []
    for first, count in ((0, 2), (2, 3)):
        array = memory.empty((count, 1), np.int32)
        memory.write(array.address, np.arange(first, first + count))
        memory.write(array.address, np.arange(first, first + count, dtype=np.int32))
        parts.append(array)
    layers = Layers(parts)
    assert [int(np.asarray(layers[i])[0]) for i in (0, 1, 2, 4, -1, -4)] == [0, 1, 2, 4, 4, 1]
    assert np.array(layers).ravel().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        layers[5]


def test_arrays_of_one_allocation_come_down_together():
    device = HostDevice()
    memory = Memory(device)
    wanted = [((2, 3), np.int32), ((5,), np.float32), ((1, 4), np.int64)]
    arrays = memory.pack([(shape, np.dtype(dtype)) for shape, dtype in wanted])
    values = [np.arange(np.prod(shape)).reshape(shape).astype(dtype) for shape, dtype in wanted]
    memory.upload(arrays, values)
    device.synchronize()
    device.log.clear()
    for some in (arrays, arrays[1:], arrays[::-1], arrays[:1]):
        device.log.clear()
        for array, found in zip(some, memory.download_all(some), strict=True):
            assert np.array_equal(found, values[arrays.index(array)])
            assert found.dtype == array.dtype
        assert device.log == ["copy", "record"]


# --- captures -------------------------------------------------------------------------------------


class Work:
    """An execution context that notes that it ran."""

    def __init__(self, device, *, capturable=True, fails=False):
        self.device, self.capturable, self.fails = device, capturable, fails
        self.ran = 0

    def enqueue(self):
        if self.fails and self.device.captured is not None:
            raise EngineError("no capture with me")
        self.device.submit("work", self._run)

    def _run(self):
        self.ran += 1


def test_a_call_runs_once_as_it_is_and_is_captured_when_it_comes_again():
    device = HostDevice()
    parts = [Work(device), Work(device)]
    replay = Replay(device, parts)
    for _ in range(4):
        replay.run()
    device.synchronize()
    assert device.log == ["work", "work", "launch", "launch", "launch"]
    assert [part.ran for part in parts] == [4, 4]


def test_what_failed_in_a_capture_runs_as_it_is_and_is_not_tried_again():
    device = HostDevice()
    work = Work(device, fails=True)
    replay = Replay(device, [work])
    for _ in range(3 * ASK_AGAIN):
        replay.run()
    device.synchronize()
    assert work.ran == 3 * ASK_AGAIN
    assert device.log == ["work"] * work.ran
    assert "capture" in replay.rejected


def test_an_engine_that_cannot_be_captured_yet_is_asked_again():
    """TensorRT-RTX refuses while it compiles kernels."""
    device = HostDevice()
    work = Work(device, capturable=False)
    replay = Replay(device, [work])
    for _ in range(3):
        replay.run()
    assert "cannot be captured" in replay.rejected
    work.capturable = True
    for _ in range(ASK_AGAIN - 1):
        replay.run()
    assert replay.graph is None
    replay.run()
    assert replay.graph is not None
    assert replay.rejected is None
    replay.run()
    device.synchronize()
    assert device.log == [*["work"] * (ASK_AGAIN + 2), "launch", "launch"]


def test_a_stage_is_padded_again_once_its_calls_are_captured(monkeypatch, bundles):
    machine = stand_in(monkeypatch, capturable=False)
    bundle = bundles("pruned")
    (expected,) = on_cpu(bundle, (picture(1), QUESTION, 24))
    with load(bundle.path) as session:
        stage = session.executor.engine_set.stages[0]
        assert ask(session, picture(1), new=3) == expected[:3]
        assert not stage.captures
        machine.api.capturable = True
        assert ask(session, picture(1), new=24) == expected
        assert stage.captures
        assert session.executor.padding(0, 5) == 3


# --- profiles -------------------------------------------------------------------------------------


def test_the_first_profile_that_fits_is_taken(bundles):
    bundle = bundles("pruned")
    engines = engine_trt.compiled_engines(bundle, Engines.open(bundle))
    stage = next(one for one in engines if one.graph == "stage1" and one.context == 128)
    slots = stage.slots

    def profile(rows, slots=slots):
        sizes = {"B": 1, "Q": rows, "S": slots}
        return stage.profile_for(
            {
                spec.name: tuple(sizes.get(dim, dim) for dim in spec.shape)
                for spec in stage.spec.inputs
            }
        )

    assert [profile(rows) for rows in (1, 8, 9, slots)] == [0, 0, 1, 1]
    assert profile(slots + 1) is None
    assert profile(1, slots + 64) is None
    assert Compiled("g", None, stage.file, stage.spec, 0, (), 0).profile_for({}) == 0


# --- whole prompts --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PLANS))
def test_engines_give_the_tokens_that_the_graphs_give(machine, bundles, name):
    bundle, one, two = bundles(name), picture(1), picture(2)
    assert name.endswith("parts") == any(".part1" in graph for graph in bundle.manifest.graphs)
    asked = [(one, QUESTION, 12), (None, "Hello", 6), ([two, one], "Which?", 6)]
    expected = on_cpu(bundle, *asked)
    with load(bundle.path) as session:
        found = [ask(session, *question) for question in asked]
        again = ask(session, one)
        assert session.executor.engine_set.stages[0].rejected is None
    assert found == expected
    assert again == expected[0]
    assert len(set(expected[0])) > 3  # lively, or anything would agree
    assert machine.api.closed


def test_a_picture_that_was_seen_before_is_copied_back(machine, bundles):
    bundle, one, two = bundles("pruned"), picture(1), picture(2)
    questions = [(one, QUESTION, 6), (two, "How many?", 6), (one, "And now, what is it?", 6)]
    expected = on_cpu(bundle, *questions)
    with load(bundle.path) as session:
        found = [ask(session, *question) for question in questions]
        visual = bundle.manifest.config.visual_tokens
        seen = [run for run in machine.api.runs if run[:2] == ("stage0", visual)]
    assert found == expected
    assert len(seen) == 2


def test_scores_are_those_of_the_graphs(machine, bundles):
    bundle = bundles("pruned")
    with load(bundle.path, backend="onnxruntime") as session:
        expected = session.score(picture(1), QUESTION, [5, 6, 7])
    with load(bundle.path) as session:
        found = session.score(picture(1), QUESTION, [5, 6, 7])
    assert found.dtype == np.float32
    spread = np.ptp(expected, axis=1).max()
    assert np.abs(found - expected).max() < 1e-2 * spread
    assert np.abs(found[0] - found[1]).max() > 0.1 * spread


def test_decoding_takes_its_profile_and_is_replayed(machine, bundles):
    with load(bundles("pruned").path) as session:
        ask(session, picture(1), new=8)
        steps = [run for run in machine.api.runs if run[0] == "stage1" and run[1] == 1]
        prefill = [run for run in machine.api.runs if run[0] == "stage1" and run[1] > 1]
        stages = session.executor.engine_set.stages
        assert all(stage.replays[1].graph is not None for stage in stages)
        launches = machine.device.log.count("launch")
    assert len(steps) == 7
    assert {profile for _, _, profile in steps} == {0}
    assert {profile for _, _, profile in prefill} == {1}
    assert launches == 3 * 6  # each stage's first step ran as it is


def test_a_decode_step_copies_no_rows_and_no_caches(machine, bundles):
    """Up: one block of numbers for each stage, and one row. Down: logits."""
    with load(bundles("pruned").path) as session:
        session.eos = frozenset()
        stream = session.stream(picture(1), QUESTION, max_tokens=8)
        for _ in range(4):
            next(stream)
        machine.device.synchronize()
        machine.device.log.clear()
        session.context.decode(5)
        log = [entry for entry in machine.device.log if entry not in ("record", "free")]
    stages = 3
    uploads, hops, downloads = stages + 1, stages - 1, 1
    assert log.count("copy") == uploads + hops + downloads
    assert log.count("launch") == stages
    assert len(log) == uploads + hops + downloads + stages


def test_a_selection_waits_once(machine, bundles, monkeypatch):
    """Its positions, orders and scores come down together: the wait in front of later stages."""
    waits, real = [], Memory.download_all
    with load(bundles("pruned").path) as session:
        ask(session, picture(1), new=2)

        def noted(self, arrays):
            waits.append(len(arrays))
            return real(self, arrays)

        monkeypatch.setattr(Memory, "download_all", noted)
        session.eos = frozenset()
        assert len(list(session.stream(picture(2), QUESTION, max_tokens=4))) > 0
        assert waits == [3, *[1] * 4]  # the selection, and the logits of every token


def test_questions_of_any_length_share_a_few_calls(machine, bundles):
    bundle = bundles("pruned")
    questions = [(picture(1), "What" + "?" * extra, 2) for extra in (1, 2, 3, 5)]
    expected = on_cpu(bundle, *questions)
    with load(bundle.path) as session:
        found = [ask(session, *question) for question in questions]
        visual = bundle.manifest.config.visual_tokens
        sizes = {run[1] for run in machine.api.runs if run[0].startswith("stage")}
        assert session.executor.engine_set.stages[0].replays[32].graph is not None
    assert found == expected
    assert sizes <= {1, 8, 32, 64, visual}


def test_only_so_many_calls_are_kept_ready(machine, bundles, monkeypatch):
    bundle = bundles("pruned")
    questions = [(picture(seed), QUESTION, 6) for seed in (1, 2)]
    expected = on_cpu(bundle, *questions)
    monkeypatch.setattr("visistage.runtime.device.stage.MOST_REPLAYS", 2)
    with load(bundle.path) as session:
        assert [ask(session, *question) for question in questions] == expected
        assert [len(stage.replays) for stage in session.executor.engine_set.stages] == [2, 2, 2]


def test_engines_that_cannot_be_captured_run_without_padding(monkeypatch, bundles):
    machine = stand_in(monkeypatch, capturable=False)
    bundle = bundles("pruned")
    (expected,) = on_cpu(bundle, (picture(1), QUESTION, 8))
    with load(bundle.path) as session:
        assert ask(session, picture(1), new=8) == expected
        before = len(machine.api.runs)
        assert ask(session, picture(1), new=8) == expected
        sizes = {run[1] for run in machine.api.runs[before:] if run[0] == "stage1"}
        assert "launch" not in machine.device.log
        assert "cannot be captured" in session.executor.engine_set.stages[1].rejected
    assert not sizes & {32, 64}


def test_what_is_padding_is_seen_by_nobody(machine, bundles, monkeypatch):
    """Rubbish in the rows of the padding changes nothing but the padding."""
    bundle = bundles("pruned")
    (expected,) = on_cpu(bundle, (picture(1), QUESTION, 8))

    def rubbish(to, nbytes):
        machine.device.submit("zero", lambda: machine.device.bytes(to, nbytes).fill(0x3C))

    with load(bundle.path) as session:
        ask(session, picture(2), new=2)
        monkeypatch.setattr(machine.device, "zero", rubbish)  # FP16 ones, from here on
        assert ask(session, picture(1), new=8) == expected


# --- contexts -------------------------------------------------------------------------------------


def test_the_smallest_engines_with_room_are_loaded_when_they_are_needed(machine, bundles):
    bundle = bundles("pruned")
    long = "word " * 20
    questions = [(picture(1), QUESTION, 6), (picture(1), long, 60), (picture(1), QUESTION, 6)]
    expected = on_cpu(bundle, *questions)
    with load(bundle.path) as session:
        first = ask(session, *questions[0])
        assert not any("context256" in file for file in machine.api.loaded)
        second = ask(session, *questions[1])
        assert session.executor.engine_set.context == 256
        third = ask(session, *questions[2])
        assert session.executor.engine_set.context == 128
        assert machine.api.loaded.count("stage0.context128.engine") == 1  # both stay
    assert [first, second, third] == expected


def test_engines_make_way_for_others_where_memory_is_short(monkeypatch, bundles):
    machine = stand_in(monkeypatch)
    bundle = bundles("pruned")
    with load(bundle.path) as session:
        ask(session, picture(1), new=4)
        monkeypatch.setattr(machine.device, "free_bytes", lambda: 0)
        ask(session, picture(1), "word " * 20, 60)
        assert list(session.executor.engine_sets.loaded) == [256]
        ask(session, picture(1), new=4)
        assert machine.api.loaded.count("stage0.context128.engine") == 2


def test_engines_are_loaded_into_memory_that_was_given_back(machine, bundles, monkeypatch):
    """TensorRT allocates for itself: what the device's pool keeps of another set is not there."""
    bundle = bundles("pruned")
    kept, real = [], machine.api.load

    def noted(compiled):
        kept.append((compiled.context, machine.device.kept))
        return real(compiled)

    monkeypatch.setattr(machine.api, "load", noted)
    with load(bundle.path) as session:
        ask(session, picture(1), new=4)
        monkeypatch.setattr(machine.device, "free_bytes", lambda: 0)
        machine.api.contexts.clear()
        ask(session, picture(1), "word " * 20, 60)
    assert {bytes_kept for context, bytes_kept in kept if context == 256} == {0}


def test_what_fits_no_engine_is_refused_with_what_would_fit(machine, bundles):
    with load(bundles("pruned").path) as session:
        with pytest.raises(CapacityError, match=r"128, 256 rows.*--context 3\d\d"):
            session.infer(picture(1), QUESTION, max_tokens=300)
        ask(session, picture(1), new=2)  # and goes on
        with pytest.raises(CapacityError, match="have room for"):
            session.executor.ensure_slots(0, 4096)


def test_a_prompt_without_a_picture_needs_its_room_in_every_stage(machine, bundles):
    """Later stages have fewer slots: they leave out visual rows that this prompt never had."""
    bundle = bundles("pruned")
    plan, visual = bundle.manifest.plan, bundle.manifest.config.visual_tokens
    assert visual_rows(plan, []) == [0, 0, 0]
    assert visual_rows(plan, [visual, visual]) == [2 * visual, 4, 0]
    with load(bundle.path) as session:
        session.eos = frozenset()
        assert len(ask(session, None, "word " * 20, 110)) == 110
        assert session.executor.engine_set.context == 256


# --- growth ---------------------------------------------------------------------------------------


def test_caches_grow_in_the_middle_of_an_answer(machine, bundles):
    """The portable lowering: open slots, new rows copied to theirs, nothing stale replayed."""
    bundle, new = bundles("portable"), 60
    with load(bundle.path) as session:
        stage = session.executor.engine_set.stages[0]
        opened = session.decode_image(picture(1))
        long = "a word "
        while session.context.orders_of(session.prompt_parts(long + "a word ", [opened])) <= 480:
            long += "a word "
        sizes = []
        session.eos = frozenset()
        stream = session.stream(picture(1), long, max_tokens=new)
        for _ in stream:
            sizes.append(stage.slots)
        assert stage.replays[1].graph is not None
    assert (sizes[0], sizes[-1]) == (512, 1024)
    assert [stream.answer.tokens] == on_cpu(bundle, (picture(1), long, new))


# --- picture and question together ----------------------------------------------------------------


def test_merged_calls_give_the_same_answers(machine, bundles, monkeypatch):
    bundle = bundles("dense")
    one, two = picture(1), picture(2)
    asked = [(one, QUESTION, 6), (one, "And why?", 6), ([two, one], "Which?", 6), (None, "Hi", 4)]
    expected = on_cpu(bundle, *asked)
    visual = bundle.manifest.config.visual_tokens

    def chosen(merged_ms):
        return lambda bundle, executor: autotune.FusedPrefillNote("GPU", "source", 2.0, merged_ms)

    for merged_ms in (1.0, 3.0):
        monkeypatch.setattr("visistage.runtime.session.choose_fused_prefill", chosen(merged_ms))
        machine.api.runs.clear()
        with load(bundle.path) as session:
            found = [ask(session, *question) for question in asked]
        alone = sum(run[:2] == ("stage0", visual) for run in machine.api.runs)
        assert found == expected
        # Merged: only the first of two pictures, which another picture follows, goes alone.
        assert alone == (1 if merged_ms < 2 else 3)


def test_merging_is_measured_once_for_a_machine(machine, bundles, tmp_path):
    bundle = Bundle.open(shutil.copytree(bundles("dense").path, tmp_path / "bundle"))
    with load(bundle.path) as session:
        noted = session.fused_prefill
        assert noted.separate_ms > 0
        assert noted.merged_ms > 0
    file = bundle.path / autotune.FUSED_PREFILL_FILE
    assert json.loads(file.read_text())["device"] == "NumPy"
    file.write_text(json.dumps({**json.loads(file.read_text()), "merged_ms": 0.001}))
    with load(bundle.path) as session:
        assert session.fused_prefill.fused
    file.write_text(json.dumps({**json.loads(file.read_text()), "device": "another"}))
    with load(bundle.path) as session:
        assert session.fused_prefill.device == "NumPy"
        assert session.fused_prefill.merged_ms != 0.001
    file.write_text("no JSON")
    with load(bundle.path) as session:
        assert session.fused_prefill.merged_ms > 0


def test_where_gates_forbid_it_nothing_is_measured(machine, bundles):
    with load(bundles("pruned").path) as session:
        assert session.fused_prefill is None
        assert not machine.api.runs
    with load(bundles("dense").path, backend="onnxruntime") as session:
        assert session.fused_prefill is None


# --- probes ---------------------------------------------------------------------------------------


def test_probes_of_ever_new_sizes_share_one_context(machine, bundles):
    """A plan that decides per prompt asks about as many tokens as there are; each on its own."""
    with load(bundles("adaptive").path) as session:
        ask(session, picture(1), new=2)
        executor = session.executor
        stage = executor.engine_set.stages[0]
        shape = next(spec for spec in stage.parts[0].spec.outputs if spec.name == "queries").shape
        query = np.random.default_rng(0).standard_normal((1, *shape[2:])).astype(stage.dtype)
        order = np.arange(stage.slots, dtype=np.int32)[None]
        found = {}
        for count in range(1, 51):
            slots = np.arange(count, dtype=np.int64)[None]
            found[count] = executor.probe(0, 0, query, order, np.full((1,), 60, np.int32), slots)
        probes = [own for own in machine.api.contexts if own.engine.compiled.graph == PROBE]
        assert len(probes) == 1
        assert len({context.profile for context in probes}) == len(probes)
    for cosine, norm in found.values():
        assert np.array_equal(cosine[0], found[50][0][0, : cosine.shape[1]])
        assert np.array_equal(norm[0], found[50][1][0, : norm.shape[1]])


# --- lifetimes ------------------------------------------------------------------------------------


def test_everything_is_freed_in_the_end(machine, bundles):
    with load(bundles("pruned").path) as session:
        ask(session, picture(1), new=4)
        assert machine.device.taken > 0
    del session
    machine.api.contexts.clear()
    gc.collect()
    machine.device.synchronize()
    assert machine.device.taken == 0


def test_a_picture_that_is_opened_ends_a_stream(machine, bundles):
    with load(bundles("pruned").path) as session:
        session.eos = frozenset()
        stream = session.stream(picture(1), QUESTION, max_tokens=8)
        next(stream)
        session.open(picture(2))
        with pytest.raises(VisistageError, match="interrupted"):
            next(stream)


def test_times_are_the_devices_own(machine, bundles):
    with load(bundles("pruned").path) as session:
        answer = session.infer(picture(1), QUESTION, max_tokens=2)
    times = answer.timings.graphs_ms
    assert set(times) == {"vision", "stage0", "select0", "stage1", "stage2"}
    assert all(ms > 0 for ms in times.values())


# --- engines against graphs -----------------------------------------------------------------------


def compared(bundle, monkeypatch):
    for name in ("find_gpu", "find_trt_variant"):  # the machine's, as the runtime sees them
        monkeypatch.setattr(runtime_checks, name, getattr(engine_trt, name))
    samples = [
        SimpleNamespace(name=f"sample {seed}", image=picture(seed), prompt=QUESTION)
        for seed in (1, 2)
    ]
    with VerifyTarget(bundle, samples, max_tokens=6) as target:
        return compare_engines(target)


def test_verify_compares_engines_with_graphs(machine, bundles, monkeypatch):
    found = compared(bundles("pruned"), monkeypatch)
    assert not found.failure
    assert [error.tensor for error in found.errors] == ["sample 1", "sample 2"]
    assert machine.api.runs


def test_verify_finds_engines_that_compute_something_else(machine, bundles, monkeypatch):
    monkeypatch.setattr(DeviceStage, "restore", lambda self, start, saved: None)  # no prefix
    assert "sample 1 is off by" in compared(bundles("pruned"), monkeypatch).failure


# --- what is refused ------------------------------------------------------------------------------


def test_an_engine_that_changed_is_not_loaded(machine, copy):
    file = copy.path / "engines" / "stage1.context128.engine"
    file.write_bytes(file.read_bytes().replace(b"stage1", b"stage2"))
    with pytest.raises(BundleError, match=r"stage1.*contents changed.*visistage build"):
        load(copy.path)
    assert not machine.api.loaded


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"version": "1.6.0"}, EngineError, "compiled by tensorrt_rtx 1.7.1, found 1.6.0"),
        ({"gpu": GpuInfo("Orin", (8, 7), 1)}, EngineError, r"for sm_86, found Orin \(sm_87\)"),
        ({"gpu": None}, EngineError, "no driver.*--backend onnxruntime"),
    ],
)
def test_engines_for_another_machine_are_refused(monkeypatch, bundles, change, error, says):
    machine = stand_in(monkeypatch, **change)
    with pytest.raises(error, match=says):
        load(bundles("pruned").path)
    assert not machine.api.loaded


def test_a_library_that_is_missing_is_named(monkeypatch, bundles):
    stand_in(monkeypatch)
    monkeypatch.setattr(engine_trt, "find_trt_variant", lambda backend: None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '.\[rtx\]'"):
        load(bundles("pruned").path)


def test_a_bundle_without_engines_says_how_to_compile_them(machine, copy):
    shutil.rmtree(copy.path / "engines")
    with pytest.raises(
        EngineError, match=r"no engines yet.*visistage build.*--backend onnxruntime"
    ):
        load(copy.path)


def test_an_engine_for_a_foreign_graph_is_refused(machine, copy):
    index = copy.path / "engines" / "engines.json"
    data = json.loads(index.read_text())
    data["engines"][-1]["graph"] = "stage9"
    index.write_text(json.dumps(data))
    with pytest.raises(EngineError, match="'stage9'"):
        load(copy.path)


@pytest.mark.parametrize("option", [{"threads": 2}, {"memory_limit": 1 << 30}])
def test_options_of_a_cpu_are_refused(machine, bundles, option):
    name = next(iter(option)).replace("_", "-")
    with pytest.raises(TargetError, match=f"--{name} is for ONNX Runtime on a CPU"):
        load(bundles("pruned").path, **option)


def test_a_back_end_must_be_the_targets(machine, bundles):
    with pytest.raises(TargetError, match="runs bundles for h100, h200"):
        load(bundles("pruned").path, backend="tensorrt")
    with load(bundles("pruned").path, backend="tensorrt_rtx") as session:
        assert session.executor.device_name == "NumPy"


def test_a_call_outside_of_every_profile_is_refused(machine, bundles):
    with load(bundles("pruned").path) as session:
        stage = session.executor.engine_set.stages[0]
        with pytest.raises(EngineError, match=r"other sizes than .*Q=100000.*visistage build"):
            stage.parts[0].context({"B": 1, "Q": 100000, "S": 128}, {})


def test_select_reads_slices_that_lie_askew(machine, bundles):
    """Engines read from aligned addresses; a row of these toys is smaller than that."""
    with load(bundles("pruned").path) as session:
        ask(session, picture(1), new=2)
        call = session.executor.engine_set.calls["select0"]
        memory = session.executor.memory
        array = memory.empty((1, 4, 8), np.float32)
        memory.write(array.address, np.arange(32, dtype=np.float32))
        askew = array[:, 1:]
        assert askew.address % 256
        moved = call.as_aligned(askew)
        assert isinstance(moved, DeviceArray)
        assert moved.address % 256 == 0
        assert np.asarray(moved)[0, 0, 0] == 8
