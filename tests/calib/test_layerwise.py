"""A layer-wise run computes what the chain computes, in every plan; or no range is right."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from visistage.calib.run.layerwise import layerwise_pieces, run_layerwise
from visistage.calib.run.prompt_state import ANSWER, ENCODER, TEXT, VISUAL, LastRowView
from visistage.calib.sample_prompts import SamplePrompt, prepare
from visistage.calib.samples import Sample
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.prefix import prefix_cache
from visistage.compile.export.texts import text_facts
from visistage.demo.heldout import held_out
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.chain.enter import positioned
from visistage.graphs.errors import CapacityError, PlanError, PromptError
from visistage.graphs.modules.layer import Linear
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.vision import Vision
from visistage.graphs.plan.gates import stage_gates
from visistage.graphs.presets.presets import preset
from visistage.runtime.image.preprocessing import Preprocessing
from visistage.tests.support import reference, toy
from visistage.tests.support.chain_judge import (
    LAYERS,
    PLANS,
    PREFIX,
    ChainJudge,
    N,
    RecordingObserver,
    ids,
    layerwise,
    pixels,
    prompts,
    vision,
)

TOLERANCE = 1e-4  # of the logits' spread


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = toy.make_checkpoint(
        tmp_path_factory.mktemp("toy"), layers=LAYERS, kv_heads=2, max_positions=256
    )
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def weights(checkpoint):
    return {name: tensor.float() for name, tensor in checkpoint.state_dict().items()}


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["whole", "prefix"])
@pytest.mark.parametrize("name", PLANS)
def test_the_logits_are_those_of_the_chain(checkpoint, weights, name, prefix):
    given = prompts()
    walked = layerwise(checkpoint, given, PLANS[name], prefix)
    answers = set()
    for prompt, logits, kept in zip(given, walked.logits, walked.kept, strict=True):
        expected, chosen = ChainJudge(checkpoint, weights, PLANS[name]).run(prompt)
        assert logits.shape == (1 + len(prompt.answer_ids), toy.VOCAB)
        assert (logits - expected).abs().max() < TOLERANCE * expected.std(), prompt.name
        assert [one.tolist() for one in kept] == [one.tolist() for one in chosen], prompt.name
        answers |= set(logits.argmax(-1).tolist())
    assert len(answers) >= 8  # not one token for everything


def test_plans_differ(checkpoint):
    """Or equality with the chain would say little."""
    given = prompts()[:2]
    seen = {name: layerwise(checkpoint, given, plan, PREFIX).logits for name, plan in PLANS.items()}
    for name, logits in seen.items():
        for other, theirs in seen.items():
            if name < other:
                most = max(float((a - b).abs().max()) for a, b in zip(logits, theirs, strict=True))
                assert most > 0.01, (name, other)


def moved(plan, segments, lags):
    placed, lag = positioned(plan, segments, lags)
    return [s if s.visual else replace(s, positions=s.positions + 1) for s in placed], lag


BUGS = {
    "answers under the prompt's gates": (
        "calib.run.prompt_state.stage_gates",
        lambda plan, stage, visual, call, decoding: stage_gates(plan, stage, visual, call),
    ),
    "vision sees vision": (
        "calib.run.prompt_state.stage_gates",
        lambda plan, stage, visual, call, decoding: stage_gates(
            plan, stage, visual, False, decoding
        ),
    ),
    "another prefix": (
        "calib.run.layerwise.prefix_cache",
        lambda checkpoint, plan, given, progress: prefix_cache(checkpoint, plan, given[::-1]),
    ),
    "positions moved": ("calib.run.prompt_state.positioned", moved),
    "another row selects": (
        "calib.run.prompt_state.LastRowView",
        lambda query, *others: LastRowView(query.flip(1), *others),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_noticed(checkpoint, weights, monkeypatch, bug):
    where, wrong = BUGS[bug]
    plan, given = PLANS["decode-sees"], prompts()[:1]
    expected, _ = ChainJudge(checkpoint, weights, plan).run(given[0])
    right = layerwise(checkpoint, given, plan, PREFIX).logits[0]
    monkeypatch.setattr(f"visistage.{where}", wrong)
    broken = layerwise(checkpoint, given, plan, PREFIX).logits[0]
    assert (right - expected).abs().max() < TOLERANCE * expected.std()
    assert (broken - expected).abs().max() > 100 * TOLERANCE * expected.std()


def test_answers_are_fed_as_the_demo_model_writes_them():
    """Or their rows would be of a text that no decode step ever sees."""
    checkpoint = open_checkpoint("demo")
    texts = text_facts(checkpoint)
    samples = [
        Sample(str(number), one.image, one.question, one.answer)
        for number, one in enumerate(held_out(10))
    ]
    preprocessing = Preprocessing.from_dict(texts.preprocessing)
    given, _ = prepare(samples, texts.encoder, preprocessing, checkpoint.config)
    config = checkpoint.config
    plan = preset("dense", config.text.layers, config.visual_tokens)
    said = [
        one.argmax(-1).tolist()
        for one in layerwise(checkpoint, given, plan, texts.prefix_ids).logits
    ]
    right = [tuple(mine[:-1]) == one.answer_ids for mine, one in zip(said, given, strict=True)]
    assert sum(right) >= 7
    assert {mine[-1] for mine in said} == {texts.generation["eos_token_id"]}


def test_visipruner_is_the_independent_reference(checkpoint, weights):
    prompt = SamplePrompt("one", (PREFIX, pixels(1), ids(9, 1)), ids(4, 2))
    (logits,) = layerwise(checkpoint, [prompt], PLANS["visipruner"], PREFIX).logits
    table = weights["model.embed_tokens.weight"]
    head, tail = table[list(prompt.parts[0])], table[list(prompt.parts[2])]
    rows = torch.cat((head, vision(checkpoint, weights, prompt.parts[1])[0], tail))
    visual = torch.zeros(len(rows), dtype=torch.bool)
    visual[len(head) : len(head) + N] = True
    method = reference.Static(shallow=3, trigger=4, exit=6, keep=5)
    config = {**toy.make_config(layers=LAYERS, kv_heads=2)["text_config"], "rope_theta": 10000.0}
    probe, kept = len(rows) - 1, None
    for step in range(1 + len(prompt.answer_ids)):
        expected, kept = reference.forward(weights, config, rows, visual, method, probe, kept)
        assert (logits[step] - expected).abs().max() < TOLERANCE * expected.std()
        if step < len(prompt.answer_ids):
            rows = torch.cat((rows, table[prompt.answer_ids[step]][None]))
            visual = torch.cat((visual, torch.tensor([False])))


@pytest.mark.parametrize("name", PLANS)
def test_observers_see_what_the_linear_layers_of_the_chain_are_given(checkpoint, weights, name):
    """Row for row, without the prefix; of the head, only the rows that somebody reads."""
    given = prompts()[:4]  # those that begin with the prefix
    seen = RecordingObserver()
    run_layerwise(checkpoint, given, PLANS[name], PREFIX, observer=seen)
    heard = {}
    for prompt in given:
        judge = ChainJudge(checkpoint, weights, PLANS[name])
        judge.hold(PREFIX)
        executor = judge.executor
        with listening([*executor.stages, *executor.serving.values()], heard):
            judge.run(prompt, begin=len(PREFIX))
    expected = in_order(heard)
    head = {kind: seen.of_kind("lm_head", kind) for kind in (TEXT, ANSWER)}
    assert len(head[TEXT]) == len(given)
    assert len(head[ANSWER]) == sum(len(prompt.answer_ids) for prompt in given)
    theirs = expected.pop("lm_head")
    for row in torch.cat(list(head.values())):
        assert (theirs - row).abs().amax(1).min() < 1e-4
    decoder = {linear: rows for linear, rows in seen.rows.items() if linear.startswith("model.")}
    assert set(decoder) == set(expected)
    for linear, rows in decoder.items():
        mine, theirs = torch.cat(rows), expected[linear]
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max(), linear


def test_observers_see_no_query_and_no_mlp_of_rows_that_serve(checkpoint):
    seen = RecordingObserver()
    run_layerwise(checkpoint, prompts()[:2], PLANS["vica"], PREFIX, observer=seen)
    counts = {
        name: len(seen.of_kind(f"model.layers.1.{name}", VISUAL))
        for name in ("self_attn.k_proj", "self_attn.q_proj", "mlp.up_proj")
    }
    assert counts == {"self_attn.k_proj": 3 * N, "self_attn.q_proj": 0, "mlp.up_proj": 0}


def test_observers_see_the_vision_encoder_and_the_kinds_of_rows(checkpoint, weights):
    given = prompts()[:2]
    seen, heard = RecordingObserver(), {}
    run_layerwise(checkpoint, given, PLANS["visipruner"], PREFIX, observer=seen)
    module = chain.load_weights(Vision(checkpoint.config, Eager()), weights)
    with listening([module], heard), torch.no_grad():
        for image in (pixels(1), pixels(2), pixels(3)):
            module(torch.from_numpy(image.pixels))
    expected = in_order(heard)
    assert set(expected) == {name for name in seen.rows if name.startswith(("vision", "multi"))}
    for linear, rows in expected.items():
        assert torch.allclose(torch.cat(seen.rows[linear]), rows, atol=1e-5)
        assert len(seen.of_kind(linear, ENCODER)) == len(rows)
    counts = {
        stage: [len(seen.of_kind(f"model.layers.{layer}.mlp.up_proj", kind)) for kind in range(4)]
        for stage, layer in enumerate((4, 6, 7))
    }
    text, answers = 9 + 3 + 12, 4 + 1
    assert counts == {
        0: [0, 3 * N, text, answers],
        1: [0, 2 * 5, text, answers],
        2: [0, 0, text, answers],
    }


def test_observers_are_lent_the_weights_of_each_piece(checkpoint, weights):
    seen = RecordingObserver()
    run_layerwise(checkpoint, prompts()[:1], PLANS["dense"], PREFIX, observer=seen)
    read = {name for name in weights if name != "model.embed_tokens.weight"}
    assert set(seen.weights) == read
    assert all(torch.equal(seen.weights[name], weights[name]) for name in read)


def test_readings_are_those_of_the_chain(checkpoint, weights):
    given, seen = prompts(), RecordingObserver(reads=True)
    run_layerwise(checkpoint, given, PLANS["dense"], PREFIX, observer=seen)
    got = seen.readings
    assert len(got) == LAYERS * sum(prompt.name != "blind" for prompt in given)
    for place, prompt in enumerate(given):
        if prompt.name == "blind":
            continue
        judge = ChainJudge(checkpoint, weights, PLANS["dense"])
        segments = judge.segments(prompt)
        with torch.no_grad():
            passed = [judge.chain.append(0, [segment]) for segment in segments]
            queries = passed[-1][-1].result.queries
        slots = judge.chain.slots[0]
        visual = np.flatnonzero(slots.visual[0])[None]
        for layer in range(LAYERS):
            order = segments[-1].order[:, -1].copy()
            theirs = judge.executor.probe(0, layer, queries[layer], slots.order, order, visual)
            for mine, other in zip(got[place, layer], theirs, strict=True):
                assert mine.shape == (visual.size,)
                np.testing.assert_allclose(mine, other[0], rtol=1e-3, atol=1e-5)


def test_gated_layers_and_layers_without_vision_are_not_read(checkpoint):
    seen = RecordingObserver(reads=True)
    run_layerwise(checkpoint, prompts(), PLANS["visipruner"], PREFIX, observer=seen)
    layers = {(layer, len(cosine)) for (_, layer), (cosine, _) in seen.readings.items()}
    assert layers == {(layer, n) for layer in (3, 4) for n in (N, 2 * N)} | {(5, 5), (6, 5)}


def test_every_piece_counts(checkpoint):
    done = []
    layerwise(checkpoint, prompts(), PLANS["fastv"], PREFIX, advance=done.append)
    assert done == [1] * layerwise_pieces(checkpoint.config, PREFIX)


def test_prompts_do_not_disturb_one_another(checkpoint):
    given = prompts()
    together = layerwise(checkpoint, given, PLANS["visipruner"], PREFIX).logits
    backwards = layerwise(checkpoint, given[::-1], PLANS["visipruner"], PREFIX).logits
    for mine, theirs in zip(together, backwards[::-1], strict=True):
        assert torch.equal(mine, theirs)


def test_a_plan_that_decides_per_prompt_is_refused(checkpoint):
    plan = preset("visipruner-code", LAYERS, N)
    with pytest.raises(PlanError, match="Calibrate a static plan"):
        layerwise(checkpoint, prompts(), plan)


def test_another_models_plan_is_refused(checkpoint):
    with pytest.raises(PlanError, match="found layers=6, expected 8: the model has 8"):
        layerwise(checkpoint, prompts(), preset("dense", 6, N))


def test_a_prompt_that_does_not_fit_is_refused_by_name(checkpoint):
    long = SamplePrompt("long one", (PREFIX, pixels(1), ids(200, 1)), ids(60, 2))
    with pytest.raises(CapacityError, match=r"long one: .* take 280 rows, .* context is 256"):
        layerwise(checkpoint, [long], PLANS["dense"])
    with pytest.raises(PromptError, match="no question: the prompt ends in an image"):
        layerwise(checkpoint, [SamplePrompt("no question", (PREFIX, pixels(1)))], PLANS["dense"])


def in_order(heard):
    """By linear layer all rows that it was given, first those of the stage that begins it."""
    found = defaultdict(list)
    for (_, name), rows in sorted(heard.items()):
        found[name] += rows
    return {name: torch.cat(rows) for name, rows in found.items()}


class listening:
    """Notes what every linear layer of some modules is given; of layers that are begun, apart."""

    def __init__(self, modules, rows):
        self.modules, self.rows, self.handles = modules, rows, []

    def __enter__(self):
        for module in self.modules:
            begun = f"model.layers.{getattr(module, 'ahead', None)}."
            for name, part in module.named_modules():
                if isinstance(part, Linear):
                    key = not name.startswith(begun), name
                    self.handles.append(part.register_forward_hook(self.note(key)))

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def note(self, key):
        rows = self.rows.setdefault(key, [])
        return lambda module, given, out: rows.append(given[0].clone())
