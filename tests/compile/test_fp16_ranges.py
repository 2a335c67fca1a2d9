"""FP16 done right: what overflows is found, remedied where that is possible, else refused by name.

Overflow is looked for with torch's half type, which really computes in it.
"""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from visistage.calib.samples import evaluation_samples
from visistage.cli.show.bundle_view import bundle_facts
from visistage.compile import layer_stream as stream
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.export import export, graphs_of
from visistage.compile.export.texts import text_facts
from visistage.compile.export.weights import place
from visistage.compile.planfile import resolve_plan
from visistage.compile.quantize.fp16_ranges import (
    RANGES_FILE,
    ObservedEager,
    decide,
    dense_pieces,
    measure_ranges,
    range_images,
    read_ranges,
)
from visistage.graphs.bundle import Bundle
from visistage.graphs.errors import ModelError, TargetError
from visistage.graphs.fields import from_json, to_json
from visistage.graphs.modules.layer import DecoderLayer, Linear
from visistage.graphs.modules.onnx_ops import Llm
from visistage.graphs.modules.ops import Eager
from visistage.graphs.precision import HALF_MAX, NO_FALLBACK, SAFE_MAX, Fp32Fallback, Reason
from visistage.runtime.session import load
from visistage.tests.support.staged import Staged, compared

from ..support import toy
from ..support.asking import example_feeds, torch_outputs

ort = pytest.importorskip("onnxruntime")

PLAN = "visipruner:shallow=1,t=2,e=4,keep=6"
LAYERS = toy.HALF_LAYERS
NEW = 12


# In each of these FP16 alone gives infinities; what the check must find is said beside it.
PRODUCT = toy.scaled(  # gate and up are harmless, their product is not, its projection is again
    {
        "layers.3.mlp.gate_proj": 16.0,
        "layers.3.mlp.up_proj": 2.0**10,
        "layers.3.mlp.down_proj": 2.0**-10,
    }
)
RESIDUAL = toy.scaled(  # every update fits, their sum does not
    {"o_proj": 2.0**12, "layers.0.mlp.down_proj": 2.0**12, "linear_2": 2.0**12}
    | {f"layers.{n}.mlp.down_proj": 2.0**15 for n in (1, 2)}
)
ATTENTION = toy.scaled({"layers.2.self_attn.v_proj": 2.0**8, "layers.2.self_attn.o_proj": 2.0**9})
PLANTS = {"product": PRODUCT, "residual": RESIDUAL, "attention": ATTENTION}


def measured(path):
    checkpoint = open_checkpoint(str(path))
    return measure_ranges(checkpoint, text_facts(checkpoint))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Folder of a planted checkpoint and what the check says of it, by name."""
    made = {}

    def get(name):
        if name not in made:
            path = toy.make_half(tmp_path_factory.mktemp("models") / name, PLANTS.get(name))
            made[name] = path, measured(path)
        return made[name]

    return get


def questions(count=3):
    generator = np.random.default_rng(3)
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return [(image, f"What is shown here, number {i}?", NEW) for i, image in enumerate(images)]


def toy_plan():
    return resolve_plan(PLAN, LAYERS, 16)


# --- the decision ---------------------------------------------------------------------------


def test_harmless_ranges_need_nothing():
    assert decide({"model.layers.0.mlp.down_proj input": SAFE_MAX}) == NO_FALLBACK


def test_every_remedy_follows_from_its_tensor():
    found = decide(
        {
            "model.layers.1.input_layernorm input": 20000.0,
            "model.layers.1.mlp.down_proj input": 17000.0,
            "model.layers.1.mlp.down_proj output": 1e5,
            "model.layers.2.self_attn.o_proj output": 5e5,
            "model.norm input": 4e5,
        }
    )
    assert found.rows
    assert found.mlp_shift == {1: 3}
    assert found.attention_shift == {2: 5}
    for shift, largest in ((3, 1e5), (5, 5e5)):
        assert largest / 2**shift <= SAFE_MAX < largest / 2 ** (shift - 1)
    assert [reason.tensor for reason in found.reasons] == [
        "model.layers.1.input_layernorm input",
        "model.layers.1.mlp.down_proj input",
        "model.layers.1.mlp.down_proj output",
        "model.layers.2.self_attn.o_proj output",
    ]
    assert from_json(Fp32Fallback, json.loads(json.dumps(to_json(found))), ModelError, "") == found


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.0.self_attn.q_proj output",
        "model.layers.0.self_attn.v_proj output",
        "model.layers.0.input_layernorm output",
        "model.layers.0.mlp.gate_proj output",
        "model.layers.0.self_attn scores",
        "lm_head output",
        "model.norm output",
        "vision_tower.encoder.layers.0.layer_norm1 input",
        "vision_tower.encoder.layers.0.mlp.fc2 output",
        "multi_modal_projector.linear_1 input",
    ],
)
def test_what_nothing_helps_is_refused_by_name(tensor):
    with pytest.raises(TargetError, match="--precision fp32") as refusal:
        decide({tensor: 2 * SAFE_MAX})
    assert tensor in str(refusal.value)


# --- what is measured ------------------------------------------------------------------------


def test_every_projection_and_norm_is_measured(planted):
    path, ranges = planted("plain")
    checkpoint = open_checkpoint(str(path))
    modules = {name.rsplit(".", 1)[0] for name in checkpoint.tensors if name.endswith(".weight")}
    modules -= {"model.embed_tokens", "vision_tower.embeddings.position_embedding"}
    used = {name for name in modules if "post_layernorm" not in name}
    depth = checkpoint.config.encoder_depth
    used = {name for name in used if not name.startswith(f"vision_tower.encoder.layers.{depth}.")}
    assert {name.removesuffix(" output") for name in ranges if name.endswith(" output")} == used
    for layer in range(LAYERS):
        assert ranges[f"model.layers.{layer}.self_attn scores"] > 0
    assert all(value == float(f"{value:.2g}") for value in ranges.values())
    assert decide(ranges) == NO_FALLBACK


def test_values_are_those_of_the_whole_model(planted):
    """Weights piece by piece give what the whole model gives, here for the first prompt's tower."""
    path, ranges = planted("plain")
    seen = {}
    model = Staged(path, toy_plan(), torch.float32)
    for name, module in model.vision.vision.named_modules():
        if isinstance(module, Linear):

            def note(module, given, out, name=name):
                seen[f"{name} output"] = float(out.abs().max())

            module.register_forward_hook(note)
    with torch.no_grad():
        model.vision(range_images(model.checkpoint.config, model.preprocessing))
    assert len(seen) > 10
    for name, value in seen.items():
        assert ranges[name] == pytest.approx(value, rel=0.06), name


def test_progress_counts_every_piece(planted):
    path, _ = planted("plain")
    checkpoint = open_checkpoint(str(path))
    told = []
    measure_ranges(checkpoint, text_facts(checkpoint), told.append)
    assert sum(told) == dense_pieces(checkpoint.config)


def test_one_piece_in_memory_at_a_time(planted):
    """The module itself takes none, and storage is reused from layer to layer."""
    path, _ = planted("plain")
    checkpoint = open_checkpoint(str(path))
    text = checkpoint.config.text
    layers = stream.without_weights(
        lambda: torch.nn.ModuleList(DecoderLayer(text, Eager()) for _ in range(2))
    )
    assert all(weight.is_meta for weight in layers.parameters())
    body = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": layers})})
    call = stream.Streamed(checkpoint, body)
    places = []
    for layer in layers:
        with call.loaded(layer):
            places.append({name: weight.data_ptr() for name, weight in call.weights.items()})
    assert places[0] == places[1]
    stored = checkpoint.load("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(call.weights["mlp.up_proj.weight"], stored.float())


def test_damaged_weights_are_called_damaged(tmp_path):
    def damage(weights):
        name = next(name for name in weights if "layers.1.mlp.up_proj.weight" in name)
        weights[name][0] = HALF_MAX
        name = next(name for name in weights if "layers.1.mlp.down_proj.weight" in name)
        weights[name] = torch.full_like(weights[name], math.nan)

    path = toy.make_checkpoint(tmp_path / "toy", dtype="float16")
    weights = load_file(path / "model.safetensors")
    damage(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj output is not finite"):
        measured(path)


def test_watched_scores_are_those_that_are_computed():
    told = []
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    ObservedEager(told.append).attend(q, k, k, None)
    whole = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    assert float(told[0].abs().max()) == pytest.approx(float(whole.abs().max()), rel=1e-5)


# --- planted overflows -----------------------------------------------------------------------


def beyond(ranges):
    return {name for name, value in ranges.items() if value > SAFE_MAX}


def test_the_planted_product_is_found_and_nothing_else(planted):
    _, ranges = planted("product")
    assert beyond(ranges) == {"model.layers.3.mlp.down_proj input"}
    assert ranges["model.layers.3.mlp.down_proj input"] > HALF_MAX
    found = decide(ranges)
    assert not found.rows
    assert not found.attention_shift
    assert found.mlp_shift.keys() == {3}


def test_the_planted_residual_is_found(planted):
    _, ranges = planted("residual")
    found = decide(ranges)
    assert found.rows
    assert found.mlp_shift.keys() == {1, 2}
    assert all("norm input" in n or "down_proj output" in n for n in beyond(ranges))
    assert max(ranges[f"model.layers.{n}.input_layernorm input"] for n in (2, 3)) > HALF_MAX


def test_the_planted_attention_update_is_found(planted):
    _, ranges = planted("attention")
    found = decide(ranges)
    assert found.attention_shift.keys() == {2}
    assert ranges["model.layers.2.self_attn.o_proj output"] > HALF_MAX


@pytest.mark.parametrize("name", PLANTS)
def test_half_overflows_without_the_decision_and_not_with_it(planted, name):
    path, ranges = planted(name)
    narrow = compared(path, toy_plan(), NO_FALLBACK, questions(1))
    assert not narrow.finite
    assert narrow.agreement < 0.5

    decided = compared(path, toy_plan(), decide(ranges), questions(6))
    assert decided.finite
    assert decided.error < 0.1  # of an unplanted toy: 0.07, which is what FP16's 11 bits give
    assert (
        decided.agreement >= 0.9
    )  # random logits lie close together: within that error some change places


@pytest.mark.parametrize("name", PLANTS)
def test_the_decided_model_is_the_same_function(planted, name):
    """In FP32 the scaling is exact to the last bits."""
    path, ranges = planted(name)
    image, question, _ = questions(1)[0]
    tokens, plain, _ = Staged(path, toy_plan(), torch.float32).answer(image, question, 4)
    decided = Staged(path, toy_plan(), torch.float32, decide(ranges))
    _, wide, _ = decided.answer(image, question, 4, forced=tokens)
    assert torch.allclose(plain, wide, atol=1e-4 * float(plain.std()))


@pytest.mark.parametrize(
    ("part", "factor", "tensor"),
    [
        ("layers.2.self_attn.q_proj", 2.0**13, "model.layers.2.self_attn.q_proj output"),
        ("layers.4.mlp.gate_proj", 2.0**14, "model.layers.4.mlp.gate_proj output"),
        ("lm_head", 2.0**12, "lm_head output"),
        ("encoder.layers.1.mlp.fc1", 2.0**14, "vision_tower.encoder.layers.1.mlp.fc1 output"),
        ("multi_modal_projector.linear_1", 2.0**14, "multi_modal_projector.linear_1 output"),
    ],
)
def test_a_planted_overflow_without_remedy_is_refused(tmp_path, part, factor, tensor):
    path = toy.make_half(tmp_path / "toy", toy.scaled({part: factor}))
    with pytest.raises(TargetError) as refusal:
        make_bundle(str(path), plan=PLAN, target="rtx", out=tmp_path / "out")
    assert tensor in str(refusal.value)
    assert "--precision fp32" in str(refusal.value)
    assert not list(tmp_path.rglob("manifest.json"))
    make_bundle(str(path), plan=PLAN, target="rtx", precision="fp32", out=tmp_path / "out")


# --- bundles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.parametrize("target", ["rtx", "orin-jp62"])
def test_decided_graphs_compute_what_the_model_computes(planted, tmp_path, name, target):
    """Both lowerings on ONNX Runtime, against torch in FP32: a scale not undone would show."""
    path, ranges = planted(name)
    bundle = make_bundle(str(path), plan=PLAN, target=target, out=tmp_path)
    assert bundle.manifest.fallback == decide(ranges)
    rows = {
        spec.dtype
        for fact in bundle.manifest.graphs.values()
        for spec in (*fact.spec.inputs, *fact.spec.outputs)
        if "rows" in spec.name
    }
    assert rows == {"float32" if bundle.manifest.fallback.rows else "float16"}

    config, plan = bundle.manifest.config, bundle.manifest.plan
    checkpoint = open_checkpoint(str(path))
    weights = {name: checkpoint.load(name).float() for name in checkpoint.tensors}
    generator = np.random.default_rng(5)
    lowering = bundle.manifest.lowering
    for graph in graphs_of(config, plan, "float16", lowering, fallback=bundle.manifest.fallback):
        session = ort.InferenceSession(str(bundle.file(f"{graph.name}.onnx")))
        feeds = example_feeds(graph, 5, generator)
        got = dict(zip([s.name for s in graph.spec.outputs], session.run(None, feeds), strict=True))
        for tensor, wanted in torch_outputs(graph, config, plan, weights, feeds).items():
            if tensor.startswith(("key", "value")) and lowering == "portable":
                wanted = wanted[:, :, 9:14]  # the new rows only
            wanted = wanted.double().numpy()
            worst = np.abs(got[tensor].astype(np.float64) - wanted).max()
            assert worst <= 0.1 * max(wanted.std(), 1e-9), (graph.name, tensor, worst)


def test_a_decided_bundle_answers(planted, tmp_path):
    """The whole runtime, with rows in FP32 between FP16 graphs."""
    path, _ = planted("residual")
    bundle = make_bundle(str(path), plan=PLAN, target="rtx", out=tmp_path)
    model = Staged(path, bundle.manifest.plan, torch.float32)
    with load(bundle.path, backend="onnxruntime") as session:
        session.eos = frozenset()
        assert session.executor.rows_dtype == np.float32
        for image, question, _ in questions():
            token = session.infer(image, question, max_tokens=4).tokens[0]
            logits = model.answer(image, question, 1)[1][0]
            # The best token, or one that FP16's error may exchange for it.
            assert logits[token] >= logits.max() - 0.1 * logits.std()


def test_a_decision_is_read_again_and_shown(planted, tmp_path, monkeypatch):
    """A build that goes on after the check does not measure again, and inspect says why."""
    path, ranges = planted("product")
    from visistage.compile import build as building

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(building, "write_texts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_bundle(str(path), plan=PLAN, target="rtx", out=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(building, "measure_ranges", interrupted)
        bundle = make_bundle(str(path), plan=PLAN, target="rtx", out=tmp_path)
    assert read_ranges(bundle.path) == ranges
    assert RANGES_FILE in bundle.manifest.files
    assert Bundle.open(bundle.path).manifest.fallback == decide(ranges)
    shown = bundle_facts(bundle)["widening"]
    assert shown["mlp_shift"] == {"3": decide(ranges).mlp_shift[3]}
    assert shown["reasons"][0]["tensor"] == "model.layers.3.mlp.down_proj input"


def test_an_unaffected_model_gets_the_plain_graphs(planted, tmp_path):
    path, _ = planted("plain")
    bundle = make_bundle(str(path), plan=PLAN, target="rtx", out=tmp_path)
    assert bundle.manifest.fallback == NO_FALLBACK
    config = bundle.manifest.config
    graphs = graphs_of(config, bundle.manifest.plan, "float16", "llm")
    checkpoint = open_checkpoint(str(path))
    placement = place(checkpoint, [n for graph in graphs for n in graph.weights], "float16")
    for graph in graphs:
        export(graph, config.text, tmp_path / "plain.onnx", placement.spans)
        plain = (tmp_path / "plain.onnx").read_bytes()
        assert plain == bundle.file(f"{graph.name}.onnx").read_bytes(), graph.name


def test_an_fp32_bundle_checks_no_ranges(planted, tmp_path):
    path, _ = planted("product")
    bundle = make_bundle(str(path), plan=PLAN, target="cpu", out=tmp_path)
    assert bundle.manifest.fallback == NO_FALLBACK
    assert RANGES_FILE not in bundle.manifest.files


def test_two_checks_agree_to_the_byte(planted):
    path, ranges = planted("residual")
    assert json.dumps(measured(path)) == json.dumps(ranges)


def test_what_is_always_fp32_is(planted, tmp_path):
    """Norm statistics by attribute, angles and logits by type, in the graphs as they are."""
    import onnx

    path, _ = planted("residual")
    bundle = make_bundle(str(path), plan=PLAN, target="rtx", out=tmp_path)
    norms = 0
    for name, fact in bundle.manifest.graphs.items():
        model = onnx.load(bundle.file(fact.file), load_external_data=False)
        for node in model.graph.node:
            if node.op_type in ("RMSNormalization", "LayerNormalization"):
                norms += 1
                kinds = {a.name: a.i for a in node.attribute}
                assert kinds.get("stash_type", 1) == 1
        for output in model.graph.output:
            if output.name in ("logits", "scores"):
                assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT, name
    assert norms >= 2 * LAYERS + 1
    assert Llm().opset >= 23


@pytest.mark.parametrize("name", ["product", "residual"])
def test_decided_graphs_compile(planted, tmp_path, name):
    from visistage.compile.engines import engines
    from visistage.runtime.device import tensorrt as flavour

    if flavour.find_trt_variant("tensorrt_rtx") is None:
        pytest.skip("the TensorRT-RTX wheel is not installed")
    path, _ = planted(name)
    bundle = make_bundle(str(path), plan=PLAN, target="rtx", out=tmp_path)
    compiled = engines.compile_engines(bundle, capabilities=[(8, 6)])
    assert {one.graph for one in compiled.engines} == bundle.manifest.graphs.keys()
    for one in compiled.engines:
        if one.graph.startswith("stage"):
            assert one.fused_attention > 0
            assert one.decomposable_attention == 0


# --- the demo --------------------------------------------------------------------------------


def test_the_demo_in_half_answers_as_in_fp32():
    """40 held-out questions; the decision is that nothing needs widening."""
    checkpoint = open_checkpoint("demo")
    assert decide(measured("demo")) == NO_FALLBACK
    plan = resolve_plan(
        "visipruner", checkpoint.config.text.layers, checkpoint.config.visual_tokens
    )
    asked = [(sample.image, sample.prompt, 3) for sample in evaluation_samples("demo", None, 40)]
    found = compared("demo", plan, NO_FALLBACK, asked)
    assert found.finite
    assert found.agreement >= 0.95
    assert found.error < 0.05


def test_reasons_read_as_sentences():
    reason = Reason("model.norm input", 2e4, "so rows travel in FP32")
    assert str(reason) == "model.norm input reaches 20000, so rows travel in FP32"
