"""Integer weights: what a recipe resolves to, what is folded, written, fused and compiled."""

import os
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from visistage.cli.main import main
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.engines.engines import compile_engines
from visistage.compile.planfile import resolve_plan
from visistage.compile.quantize.int_arithmetic import int8_weight, restored
from visistage.compile.quantize.quantize import QuantisedTensors, resolve
from visistage.graphs.bundle import MANIFEST
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.errors import DataError, TargetError
from visistage.graphs.linears import linear_groups
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.quantized import SCALE, QuantizedLinear, block_of
from visistage.graphs.quantization import Quantization, parse_quant_config
from visistage.graphs.targets import TARGETS, TENSORRT_RTX
from visistage.runtime.backends.ort import EXACT, NO_GEMM, int8_session_entries, saturates
from visistage.runtime.device.tensorrt import find_trt_variant
from visistage.runtime.session import load
from visistage.tests.support import calibrated, toy
from visistage.tests.support.verified import run

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
WIDE = {"hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint whose layers are wide enough for two blocks of inputs."""
    return toy.make_checkpoint(tmp_path_factory.mktemp("model") / "toy", **WIDE)


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration") / "toy"
    return folder, calibrated.calibrate(model, PLAN, folder)


@pytest.fixture(scope="module")
def int8(model, calibration, tmp_path_factory):
    out = tmp_path_factory.mktemp("int8")
    return make_bundle(str(model), precision="int8", calibration=calibration[0], out=out)


def resolved(text, model, known, target="cpu", plan=PLAN):
    config = open_checkpoint(str(model)).config
    staged = resolve_plan(plan, config.text.layers, config.visual_tokens)
    return resolve(parse_quant_config(text), known, config, staged, TARGETS[target])


# --- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "int8:vision=float,stage2=w4",
        "int8:decode=w4,observer=mse",
        "w4:keep=5%,head=float",
        "int8:observer=mse,smooth=no,keep=model.layers.1.mlp.down_proj",
    ],
)
def test_the_name_of_a_recipe_reads_back_as_the_recipe(text):
    quant_config = parse_quant_config(text)
    assert parse_quant_config(quant_config.name) == quant_config
    assert "/" not in quant_config.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "unknown precision 'int9'"),
        ("int8:vision", "option: found 'vision', expected key=value"),
        ("int8:decode=w8", "expected w4"),
        ("int8:vision=w2", "expected one of float, w8a8, w8, w4"),
        ("int8:obsever=mse", "Did you mean 'observer'"),
        ("w4:keep=120%", "more than 100 %"),
        ("int8:smooth=perhaps", "expected one of yes, no"),
    ],
)
def test_a_recipe_with_a_slip_is_refused_by_name(text, message):
    with pytest.raises(TargetError, match=message):
        parse_quant_config(text)


def test_every_linear_layer_has_the_scheme_of_its_place_and_stage(model, calibration):
    schemes = resolved("int8:stage2=w4,vision=float", model, calibration[1]).schemes
    of_layer = {
        layer: {schemes[f"model.layers.{layer}.mlp.{n}_proj"] for n in ("up", "down")}
        for layer in range(4)
    }
    assert of_layer == {0: {"w8a8"}, 1: {"w8a8"}, 2: {"w8a8"}, 3: {"w4"}}
    assert schemes["lm_head"] == "w8"
    assert not [name for name in schemes if "vision" in name or "projector" in name]


def test_the_most_sensitive_layers_stay_float(model, calibration):
    known = calibration[1]
    everything = resolved("int8", model, known).schemes
    kept = set(everything) - set(resolved("int8:keep=10%", model, known).schemes)
    errors = {
        name: by[everything[name]]
        for g in known.groups.values()
        for name, by in g.sensitivity.items()
    }
    assert len(kept) == -(-len(errors) // 10)
    assert min(errors[name] for name in kept) >= max(errors[n] for n in set(errors) - kept)


def test_what_cannot_be_honoured_is_refused(model, calibration):
    known = calibration[1]
    with pytest.raises(TargetError, match=r"names stage7, plan .* has 3 stages"):
        resolved("int8:stage7=w4", model, known)
    with pytest.raises(TargetError, match="does not run w4 layers"):
        resolved("int8:stage2=w4", model, known, "orin-jp62")
    with pytest.raises(TargetError, match="Did you mean 'lm_head'"):
        resolved("int8:keep=lm_hed", model, known)
    with pytest.raises(DataError, match="visistage calibrate MODEL"):
        resolved("int8", model, None)
    assert resolved("int8", model, known, "orin-jp62").schemes.get("lm_head") == "w8"
    assert resolved("int8", model, known, "cpu-portable").schemes.get("lm_head") is None
    assert resolved("w4", model, None).calibration is None


# --- numbers -------------------------------------------------------------------------------------


def test_folding_leaves_the_function_as_it_was(model, calibration):
    """Every group that can take factors, smoothed, and nothing rounded: the same logits."""
    checkpoint, known = open_checkpoint(str(model)), calibration[1]
    config = checkpoint.config
    generator = np.random.default_rng(1)
    groups = {
        name: replace(
            ranges, factors=np.exp(generator.normal(size=len(ranges.factors))).astype("f")
        )
        for name, ranges in known.groups.items()
    }
    known = replace(known, groups=groups)
    smoothed = {g.name: 0.5 for g in linear_groups(config) if g.fold is not None}
    # A scheme on a layer that no tensor below has: what says which factors a group takes.
    schemes = {name: "w8a8" for g in linear_groups(config) for name in g.linears}
    quantised_tensors = QuantisedTensors(
        checkpoint,
        Quantization(schemes=schemes, smoothed=smoothed),
        known,
        half=False,
        engines=False,
    )
    plain = checkpoint.state_dict("")
    folded = {
        name: torch.from_numpy(quantised_tensors.folded(*name.rsplit(".", 1)))
        if name.rsplit(".", 1)[1] in ("weight", "bias") and "embed" not in name
        else weight
        for name, weight in plain.items()
    }
    changed = [
        n
        for n in plain
        if folded[n].shape == plain[n].shape and not torch.equal(folded[n], plain[n].float())
    ]
    assert len(changed) > 4 * config.text.layers
    embeds = torch.randn(1, 30, config.text.hidden, generator=torch.Generator().manual_seed(2))
    plan = resolve_plan(PLAN, config.text.layers, 16)
    hf = checkpoint.raw["text_config"]
    one, other = (
        chain.run(weights, hf, embeds, [[(4, 20)]], plan).logits for weights in (plain, folded)
    )
    spread = one.std()
    assert (one - other).abs().max() <= 1e-5 * spread * 10


def test_the_weights_in_a_bundle_are_the_rounded_ones(model, int8):
    name = "model.layers.1.self_attn.o_proj"  # nothing is folded into it
    weight = load_file(model / "model.safetensors")["language_model." + name + ".weight"].numpy()
    values, scales = int8_weight(weight)
    stored = initializers(int8, "stage0")
    assert np.array_equal(stored[f"{name}.weight_int8"], values)
    assert np.array_equal(stored[f"{name}.weight_scale"], scales)
    assert np.abs(restored(values, scales) - weight).max() <= scales.max() / 2 * (1 + 1e-6)


def test_layers_of_one_input_hold_scales_that_differ_in_their_last_bit(int8):
    stored = initializers(int8, "stage0")
    q, k, v = (stored[f"model.layers.0.self_attn.{n}_proj.input_scale"] for n in "qkv")
    assert np.nextafter(q, np.float32(np.inf)) == k
    assert np.nextafter(k, np.float32(np.inf)) == v


@pytest.mark.parametrize("scheme", ["w8a8", "w8", "w4"])
def test_a_quantised_layer_is_the_product_of_what_its_numbers_stand_for(scheme):
    generator = torch.Generator().manual_seed(3)
    block = block_of(scheme, 200, engines=False)
    layer = QuantizedLinear(Eager(), scheme, 200, 24, bias=True, block=block)
    top = 7 if scheme == "w4" else 127
    for name, parameter in layer.named_parameters():
        values = torch.rand(parameter.shape, generator=generator)
        parameter.data = (
            ((values * 2 - 1) * top).round().to(torch.int8) if "int" in name else values
        )
    x = torch.randn(5, 200, generator=generator)
    scale = getattr(layer, SCALE[scheme])
    if scheme != "w8a8":
        scale = torch.stack([scale[row // 128] for row in range(200)])
    given = x
    if scheme == "w8a8":
        given = (x / layer.input_scale).round().clamp(-128, 127) * layer.input_scale
    integers = next(p for p in layer.parameters() if p.dtype == torch.int8)
    want = given @ (integers.float() * scale) + layer.bias
    assert torch.allclose(layer(x), want, atol=1e-4)


# --- files ---------------------------------------------------------------------------------------


def initializers(bundle, graph):
    model = onnx.load(bundle.file(f"{graph}.onnx"), load_external_data=False)
    out = {}
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if not entries or tensor.data_type == onnx.TensorProto.INT4:
            continue
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        raw = bundle.file(entries["location"]).read_bytes()
        start = int(entries["offset"])
        data = raw[start : start + int(entries["length"])]
        out[tensor.name] = np.frombuffer(data, dtype).reshape(tuple(tensor.dims))
    return out


def test_two_builds_give_equal_bytes(model, calibration, int8, tmp_path):
    again = make_bundle(str(model), precision="int8", calibration=calibration[0], out=tmp_path)
    facts = [bundle.manifest.files for bundle in (int8, again)]
    assert facts[0] == facts[1]


def test_a_second_build_writes_nothing(model, calibration, int8):
    before = {name: os.stat(int8.file(name)).st_mtime_ns for name in int8.manifest.files}
    out = int8.path.parents[1]
    again = make_bundle(str(model), precision="int8", calibration=calibration[0], out=out)
    assert again.path == int8.path
    assert before == {name: os.stat(int8.file(name)).st_mtime_ns for name in before}


@pytest.mark.parametrize("field", ["model", "template", "preprocessing"])
def test_a_calibration_of_something_else_is_refused_by_name(model, calibration, tmp_path, field):
    known = calibration[1]
    other = replace(known, fits={**known.fits, field: "0" * 64})
    other.save(tmp_path / "other")
    with pytest.raises(DataError, match=f"does not fit: it was made for {field} 0000"):
        make_bundle(
            str(model), precision="int8", calibration=tmp_path / "other", out=tmp_path / "out"
        )
    assert not list((tmp_path / "out").rglob(MANIFEST))


@pytest.mark.parametrize(
    "size", [{"layers": 5}, {"hidden": 32}, {"kv_heads": 1}, {"image_size": 48}]
)
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_calibration_of_another_size_is_refused(calibration, tmp_path, size, precision):
    other = toy.make_checkpoint(tmp_path / "other", **size)
    with pytest.raises(DataError, match="made for a model of another size"):
        make_bundle(
            str(other), precision=precision, calibration=calibration[0], out=tmp_path / "out"
        )


def test_a_calibration_for_another_plan_is_refused(model, calibration, tmp_path):
    with pytest.raises(DataError, match="under 'dense' layers see other rows"):
        make_bundle(
            str(model), plan="dense", precision="int8", calibration=calibration[0], out=tmp_path
        )


def test_a_calibration_brings_its_plan_to_float_bundles_too(model, calibration, tmp_path):
    bundle = make_bundle(str(model), calibration=calibration[0], out=tmp_path)
    assert bundle.manifest.plan == calibration[1].plan
    with pytest.raises(TargetError, match="nothing of a calibration is used"):
        make_bundle(str(model), plan="dense", calibration=calibration[0], out=tmp_path)


def test_a_calibration_in_the_usual_place_is_found(model, calibration, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calibration[1].save(tmp_path / "calibrations" / "toy")
    bundle = make_bundle(str(model), precision="int8", out=tmp_path / "out")
    assert bundle.manifest.quantization.calibration == calibration[1].hash


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int8"], "Make one: visistage calibrate MODEL"),
        (["--precision", "int8", "--calib", "nowhere"], "nowhere"),
        (["--keep-float", "auto:5%"], "--keep-float keeps layers of a quantised precision"),
        (["--precision", "w4", "--target", "cpu-portable"], "no scales in blocks"),
        (["--precision", "int8", "--target", "cuda"], "does not run precision 'int8'"),
    ],
)
def test_the_command_line_says_what_to_type_next(options, message, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["engines", "--model", str(model), *options])
    assert done.exit_code == 2
    assert message in done.output


# --- engines of both kinds ----------------------------------------------------------------------


def optimised(bundle, graph, folder):
    """Operators of a graph after ONNX Runtime's optimiser, as the runtime sets it up."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    for entry, value in int8_session_entries().items():
        options.add_session_config_entry(entry, value)
    ort.InferenceSession(bundle.file(f"{graph}.onnx"), options, providers=["CPUExecutionProvider"])
    model = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("graph", ["vision", "stage0", "stage1", "stage2"])
def test_onnxruntime_runs_every_rounded_layer_in_integers(int8, graph, tmp_path):
    left = onnx.load(int8.file(f"{graph}.onnx"), load_external_data=False).graph.node
    layers = sum(node.op_type == "QuantizeLinear" for node in left)
    found = optimised(int8, graph, tmp_path)
    assert layers > 0
    assert found["MatMulIntegerToFloat"] == layers
    assert found["DequantizeLinear"] == found["MatMul"] == 0
    assert found["Gemm"] == (graph == "vision")  # of patches, which are never rounded
    assert found["MatMulNBits"] == (graph == "stage2")  # the head: weights alone


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_onnxruntime_never_restores_whole_weights(model, precision, tmp_path):
    bundle = make_bundle(str(model), plan=PLAN, precision=precision, out=tmp_path)
    found = optimised(bundle, "stage0", tmp_path)
    assert found["MatMulNBits"] == 2 * 7
    assert found["DequantizeLinear"] == found["MatMul"] == found["Gemm"] == 0


def test_integer_products_are_exact_where_the_processor_lets_them_saturate(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("flags : avx2 fma")
    new.write_text("flags : avx2 avx512_vnni")
    assert saturates("x86_64", old)
    assert saturates("AMD64", tmp_path / "nowhere")
    assert not saturates("x86_64", new)
    assert not saturates("aarch64", old)
    assert NO_GEMM[0] in int8_session_entries()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose weights outweigh all else in an engine; it and its calibration."""
    folder = tmp_path_factory.mktemp("wide")
    size = {"layers": 2, "hidden": 1024, "intermediate": 2048, "heads": 8, "kv_heads": 8}
    size["image_size"] = 64  # pictures of 64 rows: kernels for fewer want weights of their own
    model = toy.make_checkpoint(folder / "wide", **size)
    calibrated.calibrate(model, "dense", folder / "calibration")
    return model, folder / "calibration"


def engine_facts(wide, precision, out):
    """Bytes of the weights and of the decoder's engine, and its layers by type."""
    known = None if precision == "fp16" else wide[1]
    options = {"target": "rtx", "contexts": (128,), "out": out}
    bundle = make_bundle(
        str(wide[0]), plan="dense", precision=precision, calibration=known, **options
    )
    engines = compile_engines(bundle, capabilities=[(8, 6)])
    assert {one.graph for one in engines.engines} == set(bundle.manifest.graphs)
    decoder = next(one for one in engines.engines if one.graph == "stage0")
    return bundle.manifest.weight_bytes, decoder.nbytes, decoder.layers


@pytest.mark.skipif(
    find_trt_variant(TENSORRT_RTX) is None, reason="pip install -e '.[rtx]' (Linux only)"
)
def test_engines_of_every_scheme_keep_their_weights_in_integers(wide, tmp_path):
    """What the compiler stores is what its kernels read: restored weights would be as large as
    those of FP16. (Only a GPU can say more of an engine.)
    """
    weights, whole, _ = engine_facts(wide, "fp16", tmp_path)
    # The toy's tower has heads of 8, for which there is no kernel behind rounded layers.
    for precision in ("int8:vision=float", "w8", "w4"):
        smaller, nbytes, layers = engine_facts(wide, precision, tmp_path)
        assert layers["DEQUANTIZE"] >= 2 * 7
        assert layers.get("QUANTIZE", 0) == (2 * 4 if "int8" in precision else 0)
        assert whole - nbytes > 0.8 * (weights - smaller), (precision, whole, nbytes)


@pytest.mark.parametrize("inputs", [48, 96, 192, 576, 960, 1152, 3420, 4096, 4304, 2 * 509])
def test_blocks_of_engines_are_whole(inputs):
    """TensorRT divides a layer's inputs by its scales, whatever the block is said to be."""
    block = block_of("w4", inputs, engines=True)
    assert inputs % block == 0
    assert block >= 16
    assert block <= 128 or inputs == 2 * 509  # of which no block is a part
    assert block_of("w4", inputs, engines=False) == 128
    assert block_of("w8", inputs, engines=True) is None


@pytest.mark.parametrize("target", ["cpu", "rtx"])
def test_widths_that_no_block_divides(target, tmp_path):
    """INT4 everywhere: verified against the checkpoint, and compiled."""
    sizes = {"hidden": 192, "heads": 3, "kv_heads": 3, "intermediate": 344, "encoder_heads": 2}
    model = toy.make_checkpoint(tmp_path / "toy", layers=2, **sizes)
    given = {"plan": "dense", "precision": "w4:vision=w4", "target": target, "out": tmp_path}
    bundle = make_bundle(str(model), **given)
    report = run(bundle, count=1, model=str(model))
    assert report.failed is None, report.failed
    if target == "cpu":
        found = optimised(bundle, "stage0", tmp_path)
        assert found["MatMulNBits"] == 2 * 7 + 1
        assert found["DequantizeLinear"] == 0
        return
    scales = initializers(bundle, "stage0")
    shapes = {name.split(".")[-2]: scale.shape for name, scale in scales.items() if "scale" in name}
    assert shapes["o_proj"] == (192 // 64, 192)
    assert shapes["down_proj"] == (344 // 86, 192)
    if find_trt_variant(TENSORRT_RTX) is not None:
        engines = compile_engines(bundle, capabilities=[(8, 6)])
        assert {one.graph for one in engines.engines} == set(bundle.manifest.graphs)


def test_bundles_answer_the_same_where_integer_products_must_be_kept_from_saturating(
    model, calibration, int8, tmp_path, monkeypatch
):
    """As on a processor without VNNI: weights become unsigned, and mean the same."""
    w8 = make_bundle(str(model), plan=PLAN, precision="w8", out=tmp_path)
    image = np.full((32, 32, 3), 90, np.uint8)
    for bundle in (int8, w8):
        with load(bundle.path) as session:
            want = session.score(image, "Why?", [7, 8, 9])
        entries = dict([NO_GEMM, EXACT])
        monkeypatch.setattr(
            "visistage.runtime.backends.ort.int8_session_entries", lambda found=entries: found
        )
        with load(bundle.path) as session:
            got = session.score(image, "Why?", [7, 8, 9])
        monkeypatch.undo()
        assert np.abs(got - want).max() < 0.2 * want.std()
