"""Patches as products: what transformers' convolutions give, and no convolution in any graph."""

import numpy as np
import onnx
import pytest
import torch
from transformers import CLIPVisionConfig, InternVLVisionConfig, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.internvl.modeling_internvl import InternVLVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from visistage.compile.build import make_bundle
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.stem import Embeddings, PatchEmbedding
from visistage.graphs.vision_config import VisionConfig
from visistage.tests.support import toy

HIDDEN = 24
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 4}
SIZES["num_hidden_layers"] = 1


def reference(kind, size, patch):
    """Transformers' embeddings of random weights, and their weights under our names."""
    torch.manual_seed(3)
    sides = {"image_size": size, "patch_size": patch}
    if kind == "internvit":
        both = {name: (side, side) for name, side in sides.items()}
        config = InternVLVisionConfig(**SIZES, **both, use_absolute_position_embeddings=True)
        theirs = InternVLVisionEmbeddings(config)
    else:
        theirs = {
            "clip": lambda: CLIPVisionEmbeddings(CLIPVisionConfig(**SIZES, **sides)),
            "siglip": lambda: SiglipVisionEmbeddings(SiglipVisionConfig(**SIZES, **sides)),
        }[kind]()
    for weights in theirs.parameters():
        torch.nn.init.normal_(weights)
    names = {
        "patch_embeddings.projection.": "patch_embedding.",
        "cls_token": "class_embedding",
        "position_embeddings": "position_embedding.weight",
    }
    state = {}
    for name, weights in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "position_ids" not in name and "mask_token" not in name:
            state[name] = weights
    return theirs.double().eval(), state


def ours(kind, size, patch, state):
    vision = VisionConfig(kind, 1, HIDDEN, 48, 4, size, patch)
    module = Embeddings(vision, Eager())
    module.load_state_dict(state)
    return module.double()


def difference(kind, size, patch):
    theirs, state = reference(kind, size, patch)
    pixels = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(pixels)
        expected = expected[0] if isinstance(expected, tuple) else expected
        return float((ours(kind, size, patch, state)(pixels) - expected).abs().max())


@pytest.mark.parametrize("kind", ["clip", "siglip", "internvit"])
@pytest.mark.parametrize(("size", "patch"), [(32, 8), (28, 14), (27, 27)])
def test_embeddings_are_those_of_transformers(kind, size, patch):
    assert difference(kind, size, patch) < 1e-11


def test_pixels_beyond_the_last_whole_patch_are_left_out():
    """SigLIP's 384 pixels are 27 patches of 14, and 6 pixels."""
    assert difference("siglip", 30, 14) < 1e-11


@pytest.mark.parametrize("order", [(0, 2, 4, 1, 5, 3), (0, 4, 2, 1, 3, 5), (0, 2, 4, 3, 1, 5)])
def test_another_order_of_pixels_or_patches_is_noticed(monkeypatch, order):
    real = torch.Tensor.permute
    monkeypatch.setattr(torch.Tensor, "permute", lambda self, *given: real(self, *order))
    assert difference("siglip", 24, 8) > 1


def test_rectangles_are_cut_line_by_line():
    vision = VisionConfig("siglip", 1, HIDDEN, 48, 4, 32, 8)
    module = PatchEmbedding(vision, Eager()).double()
    for weights in module.parameters():
        torch.nn.init.normal_(weights)
    pixels = torch.randn(3, 3, 16, 40, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.nn.functional.conv2d(pixels, module.weight, module.bias, stride=8)
        found = module(pixels)
    np.testing.assert_allclose(found, expected.flatten(2).transpose(1, 2), atol=1e-11)


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
@pytest.mark.parametrize("target", ["cuda", "orin-jp62"])
def test_no_graph_has_a_convolution(tmp_path, encoder, target):
    """ONNX Runtime's needs cuDNN, half a gigabyte of it."""
    checkpoint = toy.make_checkpoint(tmp_path / "toy", encoder=encoder)
    bundle = make_bundle(str(checkpoint), plan="dense", target=target, out=tmp_path)
    operators = {}
    for name, fact in bundle.manifest.graphs.items():
        graph = onnx.load(bundle.file(fact.file), load_external_data=False)
        operators[name] = {node.op_type for node in graph.graph.node}
    assert "Gemm" in operators["vision"]
    assert not any("Conv" in found for found in operators.values())
