"""Checkpoints as they are published, and as they arrive broken."""

import errno
import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from visistage.compile.checkpoint import checkpoint as module
from visistage.compile.checkpoint import known_models
from visistage.compile.checkpoint.checkpoint import open_checkpoint, open_folder
from visistage.compile.checkpoint.names import canonical, published_name, tensor_shapes
from visistage.compile.checkpoint.safetensors_file import read_header
from visistage.graphs.errors import CapacityError, ModelError
from visistage.graphs.linears import linear_groups
from visistage.tests.support.toy import make_checkpoint, make_config, make_weights

REMEDY = ("Download", "Save", "Use", "Correct", "Remove", "Name", "Try", "Check", "save_pretrained")


def opened(folder):
    return open_folder(Path(folder), name="toy", origin="toy")


def refusal(folder, *words, error=ModelError):
    """The message with which ``folder`` is refused; it names the folder and a remedy."""
    with pytest.raises(error) as caught:
        opened(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert any(remedy.lower() in message.lower() for remedy in REMEDY), message
    for word in words:
        assert word in message, message
    return message


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("toys") / "toy")


@pytest.fixture
def copy(toy, tmp_path):
    return Path(shutil.copytree(toy, tmp_path / "copy"))


# --- what is read ---------------------------------------------------------------------------------


def test_every_tensor_has_its_canonical_name_and_value(toy):
    found, expected = opened(toy), make_weights(make_config())
    wanted = tensor_shapes(found.config)
    assert list(found.tensors) == list(wanted)
    assert "vision_tower.encoder.layers.1.mlp.fc1.weight" in wanted
    assert "vision_tower.encoder.layers.2.mlp.fc1.weight" not in wanted  # feature layer -2
    for name, shape in wanted.items():
        assert found.load(name).shape == shape
        assert torch.equal(found.load(name), expected[name]), name


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
@pytest.mark.parametrize("options", [{"layout": "new"}, {"sharded": True}])
def test_layouts_and_shards_hold_the_same_model(tmp_path, options, encoder):
    one = opened(make_checkpoint(tmp_path / "one", encoder=encoder))
    other = opened(make_checkpoint(tmp_path / "other", encoder=encoder, **options))
    assert one.config == other.config
    assert list(one.tensors) == list(other.tensors)
    for name in one.tensors:
        assert torch.equal(one.load(name), other.load(name))
    assert len(other.weight_files) == (3 if "sharded" in options else 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder": "siglip", "layout": "new"},
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2", "kv_heads": 2},
        {"model_type": "qwen3", "kv_heads": 2, "head_dim": 24},
        {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
    ],
)
def test_names_are_those_of_transformers_and_its_files(tmp_path, options):
    from transformers import LlavaForConditionalGeneration

    first = make_checkpoint(tmp_path / "first", **options)
    model, report = LlavaForConditionalGeneration.from_pretrained(first, output_loading_info=True)
    assert not any(report.values()), report
    in_memory = {canonical(name): tensor for name, tensor in model.state_dict().items()}
    again = tmp_path / "again"
    model.save_pretrained(again)
    for source in (opened(first), opened(again)):
        assert set(source.tensors) <= set(in_memory)
        for name, tensor in source.state_dict().items():
            assert torch.equal(tensor, in_memory[name]), name


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("vision_tower.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_all_spellings_in_circulation_are_known(name, ours):
    assert canonical(name) == ours


@pytest.mark.parametrize("options", [{}, {"model_type": "qwen3", "head_dim": 24}])
def test_groups_of_linear_layers_have_the_shapes_of_the_modules(tmp_path, options):
    config = opened(make_checkpoint(tmp_path, **options)).config
    shapes = tensor_shapes(config)
    for group in linear_groups(config):
        for name, outputs in zip(group.linears, group.outputs, strict=True):
            assert shapes[f"{name}.weight"] == (outputs, group.inputs)


def test_published_names_are_undone(toy):
    for name in tensor_shapes(opened(toy).config, whole_encoder=True):
        assert canonical(published_name(name)) == name
    names = set(safe_open(toy / "model.safetensors", "pt").keys())
    assert names == {
        published_name(n) for n in tensor_shapes(opened(toy).config, whole_encoder=True)
    }


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")]
)
def test_every_float_type_is_mapped_as_it_is(tmp_path, dtype, stored):
    folder = make_checkpoint(tmp_path / dtype, dtype=dtype)
    found, raw = opened(folder), load_file(folder / "model.safetensors")
    assert {info.dtype for info in found.tensors.values()} == {stored}
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, raw[published_name(name)])
    assert found.file_bytes == (folder / "model.safetensors").stat().st_size


def test_infos_point_at_the_bytes(toy):
    found = opened(toy)
    data = (toy / "model.safetensors").read_bytes()
    for name, info in found.tensors.items():
        raw = bytearray(data[info.offset : info.offset + info.nbytes])
        assert torch.equal(
            torch.frombuffer(raw, dtype=torch.float32).view(info.shape), found.load(name)
        )


def test_a_tied_head_is_the_embedding(tmp_path):
    found = opened(make_checkpoint(tmp_path / "tied", tied=True))
    assert found.tensors["lm_head.weight"] == found.tensors["model.embed_tokens.weight"]


def test_a_head_in_the_file_counts_even_where_the_config_says_tied(copy):
    config = json.loads((copy / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (copy / "config.json").write_text(json.dumps(config))
    found = opened(copy)
    assert torch.equal(found.load("lm_head.weight"), make_weights(make_config())["lm_head.weight"])


def test_offsets_that_no_processor_likes_are_read_all_the_same(copy):
    file = copy / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    file.write_bytes(
        struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :]
    )
    found = opened(copy)
    assert all(info.offset % 4 for info in found.tensors.values())
    assert all(tensor.data_ptr() % 4 == 0 for tensor in found.state_dict().values())
    assert torch.equal(
        found.load("model.norm.weight"), make_weights(make_config())["model.norm.weight"]
    )


def test_old_buffers_do_no_harm_and_unknown_tensors_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, copy / "model.safetensors")
    opened(copy)
    tensors["language_model.model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(tensors, copy / "model.safetensors")
    refusal(copy, "layers.0.self_attn.q_norm.weight", "no part of the model reads")


def test_state_dict_takes_prefixes(toy):
    found = opened(toy)
    assert set(found.state_dict(("lm_head.", "model.norm."))) == {
        "lm_head.weight",
        "model.norm.weight",
    }
    assert len(found.state_dict("model.layers.0.")) == 9


def test_the_other_files_are_listed_by_name(toy):
    found = opened(toy)
    wanted = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert wanted <= set(found.files)
    assert found.json("generation_config.json")["eos_token_id"] == 2
    assert found.json("special_tokens_map.json") is None
    assert found.raw["model_type"] == "llava"


# --- toys are worth testing with ------------------------------------------------------------------


def answers(folder, lengths):
    """Greedy tokens of transformers about random picture 0, 1, ..., each of the given length."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 40, 50, *[4] * model.config.image_seq_length, 60, 70, 80]])
    out = []
    for image, length in enumerate(lengths):
        pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(image))
        tokens = model.generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
        )
        out.append(tokens[0, ids.shape[1] :].tolist())
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": True},
        {"kv_heads": 2, "layers": 8, "seed": 1, "layout": "new"},
        {"encoder": "siglip", "feature_layer": [-2, -1], "sharded": True, "dtype": "bfloat16"},
    ],
)
def test_toys_are_lively_and_look_at_the_picture(tmp_path, options):
    tokens, other = answers(make_checkpoint(tmp_path / "toy", **options), (64, 8))
    assert len(tokens) == 64
    assert len(set(tokens)) >= 20
    assert sum(a == b for a, b in zip(tokens, other, strict=False)) <= 4


def test_toys_have_a_processor(toy):
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(toy)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert text == "USER: <image>\nWhat? ASSISTANT:"
    made = processor(images=Image.new("RGB", (50, 40)), text=text, return_tensors="pt")
    assert made["pixel_values"].shape == (1, 3, 32, 32)
    assert int((made["input_ids"] == 4).sum()) == 16
    assert made["input_ids"][0, 0] == 1


# --- broken files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file of two tensors: its path and bytes."""
    file = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.float16)}, file)
    return file, file.read_bytes()


def header_survives(file, data):
    """Read ``data`` as ``file``: a ModelError that names it, or infos within its bounds."""
    file.write_bytes(data)
    try:
        infos = read_header(file)
    except ModelError as error:
        return str(error)
    for info in infos.values():
        assert 0 <= 8 <= info.offset <= info.offset + info.nbytes <= len(data)
    assert sum(info.nbytes for info in infos.values()) < len(data)
    return None


def test_every_truncation_is_noticed(small, tmp_path):
    data = small[1]
    for length in range(len(data)):
        message = header_survives(tmp_path / "cut.safetensors", data[:length])
        assert message is not None
        assert "cut.safetensors" in message
        assert "Download it again" in message


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_files_are_refused_or_harmless(small, data):
    raw = bytearray(small[1])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(("set", "insert", "delete"))):
            case "set":
                raw[at] = data.draw(st.integers(0, 255))
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
            case "delete" if len(raw) > 8:
                del raw[at : at + data.draw(st.integers(1, 4))]
    header_survives(small[0].with_name("mutated.safetensors"), bytes(raw))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(("dtype", "shape", "data_offsets", "x")),
        st.sampled_from(("F32", "F16", "I4", 7, None, True))
        | st.lists(st.integers(-2, 2**64) | st.booleans() | st.floats(), max_size=4),
    ),
    st.binary(max_size=16),
)
def test_headers_that_lie_are_refused_or_harmless(small, entry, rest):
    text = json.dumps({"a": entry}).encode()
    data = struct.pack("<Q", len(text)) + text + rest
    header_survives(small[0].with_name("lying.safetensors"), data)


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "a header longer than the file": (struct.pack("<Q", 2**62) + b"{}", "should hold a header"),
    "no header at all": (b"\x01", "8 bytes for its length"),
    "no JSON": (b"hello", "is no JSON"),
    "a list": ([], "no JSON object"),
    "deep nesting": (b"[" * 100_000, "no JSON"),
    "a key twice": (b'{"a": {}, "a": {}}', "found twice"),
    "latin-1": (b'{"\xe4": {}}', "not JSON"),
    "a missing field": ({"a": {"dtype": "F32", "shape": [2]}}, "without exactly"),
    "an unknown type": ({"a": {**A, "dtype": "F31"}}, "unknown type 'F31'"),
    "a negative size": ({"a": {**A, "shape": [-2]}}, "shape"),
    "a boolean size": ({"a": {**A, "shape": [True]}}, "shape"),
    "a wrong length": ({"a": {**A, "data_offsets": [0, 4]}}, "bytes [0, 4] for F32 [2]"),
    "offsets beyond the end": ({"a": {**A, "data_offsets": [8, 16]}}, "gap before 'a'"),
    "an overlap": ({"a": A, "b": {**A, "data_offsets": [4, 12]}}, "overlapping"),
    "too few bytes": ({"a": {**A, "shape": [4], "data_offsets": [0, 16]}}, "speaks of"),
    "too many bytes": ({"a": {**A, "shape": [1], "data_offsets": [0, 4]}}, "speaks of"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_told_apart(tmp_path, name):
    header, word = LIES[name]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = text if name in ("a header longer than the file", "no header at all") else None
    file = tmp_path / "lie.safetensors"
    message = header_survives(file, data or struct.pack("<Q", len(text)) + text + bytes(8))
    assert message is not None
    assert str(file) in message
    assert word in message


def test_a_truncated_checkpoint_is_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refusal(copy, "model.safetensors", "incomplete")


# --- folders that do not add up -------------------------------------------------------------------


def test_folders_without_weights(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refusal(copy, "pytorch_model.bin", "pickle", "save_pretrained")
    (copy / "pytorch_model.bin").unlink()
    refusal(copy, "no weights", "--dummy-weights")
    (copy / "config.json").unlink()
    refusal(copy, "no config.json")


@pytest.mark.parametrize(
    ("content", "word"), [("{", "not JSON"), ("[]", "no JSON object"), (b"\xff\xfe", "not JSON")]
)
def test_a_damaged_config(copy, content, word):
    data = content if isinstance(content, bytes) else content.encode()
    (copy / "config.json").write_bytes(data)
    refusal(copy, "config.json", word)


def test_an_unsupported_config_names_the_folder(copy):
    (copy / "config.json").write_text(json.dumps(make_config(hidden_act="gelu")))
    refusal(copy, "hidden_act")


def test_missing_and_misshapen_tensors_are_named(copy):
    tensors = load_file(copy / "model.safetensors")
    lost = "language_model.model.layers.2.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, copy / "model.safetensors")
    refusal(copy, "lacks model.layers.2.mlp.up_proj.weight", "config.json")
    decoder = {k: v for k, v in tensors.items() if "layers.2" not in k}
    save_file(decoder, copy / "model.safetensors")
    refusal(copy, "and 6 more tensors")
    save_file(tensors | {lost: torch.ones(128, 63)}, copy / "model.safetensors")
    refusal(copy, "up_proj.weight with shape [128, 63]", "[128, 64]")


def test_an_untied_model_needs_its_head(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, copy / "model.safetensors")
    refusal(copy, "lacks lm_head.weight")


def test_one_tensor_under_two_names_is_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(300, 64)
    save_file(tensors, copy / "model.safetensors")
    refusal(copy, "twice", "language_model.lm_head.weight")


def test_quantised_weights_are_refused_by_name(copy):
    tensors = load_file(copy / "model.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: torch.ones(128, 64).to(torch.int8)}, copy / "model.safetensors")
    refusal(copy, "quantised", "I8")
    save_file(tensors | {name: torch.ones(128, 64).double()}, copy / "model.safetensors")
    refusal(copy, "F64", "F32, F16, BF16")
    packed = {k: v for k, v in tensors.items() if k != name}
    packed[name.replace("weight", "qweight")] = torch.ones(8, 64, dtype=torch.int32)
    save_file(packed, copy / "model.safetensors")
    refusal(copy, "quantised", "qweight")
    config = make_config() | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (copy / "config.json").write_text(json.dumps(config))
    refusal(copy, "config.json", "bitsandbytes")


@pytest.fixture
def sharded(tmp_path):
    folder = make_checkpoint(tmp_path / "sharded", sharded=True)
    index = folder / "model.safetensors.index.json"
    return folder, index, json.loads(index.read_text())


def test_a_missing_shard(sharded):
    folder, index, _ = sharded
    (folder / "model-00002-of-00003.safetensors").unlink()
    refusal(folder, "model-00002-of-00003.safetensors, which is not there")
    index.unlink()
    refusal(folder, "2 safetensors files but no model.safetensors.index.json")


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/etc/passwd", "a/b", "..", "", 5, "a\\b"]
)
def test_an_index_that_leaves_the_folder(sharded, place):
    folder, index, data = sharded
    save_file({"x": torch.ones(1)}, folder.parent / "outside.safetensors")
    data["weight_map"]["language_model.model.norm.weight"] = place
    index.write_text(json.dumps(data))
    refusal(folder, repr(place) if place != ".." else "..")


def test_an_index_of_another_checkpoint(sharded):
    folder, index, data = sharded
    data["weight_map"]["language_model.extra"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(data))
    refusal(folder, "language_model.extra", "does not hold it")
    for content in ("{", "{}", '{"weight_map": []}'):
        index.write_text(content)
        refusal(folder, "index.json")


# --- names ----------------------------------------------------------------------------------------


def test_a_folder_is_opened_by_its_name(toy, monkeypatch):
    monkeypatch.chdir(toy)
    assert open_checkpoint(str(toy)).name == open_checkpoint(".").name == "toy"
    assert str(toy) not in open_checkpoint(".").origin


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("lava-7b", "Did you mean 'llava-7b'?"),
        ("llava7b", "Did you mean 'llava-7b'?"),
        ("nothing-like-it", "qwen2.5-vl-7b, demo"),
        ("", "one of llava-7b"),
        ("a/b/c", "neither a folder"),
        ("org/..", "neither a folder"),
        ("llava-45m", "--dummy-weights"),
    ],
)
def test_unknown_names(name, word, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ModelError) as caught:
        open_checkpoint(name)
    assert word in str(caught.value)


def test_a_file_is_no_folder(toy):
    with pytest.raises(ModelError, match="is a file, expected a checkpoint folder"):
        open_checkpoint(str(toy / "config.json"))


def test_revisions_belong_to_the_hub(toy):
    for name, dummy in ((str(toy), False), ("demo", False), ("llava-45m", True)):
        with pytest.raises(ModelError, match="no revisions"):
            open_checkpoint(name, revision="main", dummy_weights=dummy)


def test_the_demo_lies_in_the_package(toy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "package"
    place = package / "compile" / "checkpoint" / "known_models.py"
    monkeypatch.setattr(known_models, "__file__", str(place))
    with pytest.raises(ModelError, match=r"lacks the demo model.*llava-7b"):
        open_checkpoint("demo")
    shutil.copytree(toy, package / "demo" / "model")
    (tmp_path / "demo").mkdir()  # a folder of that name is not meant
    assert open_checkpoint("demo").name == "demo"


@pytest.mark.parametrize(
    "use", [open_checkpoint, known_models.model_config], ids=["open", "only its sizes"]
)
def test_the_larger_demo_lies_in_the_repository_alone(use, monkeypatch, tmp_path):
    place = tmp_path / "compile" / "checkpoint" / "known_models.py"
    monkeypatch.setattr(known_models, "__file__", str(place))
    with pytest.raises(ModelError, match=r"no model demo-576.*source repository.*clone.*: demo$"):
        use("demo-576")


# --- the hub --------------------------------------------------------------------------------------


class Hub:
    """A stand-in for ``huggingface_hub.snapshot_download``."""

    def __init__(self, folder=None, needed=0, error=None):
        self.folder, self.needed, self.error, self.calls = folder, needed, error, []

    def __call__(self, repository, **options):
        self.calls.append((repository, options))
        if self.error is not None:
            raise self.error
        if options.get("dry_run"):
            return [
                SimpleNamespace(file_size=self.needed, will_download=True),
                SimpleNamespace(file_size=2**60, will_download=False),
            ]
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    def install(**options):
        stand_in = Hub(**options)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
        return stand_in

    return install


def test_aliases_are_downloaded_without_pickles(hub, toy, tmp_path):
    snapshot = Path(shutil.copytree(toy, tmp_path / "0123abc"))
    stand_in = hub(folder=snapshot, needed=10)
    found = open_checkpoint("llava-13b", revision="main")
    assert (found.name, found.origin) == ("llava-13b", "llava-hf/llava-1.5-13b-hf@0123abc")
    assert open_checkpoint("org/some-model").name == "some-model"
    repository, options = stand_in.calls[1]
    assert (repository, options["revision"]) == ("llava-hf/llava-1.5-13b-hf", "main")
    from fnmatch import fnmatch

    def wanted(name):
        return any(fnmatch(name, p) for p in options["allow_patterns"]) and not any(
            fnmatch(name, p) for p in options["ignore_patterns"]
        )

    needed = ("model-00001-of-00003.safetensors", "model.safetensors.index.json", "tokenizer.model")
    assert all(map(wanted, (*needed, "config.json", "chat_template.jinja", "tokenizer.json")))
    unwanted = ("pytorch_model.bin", "model.py", "a.pkl", "onnx/model.safetensors", "README.md")
    assert not any(map(wanted, unwanted))


def test_room_is_asked_for_before_the_download(hub, toy):
    stand_in = hub(folder=toy, needed=2**60)
    with pytest.raises(CapacityError, match=r"llava-1.5-7b-hf needs .* GiB.*free.*HF_HOME"):
        open_checkpoint("llava-7b")
    assert len(stand_in.calls) == 1


def test_offline_asks_nobody(hub, toy):
    stand_in = hub(folder=toy)
    open_checkpoint("llava-7b", offline=True)
    assert [call[1]["local_files_only"] for call in stand_in.calls] == [True]


def hub_errors():
    import httpx2
    from huggingface_hub import errors

    response = httpx2.Response(401, request=httpx2.Request("GET", "https://hub.invalid"))
    return {
        "gated": (errors.GatedRepoError("x", response=response), "hf auth login"),
        "absent": (errors.RepositoryNotFoundError("x", response=response), "Check the name"),
        "revision": (errors.RevisionNotFoundError("x", response=response), "no revision 'v9'"),
        "uncached": (errors.LocalEntryNotFoundError("x"), "--dummy-weights"),
        "broken off": (httpx2.ReadTimeout("it took\nlong"), "ReadTimeout: it took. Try again"),
        "http": (errors.HfHubHTTPError("500", response=response), "--offline"),
        "odd name": (errors.HFValidationError("bad id"), "bad id"),
        "full disk": (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    }


@pytest.mark.parametrize(
    "name",
    ["gated", "absent", "revision", "uncached", "broken off", "http", "odd name", "full disk"],
)
def test_what_the_hub_says_becomes_one_clear_message(hub, name):
    pytest.importorskip("httpx2", reason="the hub's client library of huggingface_hub 2")
    error, word = hub_errors()[name]
    hub(error=error)
    with pytest.raises(ModelError) as caught:
        open_checkpoint("llava-7b", revision="v9")
    assert "llava-hf/llava-1.5-7b-hf" in str(caught.value)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hubs_own_cache_is_found_offline(toy, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"\(offline\).*Run once without --offline.*\./"):
        open_checkpoint("org/toy", offline=True)
    sha = "0123456789012345678901234567890123456789"
    folder = tmp_path / "models--org--toy"
    snapshot = folder / "snapshots" / sha
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for number, file in enumerate(toy.iterdir()):  # the cache holds links
        shutil.copy(file, folder / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(sha)
    found = open_checkpoint("org/toy", offline=True)
    assert found.origin == f"org/toy@{sha}"
    assert {info.file.name for info in found.tensors.values()} == {"model.safetensors"}
    assert torch.equal(found.load("model.norm.weight"), opened(toy).load("model.norm.weight"))
