"""Every family on engines: graphs compile in FP16, profiles hold every image, answers are right.

Compiled by TensorRT-RTX, which needs no GPU; what drives engines runs over stand-ins in NumPy.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.checkpoint.known_models import KNOWN_MODELS, model_config
from visistage.compile.engines.engines import compile_engines
from visistage.compile.export.static_shapes import resolve_contexts
from visistage.compile.export.texts import text_facts
from visistage.compile.planfile import resolve_plan
from visistage.compile.quantize.fp16_ranges import decide, measure_ranges, read_ranges
from visistage.graphs.bundle import ANY_CONTEXT, Bundle, GraphFact
from visistage.graphs.bundle_contract import graph_specs
from visistage.graphs.engine_spec import engine_specs_of
from visistage.graphs.errors import CapacityError, ImageSizeError, TargetError
from visistage.graphs.linears import linear_groups
from visistage.graphs.parts import VISION, whole_stages
from visistage.graphs.precision import NO_FALLBACK
from visistage.graphs.targets import TARGETS, TENSORRT_RTX
from visistage.runtime.device import engine_trt
from visistage.runtime.device.device_executor import DeviceExecutor
from visistage.runtime.device.tensorrt import find_trt_variant
from visistage.tests.support.families import PLAN, TINY, make_asked
from visistage.tests.support.stand_ins import stand_in, write_engines
from visistage.tools.verify import runtime_checks
from visistage.tools.verify.runtime_checks import compare_engines
from visistage.tools.verify.verify import verify
from visistage.tools.verify.verify_report import PASSED
from visistage.tools.verify.verify_target import VerifyTarget

STEPS = 4
CONTEXTS = (256,)


@pytest.fixture(scope="module", params=TINY)
def made(request, tmp_path_factory):
    """A checkpoint, questions about two pictures, and the bundle for RTX."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint, samples = make_asked(request.param, folder)
    given = {"plan": PLAN, "target": "rtx", "contexts": CONTEXTS}
    bundle = make_bundle(str(checkpoint), out=folder / "engines", **given)
    return SimpleNamespace(checkpoint=checkpoint, samples=samples, bundle=bundle)


@pytest.fixture
def driven(made, tmp_path, monkeypatch):
    """The bundle on a machine that looks as if it had a GPU, with stand-ins for engines."""
    copy = shutil.copytree(made.bundle.path, tmp_path / "b", ignore=lambda *_: ["engines"])
    stand_in(monkeypatch)
    for name in ("find_gpu", "find_trt_variant"):  # as the runtime sees the machine
        monkeypatch.setattr(runtime_checks, name, getattr(engine_trt, name))
    return write_engines(Bundle.open(copy))


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.skipif(
    find_trt_variant(TENSORRT_RTX) is None, reason="pip install -e '.[rtx]' (Linux only)"
)
def test_every_graph_is_compiled_in_fp16(made):
    engines = compile_engines(made.bundle, capabilities=[(8, 6)]).engines
    config = made.bundle.manifest.config
    assert {engine.graph for engine in engines} == set(made.bundle.manifest.graphs)
    assert sum(engine.decomposable_attention for engine in engines) == 0
    fused = {engine.graph: engine.fused_attention for engine in engines}
    assert fused.pop(VISION) == config.encoder_depth
    assert sum(fused.values()) == config.text.layers
    assert sum(engine.caches_in_place for engine in engines) == 2 * config.text.layers
    assert all(engine.precisions["HALF"] > 0 for engine in engines)


def test_the_orins_read_the_same_graphs_or_basic_operators():
    """Graphs that RTX compiles here are those of ``orin-jp72``; the verification of families on
    OpenVINO holds graphs of the other lowering against the table of ``orin-jp62``.
    """
    rtx, orin = TARGETS["rtx"], TARGETS["orin-jp72"]
    for name in ("lowering", "opset", "operators", "precisions", "static_slots", "int8_cache"):
        assert getattr(rtx, name) == getattr(orin, name), name
    assert TARGETS["orin-jp62"].lowering == TARGETS["openvino"].lowering


# --- the range check ------------------------------------------------------------------------------


def test_the_range_check_sees_every_layer_of_the_encoder(made):
    bundle = made.bundle
    seen = {tensor.rsplit(" ", 1)[0] for tensor in read_ranges(bundle.path)}
    linears = {name for group in linear_groups(bundle.manifest.config) for name in group.linears}
    assert linears <= seen
    assert bundle.manifest.fallback == NO_FALLBACK


def test_an_encoder_that_reaches_too_far_is_refused_by_name(made, tmp_path):
    """Its last projection, a million times as large: nothing behind it divides that away."""
    checkpoint = open_checkpoint(str(shutil.copytree(made.checkpoint, tmp_path / "copy")))
    last = [group for group in linear_groups(checkpoint.config) if group.place == "vision"][-1]
    stored = checkpoint.tensors[f"{last.name}.weight"]
    weight = np.memmap(stored.file, np.float32, "r+", stored.offset, stored.shape)
    weight *= 1e6
    weight.flush()
    with pytest.raises(TargetError, match=rf"{last.name} output reaches .*--precision fp32"):
        decide(measure_ranges(checkpoint, text_facts(checkpoint)))


# --- answers --------------------------------------------------------------------------------------


def test_answers_over_engines_are_those_of_torch(made, driven):
    """Torch against graphs in ONNX Runtime, in FP32 and real FP16; those against the device."""
    report = verify(driven, made.samples, model=str(made.checkpoint), max_tokens=STEPS)
    assert report.failed is None, report.failed
    found = {check.name: check.status for check in report.checks}
    graphs = [f"{kind} {graph}" for graph in driven.manifest.graphs for kind in ("graph", "half")]
    whole = ("weights", "hugging face", "answers", "half answers", "variants", "engine runs")
    assert {found[name] for name in (*whole, *graphs)} == {PASSED}


def test_a_device_that_takes_an_image_apart_is_noticed(made, driven, monkeypatch):
    """Tiles or patches in another order, and nothing of what says where they were."""
    call = DeviceExecutor.call_graph

    def wrong(self, graph, stage, feeds):
        if graph == VISION:
            rest = {name: np.zeros_like(values) for name, values in feeds.items()}
            feeds = {**rest, "pixels": np.ascontiguousarray(feeds["pixels"][::-1])}
        return call(self, graph, stage, feeds)

    monkeypatch.setattr(DeviceExecutor, "call_graph", wrong)
    with VerifyTarget(driven, made.samples[:1], max_tokens=STEPS) as target:
        failure = compare_engines(target).failure
    assert ("wide is off by" in failure) == driven.manifest.config.varies


# --- profiles -------------------------------------------------------------------------------------


def sizes_of_images(count):
    """Heights and widths of all shapes, from a line to a picture of a hundred megapixels."""
    random = np.random.default_rng(5)
    edges = np.exp(random.uniform(np.log(4), np.log(10_000), (count, 2))).astype(int)
    return [(4, 4), (9000, 9000), (28, 5600), (41, 8200), (8200, 41), *map(tuple, edges.tolist())]


def profiled(config, plan):
    """The engines of a config, by graph, without building anything."""
    staged = resolve_plan(plan, config.text.layers, config.visual_tokens)
    specs = graph_specs(config, staged, "float16", whole_stages(staged), False)
    contexts = resolve_contexts(TARGETS["rtx"], config, ())
    graphs = {}
    for name, spec in specs.items():
        known = contexts if spec.follows_context else (ANY_CONTEXT,)
        variants = {context: f"{name}.{context}.onnx" for context in known}
        graphs[name] = GraphFact(f"{name}.onnx", spec.inputs, spec.outputs, variants=variants)
    manifest = SimpleNamespace(config=config, plan=staged, graphs=graphs, contexts=contexts)
    return {engine.graph: engine for engine in engine_specs_of(manifest)}


def fits(engine, name, shape):
    """Tell if a profile of an engine takes an input of this shape."""
    return any(
        all(low <= n <= high for low, n, high in zip(least, shape, most, strict=True))
        for least, _, most in (profile[name] for profile in engine.profiles)
    )


def check_profiles(config, count=200):
    """Images of any shape are within the profiles of the graphs that take them; say how full."""
    engines = profiled(config, "dense" if config.text.layers > 8 else PLAN)
    vision, stage = engines[VISION], engines["stage0"]
    pixels = next(spec for spec in vision.spec.inputs if spec.name == "pixels")
    for engine in engines.values():
        for profile in engine.profiles:
            for least, usual, most in profile.values():
                assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
    largest = dict.fromkeys((spec.name for spec in vision.spec.inputs), 0)
    for height, width in sizes_of_images(count):
        try:
            layout = config.layout(height, width)
        except ImageSizeError:
            continue
        shapes = {name: feed.shape for name, feed in layout.feeds.items()}
        shapes["pixels"] = (layout.tiles if config.varies else 1, *pixels.shape[1:])
        assert shapes.keys() == largest.keys()
        for name, shape in shapes.items():
            assert fits(vision, name, shape), (height, width, name, shape, vision.profiles)
            largest[name] = max(largest[name], shape[0] / vision.profiles[0][name][2][0])
        for start, stop in layout.spans:
            assert fits(stage, "order", (1, stop - start)), (height, width, stop - start)
        assert fits(stage, "order", (1, layout.rows))
        assert layout.rows <= stage.slots
    return largest


@pytest.mark.parametrize("family", TINY)
def test_profiles_hold_images_of_any_shape(family, tmp_path):
    config = open_checkpoint(str(TINY[family].make(tmp_path / "tiny"))).config
    largest = check_profiles(config)
    # Profiles are no wider than images can be: engines take memory for the widest.
    assert min(largest.values()) > 0.6, largest


HOLDING = [
    name
    for name, config in ((name, model_config(name)) for name in KNOWN_MODELS)
    if config.visual_tokens + 512 <= config.text.max_positions
]
"""Models whose largest image fits their decoder's context; of others a budget is wanted."""


def test_a_model_whose_largest_image_does_not_fit_wants_a_budget():
    (name,) = set(KNOWN_MODELS) - set(HOLDING)
    with pytest.raises(CapacityError, match=r"or fewer tokens of an image by --image-tokens$"):
        resolve_contexts(TARGETS["rtx"], model_config(name), ())
    assert resolve_contexts(TARGETS["rtx"], model_config(name, 576), ())


@pytest.mark.parametrize("model", HOLDING)
def test_profiles_of_published_models_hold_images_up_to_the_cap(model):
    whole = model_config(model)
    check_profiles(whole, 60)
    if whole.varies:
        capped = model_config(model, whole.visual_tokens * 2 // 3)
        assert capped.visual_tokens <= whole.visual_tokens * 2 // 3
        check_profiles(capped, 60)


def test_engines_have_room_for_an_image_by_default():
    for name in HOLDING:
        config = model_config(name)
        (context,) = resolve_contexts(TARGETS["rtx"], config, ())
        assert context >= config.visual_tokens + 448, name
        fewer = ", or fewer tokens of an image by --image-tokens" if config.varies else ""
        with pytest.raises(CapacityError, match=rf"Choose --context between them{fewer}$"):
            resolve_contexts(TARGETS["rtx"], config, (64,))
