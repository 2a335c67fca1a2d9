"""Checks before the first step: the unusable is refused there, and the usable is not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.texts import text_facts
from visistage.graphs.bundle import MANIFEST
from visistage.graphs.errors import ModelError, PromptError, VisistageError
from visistage.graphs.progress import Progress
from visistage.graphs.text_config import TextConfig
from visistage.runtime.session import load
from visistage.runtime.text.generation import GenerationRules
from visistage.runtime.text.prompt import PromptEncoder
from visistage.tests.support import toy
from visistage.tests.support.cases import Case


class NoWork(Progress):
    def start(self, step, total=None):
        assert step == "open checkpoint", step


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("models") / "toy", layers=1)


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "toy")


def change(file, **fields):
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**data, **fields}))


def sequence(name, kind):
    return {"Sequence": {"id": name, "type_id": kind}}


def add_token(model, token_id, where="added_tokens"):
    file = model / "tokenizer.json"
    data = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    if where == "added_tokens":
        data["added_tokens"].append({"id": token_id, "content": "<obj>", **flags})
    elif where == "vocab":
        data["model"]["vocab"]["<obj>"] = token_id
    else:  # what the tokenizer puts before every text
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, sequence("A", 0)],
            "pair": [sequence("A", 0), sequence("B", 1)],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [token_id], "tokens": ["<s>"]}},
        }
    file.write_text(json.dumps(data))


def extra_tensor(model, name):
    file = model / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(3)}, file)


GENERATION = {
    "beams": ({"num_beams": 4}, "num_beams=4"),
    "n-grams": ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
    "suppressed": ({"suppress_tokens": [5]}, "suppress_tokens"),
    "cold": ({"do_sample": True, "temperature": -1.0}, "temperature is -1"),
    "hot": ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'"),
    "top_p": ({"do_sample": True, "top_p": 3}, "top_p is 3"),
    "penalty": ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    "stops": ({"stop_strings": [str(i) for i in range(17)]}, "17 stop strings"),
    "a stop": ({"stop_strings": [""]}, "stop string ''"),
    "no stop": ({"stop_strings": {"a": 1}}, "stop string"),
    "a number": ({"stop_strings": 7}, "stop string 7"),
    "text": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    "texts": ({"eos_token_id": ["</s>"]}, "eos_token_id"),
    "true": ({"eos_token_id": True}, "eos_token_id"),
    "negative": ({"eos_token_id": -1}, "eos_token_id"),
    "beyond": ({"eos_token_id": [300, 301]}, "token ids end at 299"),
}
SPOILT = {
    **{
        f"generation: {name}": (
            lambda model, fields=fields: change(model / "generation_config.json", **fields),
            message,
        )
        for name, (fields, message) in GENERATION.items()
    },
    "an added token": (lambda model: add_token(model, 300), r"'<obj>' as 300.*300 rows"),
    "a vocabulary": (lambda model: add_token(model, 4000, "vocab"), r"'<obj>' as 4000"),
    "a first token": (lambda model: add_token(model, 900, "post"), r"id 900.*end at 299"),
    "a tensor": (lambda model: extra_tensor(model, "model.mystery"), r"holds model\.mystery"),
    "a layer": (
        lambda model: change_config(model, num_hidden_layers=0),
        "num_hidden_layers is 0",
    ),
}


def change_config(model, **fields):
    config = json.loads((model / "config.json").read_text())
    config["text_config"].update(fields)
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", SPOILT)
def test_what_no_session_could_use_is_refused_before_work(model, tmp_path, name):
    spoil, message = SPOILT[name]
    spoil(model)
    with pytest.raises(VisistageError, match=message) as caught:
        make_bundle(str(model), plan="dense", out=tmp_path / "out", progress=NoWork())
    assert len(str(caught.value)) < 700
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", GENERATION)
def test_sessions_refuse_the_same(name):
    fields, message = GENERATION[name]
    with pytest.raises((ModelError, PromptError), match=message):
        GenerationRules.read({"eos_token_id": 2, **fields}, 300)


@pytest.mark.parametrize(
    ("file", "outer", "inner", "wanted"),
    [
        (None, 0, 2, {0}),
        (None, 0, None, {0}),
        (None, None, 0, {0}),
        (None, None, [0, 7], {0, 7}),
        (0, 2, 3, {0}),
        ([5, 0], 2, 3, {0, 5}),
        (None, 7, 0, {7}),
    ],
)
def test_end_tokens_are_those_of_transformers(model, tmp_path, file, outer, inner, wanted):
    from transformers import LlavaForConditionalGeneration

    (model / "generation_config.json").unlink()
    if file is not None:
        change(model / "generation_config.json", eos_token_id=file)
    change(model / "config.json", eos_token_id=outer)
    change_config(model, eos_token_id=inner)
    theirs = LlavaForConditionalGeneration.from_pretrained(model).generation_config.eos_token_id
    assert set(theirs if isinstance(theirs, list) else [theirs]) == wanted
    facts = text_facts(open_checkpoint(str(model)))
    assert GenerationRules.read(facts.generation, 300).eos == wanted


def test_no_end_token_at_all_is_refused(model, tmp_path):
    (model / "generation_config.json").unlink()
    change(model / "config.json", eos_token_id=None)
    change_config(model, eos_token_id=None)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        make_bundle(str(model), plan="dense", out=tmp_path / "out", progress=NoWork())


def test_a_prompt_with_a_token_beyond_the_embedding_is_refused(model, tmp_path):
    """Refuse them in a bundle whose tokenizer was exchanged, say; its build would not begin."""
    plain = PromptEncoder.from_files(model, vocab=300)
    add_token(model, 300)
    encoder = PromptEncoder.from_files(model, vocab=300)
    assert encoder.encode("Where is it?") == plain.encode("Where is it?")
    with pytest.raises(PromptError, match=r"'<obj>' with id 300.*end at 299"):
        encoder.encode("Where is <obj>?")


def test_sessions_compare_prompts_with_the_embedding(original, tmp_path):
    bundle = make_bundle(str(original), plan="dense", out=tmp_path)
    with load(bundle.path) as session:
        session.encoder._vocab = 20
        with pytest.raises(PromptError, match="end at 19"):
            session.infer(None, "What is it?")
    assert json.loads((bundle.path / MANIFEST).read_text())["generation"]["eos_token_id"] == 2


# --- accepted: what equals the model without it ---------------------------------------------------

ROWS = 48
SAME = {
    "mistral": {"model_type": "mistral", "sliding_window": ROWS, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": ROWS,
              "max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen2 in no layer": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8,
                          "max_window_layers": 2},
    "dynamic": {"rope": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_windows_that_hide_nothing_and_dynamic_ropes_are_those_of_transformers(tmp_path, name):
    case = Case(tmp_path / "toy", layers=2, max_positions=ROWS, **SAME[name])
    ids, pixels = case.prompt(3)
    new = ROWS - ids.shape[1]
    mine = case.run(ids, pixels, case.plan("dense"), new)
    assert (mine.logits - case.logits(ids, pixels)).abs().max() < 1e-3
    assert mine.tokens.tolist() == case.generate(ids, pixels, new).tolist()


def test_shorter_windows_and_longer_ropes_are_refused():
    text = {"max_position_embeddings": ROWS}
    for given in (
        {"model_type": "mistral", "sliding_window": ROWS - 1},
        {"model_type": "mistral", "max_position_embeddings": 4097},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": ROWS - 1},
    ):
        with pytest.raises(ModelError, match="or at least max_position_embeddings"):
            TextConfig.from_hf({"num_hidden_layers": 32, **text, **given})
    TextConfig.from_hf({"model_type": "mistral", "max_position_embeddings": 4096})
    for window in (0, -1, 1.5, "64", True):
        with pytest.raises(ModelError, match="sliding_window"):
            TextConfig.from_hf({**text, "model_type": "mistral", "sliding_window": window})


# --- foreign formats ------------------------------------------------------------------------------


def files(*names, **contents):
    def make(folder):
        folder.mkdir()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    return make


def original_llava(name, **fields):
    return files("pytorch_model-00001-of-00002.bin", config={"architectures": [name], **fields})


def quantised(**fields):
    config = {**toy.make_config(), "quantization_config": fields}
    return files("model.safetensors", config=config)


def in_cache(*inner):
    name = "models--org--llava-7b"

    def make(folder):
        made = files(f"{name}/snapshots/0123/config.json", f"{name}/blobs/x")(folder)
        return made.joinpath(*(name if part == "NAME" else part for part in inner))

    return make


def only_bin(folder):
    toy.make_checkpoint(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


LORA = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
FOREIGN = {
    "LoRA": (
        files("adapter_model.safetensors", adapter_config=LORA),
        r"a LoRA adapter.*org/base.*merge_and_unload",
    ),
    "LoRA beside a config": (
        files("adapter_model.bin", config=toy.make_config(), adapter_config=LORA),
        "a LoRA adapter.*org/base",
    ),
    "damaged LoRA": (files("adapter_model.bin", adapter_config=[]), "a LoRA adapter.*BASE"),
    "GGUF folder": (files("llava-q4.gguf", "mmproj.gguf"), r"GGUF.*llama\.cpp.*safetensors"),
    "GGUF file": (lambda f: files("a.gguf")(f) / "a.gguf", r"a\.gguf.*GGUF.*safetensors"),
    "AWQ": (quantised(quant_method="awq", bits=4), r"quantised \(awq\).*--precision w4"),
    "GPTQ": (quantised(quant_method="gptq"), r"quantised \(gptq\).*made from"),
    "old AWQ": (files("model.safetensors", config={}, quant_config={}), "AWQ.*made from"),
    "old GPTQ": (files("m.safetensors", config={}, quantize_config={}), "GPTQ.*made from"),
    ".bin only": (only_bin, "pickled weights only.*save_pretrained"),
    "original LLaVA": (original_llava("LlavaLlamaForCausalLM"), "original LLaVA.*llava-7b"),
    "original on Mistral": (
        original_llava("LlavaMistralForCausalLM", model_type="llava_mistral"),
        "original LLaVA format",
    ),
    "original without a name": (
        files("m.safetensors", config={"model_type": "llava", "mm_vision_tower": "openai/clip"}),
        "original LLaVA format",
    ),
    "original projector": (
        files("mm_projector.bin", config={"model_type": "llava"}),
        "projector alone.*llava-7b",
    ),
    "a file": (
        lambda f: files("model.safetensors")(f) / "model.safetensors",
        r"is a file, expected a checkpoint folder.*folder: /",
    ),
    "hub cache": (in_cache(), r"hub's cache.*does: org/llava-7b, or the folder .*snapshots/0123"),
    "its model": (in_cache("NAME"), "hub's cache.*does: org/llava-7b"),
    "its snapshots": (in_cache("NAME", "snapshots"), "hub's cache.*snapshots/0123"),
    "its blobs": (in_cache("NAME", "blobs"), "hub's cache.*snapshots/0123"),
    "a folder above": (files("llava/config.json"), r"has no config\.json, \S*/llava has"),
    "a bundle": (files("stage0.onnx", "manifest.json"), "a bundle.*visistage infer"),
    "ONNX": (files("decoder.onnx", "config.json"), "ONNX graphs"),
    "diffusers": (files("model_index.json"), "diffusers"),
    "nothing": (files(), r"has no config\.json"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_formats_are_named_with_the_next_step(tmp_path, name):
    make, message = FOREIGN[name]
    path = make(tmp_path / "model")
    with pytest.raises(ModelError, match=message) as caught:
        open_checkpoint(str(path))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 800


def test_other_files_beside_a_whole_checkpoint_do_no_harm(model):
    for name in ("pytorch_model.bin", "a.gguf", "adapter_config.json", "decoder.onnx"):
        (model / name).write_text("{}")
    open_checkpoint(str(model))
