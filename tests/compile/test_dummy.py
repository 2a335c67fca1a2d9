"""Dummy checkpoints: published shapes, finite numbers, equal bytes, all or nothing."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForImageTextToText
from visistage.compile import disk
from visistage.compile.checkpoint import dummy
from visistage.compile.checkpoint.checkpoint import open_checkpoint, open_folder
from visistage.compile.checkpoint.dummy import make_dummy
from visistage.compile.checkpoint.dummy_tokenizer import SYSTEM, write_text_files
from visistage.compile.checkpoint.known_models import ALIASES, KNOWN_MODELS, KnownModel
from visistage.compile.checkpoint.names import published_name, tensor_shapes
from visistage.graphs.config import ModelConfig
from visistage.graphs.errors import CapacityError, ModelError
from visistage.tests.support.toy import SPECIALS, make_config

PARAMETERS = {"llava-7b": 7_063_427_072, "llava-13b": 13_351_494_656, "llava-45m": 44_606_208}


@pytest.fixture
def tiny(monkeypatch):
    """A geometry of some 200,000 parameters, and a block that wraps around in it."""
    known_model = KnownModel(make_config(), SPECIALS, "for tests")
    monkeypatch.setattr(dummy, "KNOWN_MODELS", {"tiny": known_model})
    monkeypatch.setattr(dummy, "RANDOM_BLOCK", 10_007)
    return "tiny"


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --- facts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_geometries_have_the_published_size(name):
    config = ModelConfig.from_hf(KNOWN_MODELS[name].config)
    shapes = tensor_shapes(config, whole_encoder=True)
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[name]
    assert config.visual_tokens == 576
    assert (config.vision.image_size, config.vision.patch_size) == (336, 14)
    specials = KNOWN_MODELS[name].specials
    assert specials["<image>"] == config.image_token_id
    assert specials["<pad>"] == KNOWN_MODELS[name].config["pad_token_id"]


@pytest.mark.parametrize("name", [name for name in KNOWN_MODELS if name != "llava-45m"])
def test_geometries_are_those_of_transformers(name):
    """As many numbers as the class that their repository names; published sizes by name."""
    given = dict(KNOWN_MODELS[name].config)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    read = ModelConfig.from_hf(KNOWN_MODELS[name].config)
    ours = tensor_shapes(read, whole_encoder=True)
    if read.text.tied:
        del ours["lm_head.weight"]
    counted = sum(map(math.prod, ours.values()))
    assert counted == sum(p.numel() for p in model.parameters())
    size = re.search(r"(?<![.\d])(\d+)b$", name)  # smaller ones are named by their decoder
    if size and name in ALIASES:
        assert counted / 1e9 == pytest.approx(int(size[1]), rel=0.3)


def test_the_system_prompt_has_about_as_many_tokens_as_with_the_real_tokenizer(tmp_path):
    from transformers import AutoProcessor

    known_model = KNOWN_MODELS["llava-7b"]
    (tmp_path / "config.json").write_text(json.dumps(dict(known_model.config)))
    write_text_files(
        tmp_path, ModelConfig.from_hf(known_model.config), known_model.specials, system=SYSTEM
    )
    processor = AutoProcessor.from_pretrained(tmp_path)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert text == f"{SYSTEM} USER: <image>\nWho? ASSISTANT:"
    image = torch.zeros(3, 400, 300, dtype=torch.uint8)
    made = processor(images=image, text=text, return_tensors="pt")
    ids = made["input_ids"][0].tolist()
    assert made["pixel_values"].shape == (1, 3, 336, 336)
    assert ids.count(32000) == 576
    assert 32 <= ids.index(32000) <= 36  # 35 with the real one
    assert max(ids) < 32064
    assert processor.decode([20000, 20001]).split() == ["w20000", "w20001"]


# --- weights --------------------------------------------------------------------------------------


def test_the_small_one_runs_in_transformers_and_is_lively(tmp_path):
    from transformers import LlavaForConditionalGeneration

    told = []
    opened = open_checkpoint("llava-45m", dummy_weights=True, cache=tmp_path, progress=told.append)
    assert opened.name == "llava-45m-dummy"
    assert str(tmp_path) not in opened.origin
    assert sum(told) == 2 * PARAMETERS["llava-45m"]
    model, report = LlavaForConditionalGeneration.from_pretrained(
        opened.path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = torch.tensor([[1, 40, 50, *[3] * 576, 60, 70, 80]])
    out = model.eval().generate(
        input_ids=ids,
        pixel_values=torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0)),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
    )
    assert len(set(out[0, ids.shape[1] :].tolist())) >= 20


def test_values_stay_far_from_the_end_of_fp16_in_a_deep_decoder(tmp_path, monkeypatch):
    from transformers import LlavaForConditionalGeneration

    known_model = KnownModel(make_config(layers=32, hidden=128, intermediate=344), SPECIALS, "deep")
    monkeypatch.setattr(dummy, "KNOWN_MODELS", {"deep": known_model})
    folder = make_dummy("deep", tmp_path / "deep")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float16).eval()
    largest = []
    for layer in model.model.language_model.layers:
        for part in (layer, layer.self_attn, layer.mlp, layer.mlp.down_proj):
            part.register_forward_hook(
                lambda _m, ins, out: largest.extend(
                    float(x.abs().max())
                    for x in (*ins, *(out if isinstance(out, tuple) else (out,)))
                    if isinstance(x, torch.Tensor)
                )
            )
    ids = torch.tensor([[1, 40, *[4] * 16, 60, 70]])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32).half()).logits
    assert torch.isfinite(logits).all()
    assert len(largest) >= 32 * 4
    assert max(largest) < 1000  # of 65504


def test_rows_differ_and_tensors_differ(tiny, tmp_path):
    opened = open_folder(make_dummy(tiny, tmp_path / "a"), name="a", origin="a")
    matrix = opened.load("model.embed_tokens.weight")
    assert len(torch.unique(matrix, dim=0)) == len(matrix)
    assert 0.4 < matrix.float().std() < 0.6
    first, second = (opened.load(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(opened.load("model.norm.weight"), torch.ones(64).half())
    assert not opened.load("multi_modal_projector.linear_1.bias").any()


# --- bytes ----------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_bytes(tiny, tmp_path):
    one, two = (contents(make_dummy(tiny, tmp_path / n)) for n in ("one", "two"))
    assert one == two
    other = contents(make_dummy(tiny, tmp_path / "other", seed=1))
    assert other["model.safetensors"] != one["model.safetensors"]
    assert other["tokenizer.json"] == one["tokenizer.json"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_hold_the_same_numbers(tiny, tmp_path, dtype):
    name = "model.layers.3.self_attn.q_proj.weight"
    exact = open_folder(make_dummy(tiny, tmp_path / "x", dtype="float32"), name="x", origin="x")
    other = open_folder(make_dummy(tiny, tmp_path / dtype, dtype=dtype), name="x", origin="x")
    assert torch.equal(exact.load(name).to(getattr(torch, dtype)), other.load(name))


def test_shards_hold_the_same_numbers(tiny, tmp_path, monkeypatch):
    whole = open_folder(make_dummy(tiny, tmp_path / "whole"), name="x", origin="x")
    monkeypatch.setattr(dummy, "SHARD_BYTES", 100_000)
    split = open_folder(make_dummy(tiny, tmp_path / "split"), name="x", origin="x")
    files = sorted(file.name for file in split.path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((split.path / file).stat().st_size < 120_000 for file in files)
    assert list(whole.tensors) == list(split.tensors)
    for name in whole.tensors:
        assert torch.equal(whole.load(name), split.load(name))


def test_shards_of_the_published_sizes():
    shapes = tensor_shapes(
        ModelConfig.from_hf(KNOWN_MODELS["llava-13b"].config), whole_encoder=True
    )
    shards = dummy.split_shards(shapes, "float16")
    assert [name for names in shards for name in names] == list(shapes)
    sizes = [sum(2 * math.prod(shapes[name]) for name in names) for names in shards]
    assert max(sizes) <= dummy.SHARD_BYTES
    assert len(sizes) == 7
    header = dummy.shard_header({name: shapes[name] for name in shards[0]}, "float16")
    assert len(header) % 8 == 0
    entries = json.loads(header[8:])
    assert entries[published_name(shards[0][-1])]["data_offsets"][1] == sizes[0]


# --- all or nothing -------------------------------------------------------------------------------


def test_a_second_call_finds_it(tiny, tmp_path):
    folder = make_dummy(tiny, tmp_path / "a")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert make_dummy(tiny, folder, progress=lambda _: pytest.fail("wrote")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    for change in ({"seed": 1}, {"dtype": "float32"}):
        with pytest.raises(ModelError, match=r"is not the dummy checkpoint.*Remove it"):
            make_dummy(tiny, folder, **change)


def test_what_is_no_longer_whole_is_not_taken_for_it(tiny, tmp_path):
    folder = make_dummy(tiny, tmp_path / "a")
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"!")
    with pytest.raises(ModelError, match="Remove it"):
        make_dummy(tiny, folder)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "dummy.json").write_text("[]")
    with pytest.raises(ModelError, match="Remove it"):
        make_dummy(tiny, folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(tiny, tmp_path, error):
    def stop(nbytes):
        raise error

    with pytest.raises(error):
        make_dummy(tiny, tmp_path / "a", progress=stop)
    assert list(tmp_path.iterdir()) == []
    make_dummy(tiny, tmp_path / "a")


def test_what_a_killed_run_left_is_cleared(tiny, tmp_path):
    left = tmp_path / "a.partial"
    left.mkdir()
    (left / "model-00007-of-00009.safetensors").write_bytes(b"half")
    assert "model-00007-of-00009.safetensors" not in contents(make_dummy(tiny, tmp_path / "a"))
    assert not left.exists()


def test_two_runs_do_not_mix(tiny, tmp_path):
    partial = tmp_path / "a.partial"
    partial.mkdir()
    held = FileLock(partial / ".lock")
    with held, pytest.raises(CapacityError, match="another run is making"):
        make_dummy(tiny, tmp_path / "a")
    assert partial.exists()


def test_room_is_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * 2**30))
    with pytest.raises(CapacityError, match=r"llava-7b needs 13\.2 GiB .* 10\.0 GiB are free"):
        open_checkpoint("llava-hf/llava-1.5-7b-hf", dummy_weights=True, cache=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_said_so(tiny, tmp_path):
    def full(nbytes):
        raise OSError(28, "No space left on device")

    with pytest.raises(CapacityError, match=r"filled up while .*model\.safetensors"):
        make_dummy(tiny, tmp_path / "a", progress=full)
    assert list(tmp_path.iterdir()) == []


def test_unknown_shapes_and_types(tmp_path):
    with pytest.raises(ModelError, match=r"'gpt-4'.*llava-7b, llava-13b, llava-45m"):
        open_checkpoint("gpt-4", dummy_weights=True, cache=tmp_path)
    with pytest.raises(ModelError, match=r"'int8'.*float32, float16, bfloat16"):
        make_dummy("llava-45m", tmp_path / "a", dtype="int8")
