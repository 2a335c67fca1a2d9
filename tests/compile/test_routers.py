"""Routers of checkpoints: which plans read them, under which names, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from visistage.compile.build import make_bundle
from visistage.compile.build_spec import resolve_build
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.checkpoint.names import router_shapes
from visistage.compile.checkpoint.routers import check_routers
from visistage.graphs.errors import ModelError
from visistage.graphs.plan.routing import ROUTERS, is_router
from visistage.graphs.presets.presets import parse_request, preset
from visistage.graphs.targets import resolve_target
from visistage.runtime.session import load
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.routed_checkpoint import add_routers

LAYERS = 4


@pytest.fixture
def checkpoint(tmp_path):
    return toy.make_checkpoint(tmp_path / "toy", layers=LAYERS)


def check(path, text, named=True):
    opened = open_checkpoint(str(path))
    name, options = parse_request(text)
    plan = preset(name, LAYERS, opened.config.visual_tokens, **options)
    check_routers(opened, plan, named=named)
    return opened


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_plan_reads_the_routers_of_its_kind_and_no_others(kind, checkpoint):
    opened = check(add_routers(checkpoint, kind), kind)
    found = {name for name in opened.tensors if is_router(name)}
    plan = preset(kind, LAYERS, opened.config.visual_tokens)
    assert found == set(router_shapes(opened.config.text, plan.routing))
    layers = {int(name.split(".")[2]) for name in found}
    assert layers == ({1, 2} if kind == "mod" else {0, 1, 2, 3})
    for other in ROUTERS:
        if other != kind:
            with pytest.raises(ModelError, match=f"{kind}|with shape"):
                check(checkpoint, other)


def test_layers_that_are_wrapped_are_known_by_their_own_names(checkpoint):
    add_routers(checkpoint, "skipgpt", wrapped=True)
    stored = load_file(checkpoint / "model.safetensors")
    assert "language_model.model.layers.1.block.mlp.up_proj.weight" in stored
    opened = check(checkpoint, "skipgpt")
    assert torch.equal(
        opened.load("model.layers.1.mlp.up_proj.weight"),
        stored["language_model.model.layers.1.block.mlp.up_proj.weight"],
    )


def test_a_checkpoint_without_routers_is_refused_by_names_of_tensors(checkpoint):
    with pytest.raises(ModelError) as error:
        check(checkpoint, "dllm")
    assert "lacks model.layers.0.router_block.weight_predictor.weight" in str(error.value)
    assert "the routers of plan 'dllm'; it holds no routers" in str(error.value)


def test_routers_are_left_out_only_where_a_plan_was_named(checkpoint):
    add_routers(checkpoint, "skipgpt")
    check(checkpoint, "dense")
    with pytest.raises(ModelError, match=r"no plan was named.*: --plan skipgpt, or .*--plan dense"):
        check(checkpoint, "visipruner", named=False)
    target, precision = resolve_target("cpu", None)
    opened = open_checkpoint(str(checkpoint))
    with pytest.raises(ModelError, match="no plan was named"):
        resolve_build(opened, plan=None, target=target, precision=precision)


def test_a_tensor_that_no_router_of_the_plan_reads_is_refused(checkpoint):
    add_routers(checkpoint, "skipgpt-lrm")
    file = checkpoint / "model.safetensors"
    more = {"language_model.model.layers.2.router_mlp.hidden_layer.bias": torch.zeros(16)}
    save_file(load_file(file) | more, file)
    with pytest.raises(ModelError, match=r"router_mlp.hidden_layer.bias that plan 'skipgpt-lrm'"):
        check(checkpoint, "skipgpt-lrm")


def test_dummy_weights_have_the_routers_that_the_plan_reads(tmp_path):
    plan = preset("skipgpt", 22, 576)
    opened = open_checkpoint(
        "llava-45m", dummy_weights=True, cache=tmp_path, routing=plan_for("llava-45m").routing
    )
    assert any(map(is_router, opened.tensors))
    assert opened.path.name == "llava-45m-skipgpt"
    bare = open_checkpoint("llava-45m", dummy_weights=True, cache=tmp_path)
    assert not any(map(is_router, bare.tensors))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(opened.load(name), bare.load(name))
    assert plan.routing == plan_for("llava-45m").routing


def plan_for(model):
    from visistage.compile.checkpoint.known_models import model_config

    config = model_config(model)
    return preset("skipgpt", config.text.layers, config.visual_tokens)


def test_quantised_bundles_keep_routers_in_float(checkpoint, tmp_path):
    """Weights of linear layers become integers of eight bits, those of routers do not."""
    add_routers(checkpoint, "skipgpt")
    bundle = make_bundle(str(checkpoint), plan="skipgpt", precision="w8", out=tmp_path)
    schemes = bundle.manifest.quantization.schemes
    assert schemes
    assert not any(map(is_router, schemes))
    with load(bundle.path) as session:
        session.eos = frozenset()
        assert len(session.infer(picture(1), "What is it?", max_tokens=4).tokens) == 4
