"""INT8 caches: scales, graphs that round what they cache, and runtimes that keep it so.

Torch with a float cache of rounded numbers (``FakeQuantCache``) is the independent judge.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from visistage.calib.run.collect_ranges import collect
from visistage.calib.samples import Sample
from visistage.cli.main import main
from visistage.cli.show.bundle_view import bundle_facts
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.engines.engines import job_of
from visistage.compile.engines.worker_process import run_worker
from visistage.compile.planfile import resolve_plan
from visistage.compile.quantize.int_arithmetic import INT8_LEVELS
from visistage.compile.quantize.quantize import (
    CACHE_SCALES_FILE,
    calibrated_cache_scales,
    quantised_rows,
    resolve,
)
from visistage.graphs.bundle import Bundle
from visistage.graphs.contract import returns_new_rows
from visistage.graphs.engine_spec import engine_specs_of
from visistage.graphs.errors import DataError, EngineError, ModelError, TargetError
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.quantized import cache_scale_names, is_cache_scale
from visistage.graphs.plan.call_cost import Sizes
from visistage.graphs.presets.presets import preset
from visistage.graphs.quantization import parse_quant_config
from visistage.graphs.targets import TARGETS, TENSORRT_RTX
from visistage.runtime.backends.feeds import stored_cache_scales as told_scales
from visistage.runtime.backends.ort import EXACT, NO_GEMM
from visistage.runtime.device.tensorrt import find_trt_variant
from visistage.runtime.session import load
from visistage.tests.support import calibrated, toy
from visistage.tests.support.chain_judge import PREFIX, ChainJudge, FakeQuantCache, prompts
from visistage.tests.support.stand_ins import stand_in, write_engines
from visistage.tests.support.verified import change_graph, fix_hashes, run, statuses
from visistage.tools.explain.trace import trace
from visistage.tools.verify.chains import TorchChain, prepare_prompts
from visistage.tools.verify.compare import BOUNDS
from visistage.tools.verify.graph_checks import compare_onnxruntime
from visistage.tools.verify.origin import check_prefix, check_weights
from visistage.tools.verify.stored_graph import all_weights
from visistage.tools.verify.verify_report import PASSED
from visistage.tools.verify.verify_target import VerifyTarget

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
STAGED = preset("visipruner", 6, 16, shallow=1, t=2, e=3, keep=4)
ADAPTIVE = "visipruner-adaptive:boundaries=1-2,cosine=0.95,contribution=0.5,exit_cosine=0.9"
AHEAD = "hidrop:entry=1,edges=2,keep=4,exit=3"
QUESTION = "What is in the picture?"
NEW = 10
BUNDLES = {  # plan, precision, target, calibrated for
    "float": (PLAN, "fp32", "cpu", None),
    "pruned": (PLAN, "fp32:cache=int8", "cpu", PLAN),
    "dense": ("dense", "fp32:cache=int8", "cpu", "dense"),
    "adaptive": (ADAPTIVE, "fp32:cache=int8", "cpu", "dense"),
    "portable": (PLAN, "fp32:cache=int8", "cpu-portable", PLAN),
    "integers": (PLAN, "int8:cache=int8", "cpu", PLAN),
    "rtx": (PLAN, "fp16:cache=int8", "rtx", PLAN),
    "ahead": (AHEAD, "fp32:cache=int8", "cpu", AHEAD),
    "rtx, ahead": (AHEAD, "fp16:cache=int8", "rtx", AHEAD),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("model") / "toy", kv_heads=2)


@pytest.fixture(scope="module")
def calibrations(model, tmp_path_factory):
    """Folder and calibration for a plan, each made once."""
    made = {}

    def get(plan):
        if plan not in made:
            folder = tmp_path_factory.mktemp("calibration") / "toy"
            made[plan] = folder, calibrated.calibrate(model, plan, folder)
        return made[plan]

    return get


@pytest.fixture(scope="module")
def bundles(model, calibrations, tmp_path_factory):
    """Bundles by name, each built once."""
    built = {}

    def get(name):
        if name not in built:
            plan, precision, target, known = BUNDLES[name]
            options = {"contexts": (128,)} if target == "rtx" else {}
            folder = None if known is None else calibrations(known)[0]
            options |= {"calibration": folder, "out": tmp_path_factory.mktemp("engines")}
            built[name] = make_bundle(
                str(model), plan=plan, precision=precision, target=target, **options
            )
        return built[name]

    return get


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 52, 3), dtype=np.uint8)


def samples(count=2):
    return [Sample(f"drawn {n}", picture(n), QUESTION, "") for n in range(count)]


def answers(path, new=NEW, **options):
    """Greedy tokens of two pictures, without an end."""
    with load(path, **options) as session:
        session.eos = frozenset()
        return [session.infer(picture(n), QUESTION, max_tokens=new).tokens for n in range(2)]


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["int8:cache=int8", "w4:stage1=float,cache=int8", "fp16+cache=int8"]
)
def test_the_name_of_a_recipe_says_how_it_caches(text):
    recipe = parse_quant_config(text)
    assert recipe.cache == "int8"
    assert "cache=int8" in recipe.name
    assert parse_quant_config(recipe.name) == recipe
    assert parse_quant_config("int8").cache == "float"
    with pytest.raises(TargetError, match="cache: found 'int4', expected one of float, int8"):
        parse_quant_config("int8:cache=int4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp16:cache=int8", "--target", "cuda"], "'cuda' does not run cache=int8"),
        (["--precision", "w4:cache=int8"], "cache=int8 rounds keys, which takes a calibration"),
        (["--precision", "fp16:cache=int8"], "does not run precision 'fp16:cache=int8'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(options, message, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["engines", "--model", str(model), *options])
    assert done.exit_code == 2
    assert message in done.output


def test_a_calibration_without_ranges_of_caches_serves_everything_else(model, calibrations):
    known = replace(calibrations(PLAN)[1], cache=None)
    given = known, open_checkpoint(str(model)).config, known.plan, TARGETS["cpu"]
    with pytest.raises(DataError, match=r"visistage calibrate toy --plan visipruner.*leave out"):
        resolve(parse_quant_config("int8:cache=int8"), *given)
    assert not resolve(parse_quant_config("int8"), *given).quantises_cache


def test_a_plan_that_decides_per_prompt_takes_dense_ranges_and_no_others(
    model, calibrations, tmp_path
):
    given = {"plan": ADAPTIVE, "calibration": calibrations(PLAN)[0], "out": tmp_path}
    with pytest.raises(DataError, match="calibrate toy --plan dense"):
        make_bundle(str(model), precision="w4:cache=int8", **given)
    given["calibration"] = calibrations("dense")[0]
    with pytest.raises(DataError, match="see other rows"):
        make_bundle(str(model), precision="int8:cache=int8", **given)


# --- scales ---------------------------------------------------------------------------------------


def test_ranges_are_the_largest_of_all_that_the_chain_caches(tmp_path):
    toy.make_checkpoint(tmp_path, layers=6, kv_heads=2, max_positions=256)
    checkpoint = open_checkpoint(str(tmp_path))
    weights = {name: tensor.float() for name, tensor in checkpoint.state_dict().items()}
    found = collect(checkpoint, prompts(), STAGED, PREFIX).cache
    assert (found.shape, found.dtype) == ((2, 6, 2), np.float32)
    whole, own = np.zeros_like(found), np.zeros_like(found)
    for prompt in prompts():
        judge = ChainJudge(checkpoint, weights, STAGED)
        judge.run(prompt)
        begins = isinstance(prompt.parts[0], tuple) and prompt.parts[0][: len(PREFIX)] == PREFIX
        pairs = [pair for stage in judge.executor.caches for pair in stage]
        for layer, pair in enumerate(pairs):
            for number, cache in enumerate(pair):
                size = cache[0].abs().numpy()
                whole[number, layer] = np.maximum(whole[number, layer], size.max((1, 2)))
                rest = size[:, len(PREFIX) if begins else 0 :].max((1, 2))
                own[number, layer] = np.maximum(own[number, layer], rest)
    np.testing.assert_allclose(found, whole, rtol=1e-4)
    assert (own < 0.99 * whole).any()  # or the prefix would not have mattered
    dense = resolve_plan("dense", 6, 16)
    assert not np.allclose(collect(checkpoint, prompts(), dense, PREFIX).cache[:, -1], found[:, -1])


def test_damaged_keys_are_named(tmp_path):
    toy.make_checkpoint(tmp_path, layers=6, max_positions=256, scale=1e30)
    with pytest.raises(ModelError, match=r"NaN or infinity|not finite"):
        collect(open_checkpoint(str(tmp_path)), prompts()[:1], STAGED, PREFIX)


def test_rounding_is_to_the_nearest_of_255_steps_and_saturates():
    scale = torch.tensor([0.5, 2.0])
    rows = torch.tensor([0.24, 0.26, 0.75, 1.25, -63.5, 1e9, -1e9]).reshape(1, 1, 7, 1)
    stored = Eager().stored(rows.repeat(1, 2, 1, 1), scale)
    assert stored.dtype == torch.int8
    assert stored[0, 0, :, 0].tolist() == [0, 1, 2, 2, -127, 127, -128]  # halves go to even
    assert stored[0, 1, :, 0].tolist() == [0, 0, 0, 1, -32, 127, -128]
    assert Eager().read(stored, scale)[0, :, 3, 0].tolist() == [1.0, 2.0]


def test_scales_are_one_127th_of_the_ranges_and_fp16_numbers_where_graphs_are(calibrations):
    known = calibrations(PLAN)[1]
    dead = known.cache.copy()
    dead[0, 1, 1] = 0
    scales = calibrated_cache_scales(replace(known, cache=dead), half=False)
    assert scales[0, 1, 1] == 1
    assert scales[1, 2, 0] == np.float32(known.cache[1, 2, 0]) / np.float32(INT8_LEVELS)
    half = calibrated_cache_scales(known, half=True)
    assert np.array_equal(half, half.astype(np.float16))
    assert not np.array_equal(half, scales)


# --- bundles --------------------------------------------------------------------------------------


def test_contract_files_and_runtime_say_the_same(bundles, calibrations):
    bundle = bundles("pruned")
    scales = calibrated_cache_scales(calibrations(PLAN)[1], half=False)
    told, stored = told_scales(bundle), all_weights(bundle)
    for layer in range(4):
        for number, name in enumerate(cache_scale_names(layer)):
            assert np.array_equal(stored[name], scales[number, layer])
            assert np.array_equal(told[layer][name.rpartition(".")[2]], scales[number, layer])
    for name, fact in bundle.manifest.graphs.items():
        caches = [
            one
            for one in (*fact.spec.inputs, *fact.spec.outputs)
            if one.name.split(".")[0] in ("key", "value")
        ]
        assert {one.dtype for one in caches} <= {"int8"}, name
    assert bundle.manifest.prefix.keys.dtype == "int8"
    assert [
        returns_new_rows(bundles(n).manifest.graphs["stage0"].spec) for n in ("pruned", "rtx")
    ] == [
        False,
        True,
    ]


def test_what_a_bundle_keeps_is_a_quarter(bundles):
    caches, cached = {}, {}
    for name in ("float", "pruned"):
        with load(bundles(name).path) as session:
            session.open(picture(1))
            caches[name] = sum(c.nbytes for s in session.executor.caches for c in s.values())
            kept = session.context.cached.get(session.context.current_key)
            cached[name] = sum(c.nbytes for held in kept.stages for c in held.caches.values())
    assert caches["float"] == 4 * caches["pruned"] > 0
    assert cached["float"] == 4 * cached["pruned"] > 0
    rows = [bundle_facts(bundles(n))["stages"][0]["kv_bytes_per_row"] for n in ("float", "pruned")]
    assert rows[0] == 4 * rows[1]
    sizes = {n: bundles(n).manifest.files["prefix.bin"].nbytes for n in ("float", "pruned")}
    assert sizes["float"] == 4 * sizes["pruned"]
    assert Sizes.of("int8:cache=int8").cache == 1
    shown = CliRunner().invoke(main, ["inspect", str(bundles("pruned").path)]).stdout
    assert "INT8, a scale for each layer and head" in shown


def test_two_builds_give_equal_bytes(model, bundles, calibrations, tmp_path):
    again = make_bundle(
        str(model),
        plan=PLAN,
        precision="fp32:cache=int8",
        calibration=calibrations(PLAN)[0],
        out=tmp_path,
    )
    assert CACHE_SCALES_FILE in again.manifest.files
    assert again.manifest.files == bundles("pruned").manifest.files


# --- torch and ONNX Runtime -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pruned", "dense", "adaptive", "portable", "integers", "ahead"])
def test_onnxruntime_says_what_torch_says_token_for_token(bundles, name):
    bundle = bundles(name)
    torch_chain = TorchChain.stored(bundle, half=False, free=1 << 30)
    with load(bundle.path) as session:
        session.eos = frozenset()
        for one in prepare_prompts(session, samples()):
            want = torch_chain.answer(one, NEW)
            got = session.infer(one.opened, one.sample.prompt, max_tokens=NEW)
            assert got.tokens == want.tokens
            assert got.plan.kept == want.selection.kept
            logits = session.score(one.opened, one.sample.prompt, want.tokens[:-1])
            assert np.abs(logits - want.logits).max() < BOUNDS["cache"].whole * want.logits.std()
        caches = [cache for stage in session.executor.caches for cache in stage.values()]
    assert {cache.dtype.name for cache in caches} == {"int8"}
    assert max(int(np.abs(cache.astype(int)).max()) for cache in caches) > 100


@pytest.mark.parametrize("name", ["pruned", "dense", "ahead"])
def test_an_int8_cache_is_a_float_cache_of_rounded_numbers(bundles, calibrations, name):
    """Scales by layer and head, for keys and for values."""
    bundle = bundles(name)
    scales = calibrated_cache_scales(calibrations(BUNDLES[name][0])[1], half=False)
    judged = TorchChain.stored(bundle, half=False, free=1 << 30)
    judged.prefix = None  # its rows run like all others, and are rounded by the judge

    def prepare(stage):
        for layer, block in getattr(stage, "model").layers.items():  # noqa: B009
            pair = [torch.from_numpy(of[int(layer)])[:, None, None] for of in scales]
            block.self_attn.ops = FakeQuantCache(pair)

    judged.prepare = lambda module: prepare(module) if hasattr(module, "model") else None
    chain = TorchChain.stored(bundle, half=False, free=1 << 30)
    with load(bundle.path) as session:
        (one, *_) = prepare_prompts(session, samples(1))
    want = judged.answer(one, NEW)
    got = chain.follow(one, want.tokens)
    assert np.abs(got.logits - want.logits).max() < BOUNDS["cache"].whole * want.logits.std()
    assert got.selection == want.selection


def test_a_new_picture_a_kept_one_and_a_cold_start_say_the_same(bundles):
    for name in ("pruned", "portable"):
        (first, _) = answers(bundles(name).path)
        with load(bundles(name).path) as session:
            session.eos = frozenset()
            said = [
                session.infer(picture(n), QUESTION, max_tokens=NEW).tokens for n in (0, 1, 0, 0)
            ]
        assert said[0] == said[2] == said[3] == first
        assert said[1] != first


def test_graphs_mean_the_same_where_bytes_are_kept_from_saturating(bundles, monkeypatch):
    """As on a processor without VNNI, where ONNX Runtime makes signed bytes unsigned."""
    for name in ("integers", "portable"):
        path = bundles(name).path
        expected = answers(path)
        entries = dict([NO_GEMM, EXACT])
        monkeypatch.setattr(
            "visistage.runtime.backends.ort.int8_session_entries", lambda found=entries: found
        )
        assert answers(path) == expected
        monkeypatch.undo()


def test_what_an_answer_looked_at_is_read_from_integers(bundles):
    """The trace reads caches itself: where a selection is, it must find what was selected by."""
    with load(bundles("pruned").path) as session:
        real, scores = session.executor.select, []

        def select(*given):
            kept = real(*given)
            scores.append(kept.scores[0])
            return kept

        session.executor.select = select
        session.infer(picture(0), QUESTION, max_tokens=1)
        del session.executor.select
        found = trace(session, [picture(0)], QUESTION, max_tokens=2).layers[1].norms
    np.testing.assert_allclose(found, scores[0], rtol=1e-3, atol=1e-6)


# --- planted mistakes -----------------------------------------------------------------------------


@pytest.fixture
def copy(bundles, tmp_path):
    """The pruned bundle, to be spoilt."""
    return Bundle.open(shutil.copytree(bundles("pruned").path, tmp_path / "bundle"))


def swapped(bundle):
    """Keys read by the scales of values, and the other way round: in the bytes."""
    file = bundle.file(CACHE_SCALES_FILE)
    scales = np.fromfile(file, np.float32).reshape(2, -1)
    file.unlink()  # a hard link would spoil the other bundle
    scales[::-1].tofile(file)
    return fix_hashes(bundle)


def test_a_good_bundle_passes_every_check(bundles, model, calibrations):
    report = run(bundles("pruned"), 1, model=str(model), calibration=calibrations(PLAN)[0])
    found = statuses(report)
    assert report.failed is None
    records = ("weights", "prefix", "hugging face", "quantisation", "graph stage0", "graph select0")
    assert {found[name] for name in (*records, "runtime", "answers")} == {PASSED}
    facts = {record.name: record.facts for record in report.checks}
    assert facts["weights"]["scales of caches"] == 8
    assert "tokens agree" in facts["quantisation"]["teacher-forced"]


def test_scales_of_keys_and_values_swapped_in_the_file(copy, model, calibrations):
    known, checkpoint = calibrations(PLAN)[1], open_checkpoint(str(model))

    def failure_of(bundle):
        return check_weights(VerifyTarget(bundle, (), checkpoint, known)).failure

    assert not failure_of(copy)
    failure = failure_of(swapped(copy))
    assert "key_scale is not what the calibration makes of it" in failure


def test_scales_of_keys_and_values_swapped_in_a_graph(copy):
    def change(graph):
        for node in graph.node:
            for at, name in enumerate(node.input):
                if is_cache_scale(name):
                    pair = ("key_scale", "value_scale")
                    old, new = pair if name.endswith(pair[0]) else pair[::-1]
                    node.input[at] = name.replace(old, new)

    assert not compare_onnxruntime(VerifyTarget(copy), "stage1").failure
    spoilt = change_graph(copy, "stage1.onnx", change)
    assert "is off by" in compare_onnxruntime(VerifyTarget(spoilt), "stage1").failure


def test_a_prefix_rounded_by_other_scales_is_noticed(copy, model):
    checkpoint = open_checkpoint(str(model))
    assert not check_prefix(VerifyTarget(copy, (), checkpoint)).failure
    file = copy.file("prefix.bin")
    shifted = np.fromfile(file, np.int8) // 2
    file.unlink()
    shifted.tofile(file)
    failure = check_prefix(VerifyTarget(fix_hashes(copy), (), checkpoint)).failure
    assert "prefix keys of layer 0 is off by" in failure


def test_a_prefix_is_rounded_layer_by_layer_and_head_by_head():
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 3, 2, 4, 8, generator=generator)
    scales = np.random.default_rng(0).uniform(0.01, 0.05, (2, 3, 2)).astype(np.float32)
    want = np.clip(np.rint(cache.numpy() / scales[..., None, None]), -128, 127)
    assert np.array_equal(quantised_rows(cache, scales).numpy(), want.astype(np.int8))


# --- devices and engines --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtx", "rtx, ahead"])
def test_a_device_keeps_integers_and_says_the_same(bundles, monkeypatch, name):
    machine = stand_in(monkeypatch)
    bundle = write_engines(bundles(name))
    expected = answers(bundle.path, backend="onnxruntime")
    with load(bundle.path) as session:
        session.eos = frozenset()
        said = [session.infer(picture(n), QUESTION, max_tokens=NEW).tokens for n in (0, 1, 0)]
        assert {stage.dtype.name for stage in session.executor.engine_set.stages} == {"int8"}
    assert said == [*expected, expected[0]]
    assert machine.api.runs


@pytest.mark.skipif(
    find_trt_variant(TENSORRT_RTX) is None, reason="pip install -e '.[rtx]' (Linux only)"
)
def test_engines_take_caches_of_integers_and_hand_rows_back(bundles, tmp_path):
    bundle = bundles("rtx")
    wanted = ("stage0.context128", "select0.context128")
    for recipe in (one for one in engine_specs_of(bundle.manifest) if one.name in wanted):
        job = job_of(
            bundle, recipe, find_trt_variant(TENSORRT_RTX), [(8, 6)], tmp_path / "out.engine"
        )
        facts = run_worker(job, recipe.name, tmp_path / "log", lambda steps: None).facts
        assert facts["caches_in_place"] == 0
        if recipe.graph == "stage0":
            assert facts["precisions"]["INT8"] >= 2 * 2  # new keys and values of two layers
            assert facts["fused_attention"] == 2
            assert facts["decomposable_attention"] == 0


@pytest.mark.skipif(
    find_trt_variant(TENSORRT_RTX) is None, reason="pip install -e '.[rtx]' (Linux only)"
)
def test_tensorrt_still_refuses_to_update_integers_in_place(bundles, tmp_path):
    """Why engines hand rows back; where this fails, ``onnx_ops.LlmRows`` may go."""
    bundle = bundles("pruned")
    (recipe,) = [one for one in engine_specs_of(bundles("rtx").manifest) if one.graph == "stage1"]
    spec = bundle.manifest.graphs["stage1"].spec
    profiles = [{n: s for n, s in each.items()} for each in recipe.profiles]
    recipe = replace(recipe, source="stage1.onnx", spec=spec, profiles=tuple(profiles))
    job = job_of(bundle, recipe, find_trt_variant(TENSORRT_RTX), [(8, 6)], tmp_path / "out.engine")
    with pytest.raises(EngineError, match="cache has type Int8"):
        run_worker(job, "stage1", tmp_path / "log", lambda steps: None)
