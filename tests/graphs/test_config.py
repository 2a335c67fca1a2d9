"""The reader of config.json against transformers' own classes, and against damage."""

import copy
import dataclasses
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from visistage.graphs.config import ModelConfig
from visistage.graphs.errors import ModelError
from visistage.graphs.families.registry import with_budget
from visistage.graphs.text_config import DECODERS, Rope, TextConfig
from visistage.graphs.vision_config import VisionConfig
from visistage.tests.support.toy import make_config

PUBLISHED = {  # llava-hf/llava-1.5-7b-hf
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


def changed(data, path, value):
    """``data`` with the value at ``a.b`` replaced, or removed where value is ``...``."""
    data = copy.deepcopy(data)
    *holders, last = path.split(".")
    place = data
    for key in holders:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


# --- what published files say ---------------------------------------------------------------------


def test_published_llava_reads_through_its_omissions():
    config = ModelConfig.from_hf(PUBLISHED)
    text = config.text
    assert (text.layers, text.hidden, text.intermediate) == (32, 4096, 11008)
    assert (text.heads, text.kv_heads, text.head_dim, text.vocab) == (32, 32, 128, 32064)
    assert (text.rms_eps, text.max_positions) == (1e-5, 4096)
    assert text.rope == Rope("default", 10000.0)
    assert not any((text.tied, text.attention_bias, text.output_bias, text.mlp_bias))
    assert (config.vision.kind, config.vision.patches, config.vision.tokens) == ("clip", 576, 577)
    assert (config.visual_tokens, config.image_token_id, config.feature_layers) == (
        576,
        32000,
        (-2,),
    )


def test_an_empty_llava_has_the_encoder_of_llava_1_5():
    config = ModelConfig.from_hf({"model_type": "llava", "text_config": {"vocab_size": 32064}})
    assert config.vision == ModelConfig.from_hf(PUBLISHED).vision


@pytest.mark.parametrize("family", [*DECODERS])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"hidden_size": 512, "num_attention_heads": 64},
        {"num_attention_heads": 16, "num_key_value_heads": None},
    ],
)
def test_decoder_defaults_are_those_of_transformers(family, given):
    from transformers import AutoConfig

    if family == "mistral" and None in given.values():
        pytest.skip("transformers refuses null there")
    if DECODERS[family].axes == "chunked" and given:
        pytest.skip("heads of another width need sections of their own")
    data = {**given, "sliding_window": None}
    theirs = AutoConfig.for_model(family, **data)
    ours = TextConfig.from_hf({"model_type": family, **data})
    pairs = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "intermediate": "intermediate_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "vocab": "vocab_size",
        "rms_eps": "rms_norm_eps",
        "max_positions": "max_position_embeddings",
        "tied": "tie_word_embeddings",
        "activation": "hidden_act",
    }
    for mine, name in pairs.items():
        if name != "tie_word_embeddings" or hasattr(theirs, name):
            assert getattr(ours, mine) == getattr(theirs, name), name
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == width
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (ours.attention_bias, ours.output_bias) == (family.startswith("qwen2"), False)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_tensors_of_a_decoder_are_those_of_transformers(family):
    from transformers import AutoConfig, AutoModelForCausalLM
    from visistage.compile.checkpoint.names import decoder_shapes

    data = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    }  # fmt: skip
    if family == "qwen2":
        data["head_dim"] = 12
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **data))
    ours = decoder_shapes(TextConfig.from_hf({"model_type": family, **data}))
    assert ours == {name: tuple(p.shape) for name, p in theirs.named_parameters()}


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("qwen3_vl_text", [24, 20, 20]),
        ("qwen2_vl_text", [16, 24, 24]),
        ("qwen3_vl_text", [4, 2, 2]),
    ],
)
def test_each_frequency_reads_the_axis_that_transformers_has_for_it(family, sections):
    import torch
    from transformers.models.qwen2_vl import modeling_qwen2_vl as chunked
    from transformers.models.qwen3_vl import modeling_qwen3_vl as interleaved

    width = 2 * sum(sections)
    data = {
        "model_type": family, "head_dim": width, "hidden_size": 2 * width,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": sections, "mrope_interleaved": True},
    }  # fmt: skip
    rope = TextConfig.from_hf(data).rope
    at = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, sum(sections))
    module = interleaved if family == "qwen3_vl_text" else chunked
    name = "Qwen3VLTextRotaryEmbedding" if module is interleaved else "Qwen2VLRotaryEmbedding"
    theirs = getattr(module, name).__new__(getattr(module, name))
    torch.nn.Module.__init__(theirs)
    theirs.mrope_section = sections
    wanted = theirs.recomposition_frequencies(at.clone())[0, 0, : sum(sections)]
    assert rope.axis == tuple(wanted.int().tolist())
    assert rope.axes == 3
    assert Rope.from_dict(rope.to_dict()) == rope


def test_sections_of_a_rope_must_fill_a_head():
    data = {"model_type": "qwen3_vl_text", "head_dim": 16}
    with pytest.raises(ModelError, match=r"mrope_section is .24, 20, 20., expected a sum of 8"):
        TextConfig.from_hf(data)


@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model"])
def test_encoder_defaults_are_those_of_transformers(family):
    from transformers import AutoConfig

    theirs, ours = AutoConfig.for_model(family), VisionConfig.from_hf({"model_type": family})
    assert (ours.layers, ours.hidden) == (theirs.num_hidden_layers, theirs.hidden_size)
    assert (ours.intermediate, ours.heads) == (theirs.intermediate_size, theirs.num_attention_heads)
    assert (ours.image_size, ours.patch_size) == (theirs.image_size, theirs.patch_size)
    assert (ours.eps, ours.activation) == (theirs.layer_norm_eps, theirs.hidden_act)
    assert ours.channels == theirs.num_channels


def test_what_transformers_writes_is_read_back():
    from transformers import LlavaConfig

    ours = ModelConfig.from_hf(make_config(kv_heads=2))
    theirs = LlavaConfig(**make_config(kv_heads=2)).to_dict()
    assert ModelConfig.from_hf(theirs) == ours


def test_llama_biases_reach_the_output_projection_and_qwen2_does_not():
    llama = TextConfig.from_hf({"attention_bias": True, "mlp_bias": True})
    assert (llama.attention_bias, llama.output_bias, llama.mlp_bias) == (True, True, True)


def test_tied_is_read_in_either_place():
    for path in ("tie_word_embeddings", "text_config.tie_word_embeddings"):
        assert ModelConfig.from_hf(changed(PUBLISHED, path, True)).text.tied


# --- visual tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "select", "tokens"),
    [
        ("clip", "default", 16),
        ("clip", "full", 17),
        ("siglip", "full", 16),
        ("siglip", "default", 15),
    ],
)
def test_visual_tokens_are_counted_as_transformers_does(encoder, select, tokens):
    import torch
    from transformers import LlavaConfig, LlavaModel

    data = make_config(layers=1, encoder=encoder, select=select)
    assert ModelConfig.from_hf(data).visual_tokens == tokens
    features = LlavaModel(LlavaConfig(**data)).get_image_features(torch.zeros(1, 3, 32, 32))
    assert features.pooler_output[0].shape[0] == tokens


def test_a_border_that_fills_no_patch_is_cut():
    vision = VisionConfig.from_hf(
        {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}
    )
    assert vision.patches == 27 * 27


def test_image_seq_length_must_agree_unless_it_is_the_class_default():
    assert ModelConfig.from_hf(changed(make_config(), "image_seq_length", 576)).visual_tokens == 16
    with pytest.raises(ModelError, match=r"image_seq_length is 17, expected 16.*config\.json"):
        ModelConfig.from_hf(changed(make_config(), "image_seq_length", 17))


# --- rope -----------------------------------------------------------------------------------------

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        ),
    ],
)
def test_both_spellings_of_rope_are_one(old, new):
    four, five = TextConfig.from_hf(old), TextConfig.from_hf({"rope_parameters": new})
    assert four == five
    assert "rope_theta" not in dict(five.rope.parameters)
    assert hash(five) == hash(four)


def test_yarn_falls_back_to_the_models_length():
    text = TextConfig.from_hf(
        {"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 4}}
    )
    assert dict(text.rope.parameters)["original_max_position_embeddings"] == 512


@pytest.mark.parametrize("kind", ["longrope", "su"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_ropes_that_depend_on_the_length_are_refused_with_a_reason(kind, key):
    with pytest.raises(ModelError, match=rf"{kind}.*length.*cache.*Supported are default"):
        TextConfig.from_hf({"rope_scaling": {key: kind, "factor": 2.0}})


# --- refusals -------------------------------------------------------------------------------------

WRONG = [
    ("text_config.model_type", "gemma2", "gemma2.*llama, mistral, qwen2"),
    ("text_config.model_type", ["llama"], "model_type"),
    ("text_config.hidden_act", "gelu", "hidden_act is 'gelu', expected silu"),
    ("text_config.hidden_size", "4096", "hidden_size is '4096', expected an integer"),
    ("text_config.hidden_size", -64, "hidden_size is -64"),
    ("text_config.hidden_size", 64.0, "hidden_size is 64.0"),
    ("text_config.hidden_size", 10**5000, "hidden_size is a huge int"),
    ("text_config.num_hidden_layers", 0, "num_hidden_layers is 0"),
    ("text_config.num_hidden_layers", True, "num_hidden_layers is True"),
    ("text_config.num_hidden_layers", 10**6, "num_hidden_layers is 1000000"),
    ("text_config.num_attention_heads", 3, "num_attention_heads is 3.*hidden_size=64"),
    ("text_config.num_attention_heads", 0, "num_attention_heads is 0"),
    ("text_config.num_key_value_heads", 3, "num_key_value_heads is 3.*num_attention_heads=4"),
    ("text_config.head_dim", 15, "head_dim is 15, expected an even"),
    ("text_config.rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
    ("text_config.rms_norm_eps", "1e-5", "rms_norm_eps"),
    ("text_config.tie_word_embeddings", "no", "tie_word_embeddings is 'no'"),
    ("text_config.attention_bias", 1, "attention_bias is 1"),
    ("text_config.rope_parameters", 3, "rope_parameters is 3"),
    ("text_config.rope_parameters", {"rope_type": "spiral"}, "rope_type is 'spiral'"),
    ("text_config.rope_parameters", {"rope_type": "linear"}, "factor is None"),
    ("text_config.rope_parameters", {"beta_fast": [1]}, "beta_fast is"),
    ("text_config.rope_parameters", {"rope_theta": -1}, "rope_theta is -1"),
    (
        "text_config.rope_parameters",
        {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0},
        "low_freq_factor",
    ),
    ("text_config.rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("text_config", [], "text_config is"),
    ("vision_config", "clip", "vision_config is 'clip'"),
    ("vision_config.model_type", "pixtral", "pixtral.*clip_vision_model and siglip_vision_model"),
    ("vision_config.num_attention_heads", 5, "vision_config.num_attention_heads is 5"),
    ("vision_config.image_size", [32, 48], "square"),
    ("vision_config.patch_size", 64, "vision_config.patch_size is 64"),
    ("vision_config.hidden_act", "tanh", "vision_config.hidden_act is 'tanh'"),
    ("projector_hidden_act", "mystery", "projector_hidden_act"),
    ("multimodal_projector_bias", 0, "multimodal_projector_bias"),
    ("vision_feature_layer", 9, "vision_feature_layer is 9, expected an integer from -4 to 3"),
    ("vision_feature_layer", [], "vision_feature_layer"),
    ("vision_feature_layer", [-2, "x"], "vision_feature_layer is 'x'"),
    ("vision_feature_layer", True, "vision_feature_layer is True"),
    ("vision_feature_select_strategy", "cls", "vision_feature_select_strategy is 'cls'"),
    ("image_token_index", 300, "image_token_index is 300, expected an integer from 0 to 299"),
    ("image_token_id", 7, "image_token_id is 7, expected image_token_index=4"),
    ("architectures", ["LlavaNextForConditionalGeneration"], "LlavaNext.*Supported: LlavaFor"),
    ("architectures", ["LlavaLlamaForCausalLM"], "original LLaVA format"),
    ("architectures", 5, "architectures is 5"),
    ("model_type", "qwen2_vl", "qwen2_vl.*Supported: LlavaFor.*llama, mistral, qwen2"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG, ids=[row[2][:40] for row in WRONG])
def test_what_is_malformed_is_refused_by_its_field(path, value, message):
    with pytest.raises(ModelError, match=f"(?s){message}"):
        ModelConfig.from_hf(changed(make_config(), path, value))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("paligemma", "see the question"),
        ("gemma3", "sliding windows"),
        ("phi4_multimodal", "rope changes"),
        ("qwen3_5", "running state"),
        ("minicpmv4_6", "running state"),
        ("fast_vlm", "convolutional encoder"),
        ("internvl_chat", "ends in -hf"),
    ],
)
def test_other_families_are_refused_by_name_with_a_reason(kind, reason):
    with pytest.raises(ModelError, match=f"{kind}.*{reason}.*Supported: LlavaFor"):
        ModelConfig.from_hf({"model_type": kind})


def test_an_image_of_llava_has_one_layout_and_no_budget():
    config = ModelConfig.from_hf(PUBLISHED)
    layouts = [config.layout(*size) for size in ((336, 336), (1080, 1920), (1, 900))]
    assert layouts[0] == layouts[1] == layouts[2]
    (layout, *_) = layouts
    assert (layout.rows, layout.runs, layout.advance) == (576, (576,), (576,))
    assert layout.positions[:, 0].tolist() == list(range(576))
    assert with_budget(config, None) == config
    with pytest.raises(ModelError, match=r"576 tokens.*Leave out --image-tokens.*keep=64"):
        with_budget(config, 300)


def test_sliding_windows_are_refused():
    with pytest.raises(ModelError, match="sliding_window is 4096, expected null"):
        TextConfig.from_hf({"model_type": "mistral"})
    with pytest.raises(ModelError, match="sliding_window is 128"):
        TextConfig.from_hf(
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128}
        )
    with pytest.raises(ModelError, match="layer_types"):
        TextConfig.from_hf({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32})
    TextConfig.from_hf({"model_type": "qwen2", "sliding_window": 128})


PATHS = sorted(
    [key for key in make_config() if not isinstance(make_config()[key], dict)]
    + [f"{part}.{key}" for part in ("text_config", "vision_config") for key in make_config()[part]]
    + ["text_config", "vision_config", "text_config.rope_parameters.rope_type"]
    + [
        "text_config.rope_parameters.rope_theta",
        "text_config.rope_scaling",
        "text_config.layer_types",
    ]
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), JUNK)
@example("text_config.rope_scaling", {"rope_type": "linear", "factor": 2.0, "other": float("nan")})
def test_junk_is_a_model_error_or_a_config(path, value):
    try:
        config = ModelConfig.from_hf(changed(make_config(), path, value))
    except ModelError:
        return
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# --- the manifest's form --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder": "siglip", "tied": True, "kv_heads": 2, "feature_layer": [-3, -2]},
        {"rope": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"model_type": "qwen2"},
    ],
)
def test_round_trip_is_exact(options):
    config = ModelConfig.from_hf(make_config(**options))
    text = json.dumps(config.to_dict())
    assert ModelConfig.from_dict(json.loads(text)) == config
    assert json.dumps(ModelConfig.from_dict(json.loads(text)).to_dict()) == text


@pytest.mark.parametrize("part", ["", "text", "vision", "text.rope"])
def test_the_strict_form_takes_neither_more_nor_less(part):
    data = ModelConfig.from_hf(make_config()).to_dict()
    place = data
    for key in filter(None, part.split(".")):
        place = place[key]
    field = next(iter(place))
    spoiled = changed(data, f"{part}.extra" if part else "extra", 1)
    with pytest.raises(ModelError, match="extra: found an unknown key"):
        ModelConfig.from_dict(spoiled)
    with pytest.raises(ModelError, match=f"{field}: found nothing"):
        ModelConfig.from_dict(changed(data, f"{part}.{field}" if part else field, ...))


STRICT = [
    f"{part}{field.name}"
    for part, cls in (("", ModelConfig), ("text.", TextConfig), ("vision.", VisionConfig))
    for field in dataclasses.fields(cls)
] + [f"text.rope.{field.name}" for field in dataclasses.fields(Rope)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(STRICT), JUNK)
def test_a_damaged_manifest_is_a_model_error_or_a_config(path, value):
    data = changed(ModelConfig.from_hf(make_config()).to_dict(), path, value)
    try:
        config = ModelConfig.from_dict(data)
    except ModelError:
        return
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_reading_a_config_needs_the_standard_library_only():
    import subprocess
    import sys

    heavy = "torch", "numpy", "transformers", "onnx"
    code = (
        "import sys, visistage.graphs.config; "
        f"assert not [m for m in {heavy} if m in sys.modules], sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
