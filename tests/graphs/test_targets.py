"""Targets, parts, slots and recipes: engines are compiled for what plan and contract say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.known_models import KNOWN_MODELS
from visistage.compile.checkpoint.names import decoder_shapes
from visistage.compile.export import static_shapes
from visistage.compile.export.static_shapes import (
    compiler_peak,
    resolve_contexts,
    resolve_parts,
    split,
)
from visistage.graphs.caches import SLOT_STEP, stage_slots
from visistage.graphs.config import ModelConfig
from visistage.graphs.engine_spec import DECODE_ROWS, engine_specs_of
from visistage.graphs.errors import CapacityError, TargetError
from visistage.graphs.parts import part_names, stage_of, stage_parts
from visistage.graphs.presets.presets import preset
from visistage.graphs.targets import (
    BASIC_OPERATORS,
    LOWERINGS,
    PORTABLE,
    TARGETS,
    check_operators,
    find_target,
    parse_capability,
    show_capability,
)
from visistage.tests.support import toy

LLAVA = ModelConfig.from_hf(KNOWN_MODELS["llava-7b"].config)
PLANS = st.sampled_from(["dense", "visipruner", "fastv", "pyramiddrop"])


def test_targets_are_complete_and_consistent():
    for target in TARGETS.values():
        assert target.lowering in LOWERINGS
        assert target.opset == (20 if target.lowering == PORTABLE else 24)
        assert target.engines == (target.build_memory is not None)
        if target.engines:
            assert target.operators is not None
            assert target.precisions[0] == "fp16"
    assert TARGETS["orin-jp62"].operators == BASIC_OPERATORS
    assert TARGETS["orin-jp62"].versions == ("10.3", "10.4")
    assert TARGETS["orin-jp72"].capabilities == ((8, 7),)


def test_a_graph_beyond_its_target_is_refused_by_name():
    jp62 = find_target("orin-jp62")
    check_operators(jp62, "stage0", 20, {"MatMul", "Softmax"})
    with pytest.raises(TargetError, match=r"'stage0' uses Attention, TensorScatter.*orin-jp62"):
        check_operators(jp62, "stage0", 20, {"MatMul", "TensorScatter", "Attention"})
    with pytest.raises(TargetError, match=r"opset 24.*'orin-jp62' reads up to 20"):
        check_operators(jp62, "stage0", 24, {"MatMul"})


def test_the_check_stands_in_the_way_of_an_export(tmp_path, monkeypatch):
    from dataclasses import replace

    checkpoint = toy.make_checkpoint(tmp_path / "toy")
    poorer = replace(TARGETS["cpu"], operators=TARGETS["rtx"].operators - {"Gemm"})
    monkeypatch.setitem(TARGETS, "cpu", poorer)
    with pytest.raises(TargetError, match="'vision' uses Gemm, which target 'cpu'"):
        make_bundle(str(checkpoint), plan="dense", out=tmp_path / "out")
    assert not list(tmp_path.rglob("vision.onnx"))


@pytest.mark.parametrize("text", ["86", "8.6", "sm_86", "SM86"])
def test_capabilities_are_read_as_people_write_them(text):
    assert parse_capability(text) == (8, 6)
    assert show_capability((12, 0)) == "sm_120"


@pytest.mark.parametrize("text", ["", "8", "ampere", "-86"])
def test_other_capabilities_are_refused(text):
    with pytest.raises(TargetError, match="no compute capability"):
        parse_capability(text)


def test_versions_of_compilers():
    assert TARGETS["orin-jp62"].serves("10.3.0")
    assert TARGETS["orin-jp62"].serves("10.3.0.30")
    assert not TARGETS["orin-jp62"].serves("10.7.0")
    assert TARGETS["orin-jp72"].serves("10.16.2.10")
    assert TARGETS["h100"].serves("11.4.0.106")
    assert not TARGETS["h100"].serves("10.3.0")
    assert not TARGETS["h100"].serves("12.0")


@given(name=PLANS, gib=st.floats(2.5, 40), size=st.sampled_from([2, 4]))
def test_parts_cover_every_layer_once_and_stay_within_the_budget(name, gib, size):
    plan = preset(name, LLAVA.text.layers, LLAVA.visual_tokens)
    budget = int(gib * 2**30) * (size // 2)
    parts = split(LLAVA.text, plan, size, budget)
    assert [layer for part in parts for layer in range(*part.layers)] == list(range(32))
    for part in parts:
        first, stop = plan.stages[part.stage].layers
        assert first <= part.layers[0] < part.layers[1] <= stop
    layer = sum(
        a * b * size
        for name, shape in decoder_shapes(LLAVA.text).items()
        if name.startswith("model.layers.0.") and len(shape) == 2
        for a, b in [shape]
    )
    deepest = max(part.depth for part in parts)
    assert compiler_peak(layer * deepest) <= budget * 1.001
    by_stage = {part.stage: [p.depth for p in parts if p.stage == part.stage] for part in parts}
    for depths in by_stage.values():
        assert max(depths) - min(depths) <= 1  # equal cuts
    assert len(set(part_names(parts))) == len(parts)
    assert [stage_of(name) for name in part_names(parts)] == [part.stage for part in parts]


def test_as_few_parts_as_the_budget_allows():
    plan = preset("visipruner", 32, 576)
    one = split(LLAVA.text, plan, 2, 100 << 30)
    assert [part.layers for part in one] == [stage.layers for stage in plan.stages]
    default = split(LLAVA.text, plan, 2, TARGETS["rtx"].build_memory)
    assert part_names(default) == ["stage0.part0", "stage0.part1", "stage1", "stage2"]
    with pytest.raises(CapacityError, match=r"one layer of stage 0 .* --build-memory \dGiB"):
        split(LLAVA.text, plan, 2, 1 << 30)


@given(name=PLANS, context=st.integers(640, 4096))
def test_slots_suffice_for_a_prompt_of_one_image(name, context):
    """Every stage holds the rows that reach it, and no more than a step beyond."""
    plan = preset(name, 32, 576)
    for stage, slots in zip(plan.stages, stage_slots(plan, 576, context), strict=True):
        needed = context - 576 + stage.visual_tokens
        assert needed <= slots < needed + SLOT_STEP
        assert slots % SLOT_STEP == 0


def test_contexts_that_cannot_be():
    rtx, cpu = TARGETS["rtx"], TARGETS["cpu"]
    assert resolve_contexts(rtx, LLAVA, ()) == (1024,)  # an image of 576 tokens, and 448 rows
    assert resolve_contexts(rtx, LLAVA, (4096, 1024, 1024)) == (1024, 4096)
    assert resolve_contexts(cpu, LLAVA, ()) == ()
    with pytest.raises(TargetError, match="--context fixes nothing"):
        resolve_contexts(cpu, LLAVA, (1024,))
    for length in (600, 5000):
        with pytest.raises(CapacityError, match=rf"context of {length} rows cannot be"):
            resolve_contexts(rtx, LLAVA, (length,))


def test_limits_of_the_compiler_are_refused_by_name():
    rtx, cpu = TARGETS["rtx"], TARGETS["cpu"]
    dense = preset("dense", 4, 16)
    wide = ModelConfig.from_hf(toy.make_config(hidden=1024, heads=2, kv_heads=2))
    with pytest.raises(TargetError, match="heads are 512 wide"):
        resolve_parts(rtx, wide, dense, "float16", None)
    assert resolve_parts(cpu, wide, dense, "float32", None) is None
    with pytest.raises(TargetError, match="--build-memory limits nothing"):
        resolve_parts(cpu, LLAVA, dense, "float32", 1 << 30)


@pytest.mark.parametrize("plan", ["visipruner:shallow=1,t=1,e=2,keep=4", "visipruner-code"])
@pytest.mark.parametrize("target", ["rtx", "orin-jp62"])
def test_recipes_follow_the_contract(tmp_path, target, plan):
    checkpoint = toy.make_checkpoint(tmp_path / "toy")
    bundle = make_bundle(
        str(checkpoint),
        plan=plan,
        target=target,
        contexts=(128, 256),
        out=tmp_path / "out",
    )
    manifest = bundle.manifest
    engine_specs = engine_specs_of(manifest)
    fixed = target == "rtx"
    per_graph = {name: 2 if fixed and name != "vision" else 1 for name in manifest.graphs}
    assert len(engine_specs) == sum(per_graph.values())
    assert len({engine_spec.name for engine_spec in engine_specs}) == len(engine_specs)
    for engine_spec in engine_specs:
        assert (bundle.path / engine_spec.source).is_file()
        assert set(engine_spec.profiles[0]) == {spec.name for spec in engine_spec.spec.inputs}
        for profile in engine_spec.profiles:
            for spec in engine_spec.spec.inputs:
                smallest, top, largest = profile[spec.name]
                for dim, low, mid, high in zip(spec.shape, smallest, top, largest, strict=True):
                    assert low <= mid <= high
                    assert dim in (low, high) or isinstance(dim, str)
                    assert dim != "B" or high == 1
                    assert dim != "S" or (low == high) == fixed
        if engine_spec.graph.startswith("stage"):
            decode, prefill = (profile["rows"] for profile in engine_spec.profiles)
            assert [shape[1] for shape in decode] == [1, 1, DECODE_ROWS]
            assert prefill[0][1] == DECODE_ROWS + 1  # no profile of one row beside a wide one
            assert prefill[2][1] == engine_spec.slots


def test_parts_have_the_contract_of_a_stage(tmp_path, monkeypatch):
    """One layer a part, and the whole chain still answers as one graph a stage does."""
    import numpy as np
    from visistage.runtime.session import load

    checkpoint = toy.make_checkpoint(tmp_path / "toy", layers=4, kv_heads=2)
    image = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    answers = []
    for target in ("rtx", "orin-jp62"):
        for cut in (False, True):
            if cut:
                monkeypatch.setattr(static_shapes, "cut_stage", one_layer_each)
            bundle = make_bundle(
                str(checkpoint),
                plan="visipruner:shallow=1,t=1,e=2,keep=4",
                target=target,
                precision="fp32",
                out=tmp_path / f"out{cut}",
            )
            assert len(bundle.manifest.parts_of(0)) == (2 if cut else 1)
            with load(bundle.path, backend="onnxruntime") as session:
                session.eos = frozenset()
                answers.append(session.infer(image, "What is it?", max_tokens=16).tokens)
            monkeypatch.undo()
    assert len(set(answers)) == 1
    assert len(set(answers[0])) > 5


def one_layer_each(plan, stage, *_):
    return stage_parts(plan, stage, [1] * plan.stages[stage].depth)
