"""Fine-tunes for methods: forward passes against compiled plans' chains, training, and deltas."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from visistage.bench.record import RESULTS
from visistage.demo.heldout import held_out
from visistage.demo.training import delta, finetune
from visistage.demo.training.accuracy import prepare_test
from visistage.demo.training.batches import Batches, BatchMix
from visistage.demo.training.methods import RULES, forward, visual_features
from visistage.graphs.chain.chain import Chain
from visistage.graphs.chain.group import GroupReader
from visistage.graphs.presets.presets import parse_request, preset
from visistage.runtime.image.image import load_image, pixel_key, preprocess
from visistage.tests.support.staged import Staged

NEW, LAYERS, VISUAL = 5, 8, 144
QUESTION = "Which letter is on the green square?"
METHODS = pytest.mark.parametrize("name", RULES)


@pytest.fixture(scope="module")
def scene():
    return next(held_out(1, 5)).image


@pytest.fixture(scope="module")
def tokenizer():
    return finetune.build_tokenizer()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model for each method, untrained where it has more weights, and its checkpoint."""
    made = {}

    def get(name):
        if name not in made:
            rule = RULES[name]
            model = finetune.starting_model(rule).half().float().eval()
            path = tmp_path_factory.mktemp(name) / "model"
            delta.write_checkpoint(path, delta.file_weights(model), rule.config)
            made[name] = model, path
        return made[name]

    return get


def plan_of(rule):
    request, options = parse_request(rule.plan)
    return preset(request, LAYERS, VISUAL, **options)


def chained(path, rule, image):
    """Answer tokens and the logits (NEW, V) that each was chosen from, by the plan's chain."""
    staged = Staged(path, plan_of(rule), torch.float32)
    if not rule.apart:
        tokens, logits, _ = staged.answer(image, QUESTION, NEW)
        return staged, tokens, logits
    executor = staged.executor()
    reader = GroupReader(Chain(staged.plan, executor))
    pixels, ids = seen(staged, image)
    before, behind = ids
    with torch.no_grad():
        reader.read(executor.embed(torch.tensor([before])))
        decoded = load_image(image)
        reader.read(staged.vision(pixels, [pixel_key(decoded, staged.preprocessing)])[0])
        reader.read(executor.embed(torch.tensor([behind[:-2]])))
        logits = [torch.as_tensor(reader.write(executor.embed(torch.tensor([behind[-2:]]))))[0, -1]]
        tokens = [int(logits[0].argmax())]
        while len(tokens) < NEW:
            row = executor.embed(torch.tensor([tokens[-1:]]))
            logits.append(torch.as_tensor(reader.write(row))[0, -1])
            tokens.append(int(logits[-1].argmax()))
    return staged, tokens, torch.stack(logits)


def seen(staged, image):
    """Pixels (1, 3, H, W), and the ids before and behind the image."""
    pixels = torch.from_numpy(preprocess(load_image(image), staged.preprocessing)[None])
    parts = staged.encoder.encode(QUESTION, images=1).segments
    return pixels, [list(part.ids) for part in parts if not part.is_image]


@torch.no_grad()
def ours(model, rule, staged, image, tokens):
    """Logits (NEW, V) of the training's forward pass along ``tokens``; another question beside."""
    pixels, (before, behind) = seen(staged, image)
    ids = torch.tensor([[behind + tokens[:-1], behind[::-1] + tokens[:-1]]])
    last = torch.tensor([[len(behind) - 1] * 2])
    features = visual_features(model, pixels, rule)
    hidden = forward(model, rule, features, torch.tensor(before), ids, last)
    return model.lm_head(hidden[0, 0, len(behind) - 1 :])


def apart(found, wanted):
    return float(((found - wanted).abs().amax(-1) / wanted.std(-1)).max())


@METHODS
def test_the_forward_pass_is_the_plans_chain(name, models, scene):
    model, path = models(name)
    staged, tokens, wanted = chained(path, RULES[name], scene)
    assert apart(ours(model, RULES[name], staged, scene, tokens), wanted) < 1e-4


def test_a_frozen_prefix_is_the_chains_too(models, scene):
    model, path = models("vica")
    rule = replace(RULES["vica"], plan=RULES["vica"].plan.replace("updated", "frozen"))
    rule = replace(rule, prefix_frozen=True)
    staged, tokens, wanted = chained(path, rule, scene)
    assert apart(ours(model, rule, staged, scene, tokens), wanted) < 1e-4
    assert apart(ours(model, RULES["vica"], staged, scene, tokens), wanted) > 1e-2


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hidrop", {"keep": {4: 24, 5: 4}}),
        ("hidrop", {"sees": frozenset(range(8))}),
        ("vica", {"frozen": False}),
        ("vica", {"sees": frozenset((1, 2, 3))}),
        ("skipgpt", {"routed": False}),
        ("fusion", {"states": (1, 2, 4)}),
        ("group", {"apart": False}),
    ],
    ids=str,
)
def test_planted_mistakes_are_noticed(name, wrong, models, scene):
    model, path = models(name)
    staged, tokens, wanted = chained(path, RULES[name], scene)
    found = ours(model, replace(RULES[name], **wrong), staged, scene, tokens)
    assert apart(found, wanted) > 1e-2


def test_gates_are_mixed_before_training(models, scene, tokenizer):
    """Else a forward pass without routers would equal one with them."""
    model, notes = models("skipgpt")[0], []
    pixels, ids, targets, _ = prepare_test(tokenizer, held_out(2, 5))
    rule = RULES["skipgpt"]
    features = visual_features(model, finetune.normalise_pixels(pixels), rule)
    prefix = finetune.prefix_of(tokenizer)
    forward(model, rule, features, prefix, ids, (targets >= 0).float().argmax(-1), None, notes)
    shares = torch.stack([gate.mean() for pair in notes for gate in pair])
    assert 0.05 < shares.mean() < 0.95
    assert len(notes) == 2 * LAYERS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training that is stopped after one step, and gone on with."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ["vica", "--images", "96", "--processes", "1", "--questions", "14"]
    arguments += ["--state", str(folder / "state.pt"), "--out", str(folder / "vica.safetensors")]
    finetune.main([*arguments, "--minutes", "0"])
    stopped = torch.load(folder / "state.pt", weights_only=True)
    assert not (folder / "vica.safetensors").exists()
    finetune.main(arguments)
    return folder, stopped


def test_a_stopped_run_is_gone_on_with(run):
    folder, stopped = run
    done = torch.load(folder / "state.pt", weights_only=True)
    assert (stopped["step"], done["step"]) == (1, 12)
    assert done["images"] == 96


def test_a_short_run_lowers_the_loss(run, models, tokenizer):
    folder, _ = run
    trained = finetune.starting_model(RULES["vica"])
    trained.load_state_dict(torch.load(folder / "state.pt", weights_only=True)["model"])
    batch = next(iter(Batches(BatchMix(4, 8), "never trained on", tokenizer)))
    prefix = finetune.prefix_of(tokenizer)

    def loss(model):
        with torch.no_grad():
            return finetune.batch_loss(model, RULES["vica"], batch, prefix, 3, None)[0].item()

    assert loss(trained) < 0.9 * loss(models("vica")[0])


def test_a_delta_is_near_what_was_trained_and_says_which_weights_it_gives(run, tmp_path):
    folder, _ = run
    file = folder / "vica.safetensors"
    assert delta.apply(file, tmp_path / "model") == delta.about(file)["weights"]
    base, found = (
        load_file(delta.MODEL / delta.WEIGHTS),
        load_file(tmp_path / "model" / delta.WEIGHTS),
    )
    state = torch.load(folder / "state.pt", weights_only=True)["model"]
    trained = finetune.starting_model(RULES["vica"])
    trained.load_state_dict(state)
    changed = 0
    for name, weight in delta.file_weights(trained).items():
        change = (weight.float() - base[name].float()).norm()
        changed += bool(change)
        assert (
            found[name].float() - weight.float()
        ).norm() <= 0.2 * change + 1e-3 * weight.float().norm(), name
        assert bool(change) == ("vision_tower" not in name), name
    assert changed > 70


def test_a_wrong_delta_is_refused(run, tmp_path):
    file = run[0] / "vica.safetensors"
    said, stored = delta.about(file), load_file(file)
    save_file(stored, tmp_path / "other.safetensors", metadata={**said, "base": "0"})
    with pytest.raises(ValueError, match="another demo"):
        delta.apply(tmp_path / "other.safetensors", tmp_path / "model")
    name = next(name for name in stored if name.endswith(delta.CODES))
    stored[name] = stored[name].flip(0).contiguous()
    save_file(stored, tmp_path / "damaged.safetensors", metadata=said)
    with pytest.raises(ValueError, match="gives weights of hash"):
        delta.apply(tmp_path / "damaged.safetensors", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def shipped(row):
    return row["weights"] == "trained for it" and row["plan"] == RULES[row["method"]].plan


def recorded():
    """Rows of shipped weights under the plan that they were trained for, by method."""
    file = RESULTS / "trained-demo.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    return {row["method"]: row for row in rows if shipped(row)}


def test_shipped_deltas_are_small_and_those_that_were_measured(tmp_path):
    files = sorted(delta.DELTAS.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    rows = recorded()
    assert {file.stem for file in files} == {*rows}
    for file in files:
        assert delta.apply(file, tmp_path / file.stem) == rows[file.stem]["weights_sha256"]
        assert json.loads(delta.about(file)["config"]) == dict(RULES[file.stem].config)


@pytest.mark.slow
@METHODS
def test_shipped_weights_answer_as_recorded(name, tmp_path, tokenizer):
    """By the training's forward pass, on questions that were recorded by the plan's bundle."""
    if name not in recorded():
        pytest.skip("no delta is shipped")
    delta.apply(delta.DELTAS / f"{name}.safetensors", tmp_path / "model")
    rule = RULES[name]
    model = finetune.starting_model(rule)
    names = {
        file: memory
        for memory, file in zip(model.state_dict(), delta.file_weights(model), strict=True)
    }
    weights = load_file(tmp_path / "model" / delta.WEIGHTS)
    model.load_state_dict({names[file]: weight.float() for file, weight in weights.items()})
    test = prepare_test(tokenizer, held_out(280))
    share = finetune.accuracy(model, rule, finetune.prefix_of(tokenizer), test)
    assert share == pytest.approx(recorded()[name]["accuracy"], abs=0.05)
