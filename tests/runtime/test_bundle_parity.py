"""torch == ONNX Runtime, graph by graph and through the whole runtime; llm == portable lowering."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.export import export, graphs_of
from visistage.compile.export.weights import WAYS, bring_files, convert, place
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.contract import MANY_ROWS
from visistage.graphs.errors import CapacityError
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.vision import Vision
from visistage.graphs.presets.presets import preset
from visistage.runtime.session import Session, load
from visistage.tests.support import published, toy
from visistage.tests.support.asking import (
    NEW,
    PLANS,
    answer,
    example_feeds,
    picture,
    torch_outputs,
)
from visistage.tests.support.built import built_once

ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("toy"), layers=8, kv_heads=2)


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    get = built_once(checkpoint, tmp_path_factory)
    return lambda plan, target="cpu": get(PLANS[plan], target)


class HuggingFace:
    """The same checkpoint in transformers: processor, template and greedy generation."""

    def __init__(self, path):
        self.processor = AutoProcessor.from_pretrained(path, backend="pil")
        self.model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def tokens(self, images, prompt, new=NEW):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(text=text, images=images or None, return_tensors="pt")
        out = self.model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.fixture(scope="module")
def hugging_face(checkpoint):
    return HuggingFace(checkpoint)


def no_eos(tokens):
    return 2 not in tokens


@pytest.mark.parametrize("target", ["cpu", "cpu-portable"])
def test_dense_bundle_equals_hugging_face(bundles, hugging_face, target):
    with load(bundles("dense", target).path) as session:
        for images, prompt in (
            ([picture(1)], "What is this?"),
            ([picture(2), picture(3, 33, 90)], "Which one is larger?"),
            ([], "Say something."),
        ):
            wanted = hugging_face.tokens(images, prompt)
            assert answer(session, images, prompt) == wanted
            assert len(set(wanted)) >= 8


def test_a_cached_picture_answers_like_a_fresh_one(bundles, hugging_face):
    """Q1, a long Q2, Q1 again, another picture in between: every answer as from a cold start."""
    one, other = picture(4), picture(5)
    long = "Describe the picture in detail, with every object in it, and say where it is. " * 4
    with load(bundles("dense").path) as session:
        opened = session.open(one)
        for image, prompt in (
            (opened, "How many?"),
            (opened, long),
            (opened, "How many?"),
            (other, "How many?"),
            (one, "How many?"),
            (None, "How many?"),
            (opened, "How many?"),
        ):
            pixels = [] if image is None else [other if image is other else one]
            assert answer(session, image, prompt) == hugging_face.tokens(pixels, prompt)


def test_a_paid_picture_is_not_paid_again(bundles):
    with load(bundles("visipruner").path) as session:
        opened = session.open(picture(6))
        again = session.infer(opened, "How many?", max_tokens=2)
        assert "vision" not in again.timings.graphs_ms
        assert session.infer(picture(7), "How many?", max_tokens=2).timings.graphs_ms["vision"] > 0


@pytest.mark.parametrize("plan", ["dense", "visipruner", "fastv", "v2drop", "sparsevlm"])
def test_lowerings_and_the_torch_chain_agree(checkpoint, bundles, plan):
    """The runtime on ONNX Runtime, both lowerings, against torch stages over the whole prompt."""
    prompt, image = "What is shown in this image?", picture(8)
    with load(bundles(plan).path) as session, load(bundles(plan, "cpu-portable").path) as portable:
        tokens = answer(session, image, prompt)
        assert answer(portable, image, prompt) == tokens
        expected = torch_tokens(checkpoint, session, image, prompt)
    assert tokens == expected
    assert len(set(tokens)) >= 8


def test_a_decoder_with_norms_by_head_answers_alike_in_every_lowering(tmp_path):
    shape = {"model_type": "qwen3", "head_dim": 24, "kv_heads": 2, "scale": 1.6}
    path = toy.make_checkpoint(tmp_path / "toy", layers=8, **shape)
    prompt, image = "What is shown in this image?", picture(8)
    for target in ("cpu", "cpu-portable"):
        bundle = make_bundle(str(path), out=tmp_path / target, plan="visipruner", target=target)
        with load(bundle.path) as session:
            tokens = answer(session, image, prompt)
            assert tokens == torch_tokens(path, session, image, prompt)
            assert len(set(tokens)) >= 8


PROBING = [name for name in PLANS if name in ("code", "paper", "adaptive")]


@pytest.mark.parametrize("plan", PROBING)
def test_probes_decide_the_same_in_every_lowering(checkpoint, bundles, plan):
    """Triggers, kept tokens and exits of several prompts, in torch and on ONNX Runtime."""
    ways = set()
    with load(bundles(plan).path) as session, load(bundles(plan, "cpu-portable").path) as portable:
        for number, prompt in itertools.product(range(20, 24), ("What is this?", "How many?")):
            image = picture(number)
            expected = torch_result(checkpoint, session, image, prompt)
            for one in (session, portable):
                one.eos = frozenset()
                got = one.infer(image, prompt, max_tokens=NEW)
                assert got.tokens == tuple(expected.tokens[0].tolist())
                assert (got.plan.trigger, got.plan.exit) == (expected.trigger, expected.exit)
                kept = got.plan.kept
                assert kept is None or list(kept) == expected.kept[0]
                check_layers(got.plan, session.bundle.manifest.plan)
            ways.add((expected.trigger, expected.exit, len(expected.kept[0])))
    assert len(ways) >= 4, ways
    assert len({trigger for trigger, _, _ in ways}) >= 2


@pytest.mark.parametrize("plan", PROBING)
def test_caches_and_several_pictures_do_not_disturb_the_probes(checkpoint, bundles, plan):
    """A short, a long and the short question again, with other pictures and two in between."""
    one, other = picture(20), picture(22)
    long = "Describe the picture in detail, with every object in it, and say where it is. " * 3
    with load(bundles(plan).path) as session:
        session.eos = frozenset()
        opened = session.open(one)
        for image, prompt in (
            (opened, "How many?"),
            (opened, long),
            ([opened, other], "How many?"),
            (other, "How many?"),
            (opened, "How many?"),
        ):
            images = [other if i is other else one for i in _listed(image)]
            expected = torch_result(checkpoint, session, images, prompt)
            got = session.infer(image, prompt, max_tokens=NEW)
            assert got.tokens == tuple(expected.tokens[0].tolist())
            assert (got.plan.trigger, got.plan.exit) == (expected.trigger, expected.exit)
            assert list(got.plan.kept or expected.kept[0]) == expected.kept[0]
            assert got.plan.visual_tokens == 16 * len(images)
        nothing = session.infer(None, "How many?", max_tokens=4).plan
        assert (nothing.kept, nothing.called, nothing.visual_flops) == (None, None, 0)


def _listed(image):
    return image if isinstance(image, list) else [image]


def check_layers(facts, plan):
    """Visual rows per layer, deviations and savings follow from t, K and e."""
    kept = plan.visual_tokens if facts.kept is None else plan.probe.rows_for(len(facts.kept))
    for layer, count in enumerate(facts.visual_tokens_per_layer):
        full = layer <= facts.trigger
        assert count == (plan.visual_tokens if full else kept if layer <= facts.exit else 0)
    assert facts.visual_flops <= facts.dense_visual_flops
    assert (facts.visual_flops < facts.dense_visual_flops) == (facts.kept is not None)
    called = facts.called
    late = called.trigger is not None and called.trigger != facts.trigger
    padded = called.kept is not None and kept > called.kept
    overstayed = bool(called.kept) and called.exit not in (None, facts.exit)
    assert len(facts.deviations) == late + padded + overstayed
    if plan.kind == "exact":
        assert facts.deviations == ()
    else:
        assert facts.trigger >= (called.trigger or 0)


def torch_tokens(path, session, image, prompt):
    return tuple(torch_result(path, session, image, prompt).tokens[0].tolist())


def torch_result(path, session, image, prompt):
    weights, text, rows, spans = embedded(path, session, image, prompt)
    return chain.run(weights, text, rows, [spans], session.bundle.manifest.plan, NEW)


def embedded(path, session, image, prompt):
    """Weights, text config, rows (1, S, D) and visual spans of a prompt."""
    opened = open_checkpoint(str(path))
    weights = {name: opened.load(name) for name in opened.tensors}
    config = opened.config
    images = _listed(image)
    encoder = chain.load_weights(Vision(config, Eager()), weights)
    with torch.no_grad():
        visual = [encoder(torch.from_numpy(session.decode_image(i).pixels)) for i in images]
    rows, spans = [], []
    for segment in session.encoder.encode(prompt, images=len(images)).segments:
        start = sum(part.shape[1] for part in rows)
        if segment.is_image:
            rows.append(visual[len(spans)])
            spans.append((start, start + config.visual_tokens))
        else:
            rows.append(weights["model.embed_tokens.weight"][list(segment.ids)][None])
    return weights, opened.raw["text_config"], torch.cat(rows, 1), spans


PARTS = list(itertools.product((True, False), repeat=3))


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize(("shallow", "middle", "deep"), PARTS)
def test_exact_bundles_equal_the_published_method(
    checkpoint, tmp_path, variant, shallow, middle, deep
):
    """Every combination of its parts, 32 tokens through ONNX Runtime, against the reference."""
    base = published.CODE if variant == "code" else published.PAPER
    count = 2 if shallow else 0
    method = replace(base, shallow=count, probe=3, middle=middle, deep=deep, cosine=0.95)
    method = replace(method, contribution=0.5, exit_cosine=0.8)
    options = f"shallow={count or 'false'},middle={middle},deep={deep}"
    if middle:
        options += ",probe=3,cosine=0.95,contribution=0.5" + ",exit_cosine=0.8" * deep
    plan = f"visipruner-{variant}:{options}"
    bundle = make_bundle(str(checkpoint), plan=plan, out=tmp_path)
    ways = set()
    with load(bundle.path) as session:
        session.eos = frozenset()
        for number in (20, 21, 22):
            weights, text, rows, spans = embedded(checkpoint, session, picture(number), "Why?")
            text = {**text, "rope_theta": text["rope_parameters"]["rope_theta"]}
            visual = torch.zeros(rows.shape[1], dtype=torch.bool)
            visual[slice(*spans[0])] = True
            _, trace, tokens = published.generate(weights, text, rows[0], visual, method, 32)
            got = session.infer(picture(number), "Why?", max_tokens=32)
            assert list(got.tokens) == tokens
            facts = got.plan
            assert facts.exit == trace.exit
            if middle:
                assert (facts.trigger, list(facts.kept)) == (trace.trigger, trace.kept.tolist())
            ways.add((trace.trigger, trace.exit))
    assert all((trigger is not None) == middle for trigger, _ in ways)
    assert any(exit_ < 7 for _, exit_ in ways) == (middle and deep)


@pytest.mark.parametrize(
    ("lowering", "dtype", "rows", "tolerance"),
    [
        ("llm", "float32", 5, 2e-4),
        ("llm", "float16", 5, 2e-2),
        ("portable", "float32", 5, 2e-4),
        ("portable", "float16", 5, 2e-2),
        ("branched", "float32", 5, 2e-4),
        ("branched", "float32", 1, 2e-4),
        ("branched", "float32", MANY_ROWS + 3, 2e-4),  # pieces of unequal sizes
    ],
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("visipruner", {"shallow": 2, "t": 4, "e": 6, "keep": 4}),
        ("visipruner-adaptive", {"shallow": 2, "boundaries": (5,)}),
        ("v2drop", {"before": (5,), "keep": (4,)}),
        ("sparsevlm", {"before": (5,), "keep": (4,)}),
    ],
)
def test_every_graph_equals_its_module(
    checkpoint, tmp_path, name, options, lowering, dtype, rows, tolerance
):
    """Batch of two, a filled cache, gates half open: outputs relative to their spread."""
    opened = open_checkpoint(str(checkpoint))
    config = opened.config
    plan = preset(name, 8, config.visual_tokens, **options)
    graphs = graphs_of(config, plan, dtype, lowering)
    placement = place(opened, [name for graph in graphs for name in graph.weights], dtype)
    bring_files(placement, tmp_path, WAYS["copy"])
    convert(opened, placement, dtype, tmp_path)
    weights = {name: opened.load(name) for name in opened.tensors}
    generator = np.random.default_rng(9)
    for graph in graphs:
        export(graph, config.text, tmp_path / "graph.onnx", placement.spans)
        session = ort.InferenceSession(str(tmp_path / "graph.onnx"))
        feeds = example_feeds(graph, rows, generator)
        got = dict(zip([s.name for s in graph.spec.outputs], session.run(None, feeds), strict=True))
        want = torch_outputs(graph, config, plan, weights, feeds)
        assert got.keys() >= want.keys()
        for name, value in want.items():
            mine = got[name]
            if name.endswith(".out") and name[:3] in ("key", "val") and lowering == "portable":
                value = value[:, :, 9 : 9 + rows]  # the new rows only
            assert mine.shape == tuple(value.shape), name
            scale = float(value.double().std()) if value.is_floating_point() else 0
            worst = np.abs(mine.astype(np.float64) - value.double().numpy()).max()
            assert worst <= tolerance * max(scale, 1e-9) * 10, (graph.name, name, worst, scale)


def test_stale_and_poisoned_slots_change_nothing(bundles):
    """Old questions leave rows behind, and spare slots may hold anything finite."""
    with load(bundles("visipruner").path) as session:
        image = session.open(picture(10))
        first = answer(session, image, "How many?")
        for caches in session.executor.caches:
            for cache in caches.values():
                cache[:, :, 100:] = 1e4
        assert answer(session, image, "How many?") == first


def test_caches_grow_across_buckets(bundles, hugging_face):
    """An answer that outgrows the first bucket goes on unchanged."""
    with load(bundles("dense").path) as session:
        tokens = answer(session, picture(11), "Describe it.", 120)
        assert session.executor.caches[0]["key.0"].shape[2] == 256
    assert tokens == hugging_face.tokens([picture(11)], "Describe it.", 120)


@pytest.mark.parametrize("plan", ["dense", "visipruner"])
def test_slots_of_a_long_answer_are_given_back(bundles, plan):
    """Attention pays for every slot there is, used or not."""
    slots = lambda session: [block.shape[3] for block in session.executor.blocks]  # noqa: E731
    with load(bundles(plan).path) as session, load(bundles(plan).path) as fresh:
        long = answer(session, picture(12), "Describe it.", 330)
        assert min(slots(session)) == 384
        assert answer(session, picture(12), "Why?") == answer(fresh, picture(12), "Why?")
        assert slots(session) == slots(fresh) == [128] * len(slots(session))
        pair = [picture(13), picture(12)]
        assert answer(session, pair, "Which?") == answer(fresh, pair, "Which?")
        assert answer(session, picture(12), "Describe it.", 330) == long


def test_mapped_weights_answer_the_same(bundles):
    bundle = bundles("visipruner")
    limit = int(bundle.manifest.weight_bytes * 1.5)
    with load(bundle.path) as fast, load(bundle.path, memory_limit=limit) as mapped:
        assert fast.executor.prepacked
        assert not mapped.executor.prepacked
        assert answer(fast, picture(12), "Why?") == answer(mapped, picture(12), "Why?")
    with pytest.raises(CapacityError, match="memory limit"):
        load(bundle.path, memory_limit=1000)


def test_context_is_checked_before_anything_runs(bundles):
    with load(bundles("dense").path) as session:
        context = session.bundle.manifest.config.text.max_positions
        with pytest.raises(CapacityError, match="Ask for at most"):
            session.infer(picture(13), "How many?", max_tokens=context)
        with pytest.raises(CapacityError, match="Shorten the prompt"):
            session.infer(picture(13), "How many? " * 1000)


def test_streams_and_answers_agree(bundles):
    with load(bundles("visipruner").path) as session:
        session.eos = frozenset()
        stream = session.stream(picture(14), "How many?", max_tokens=16)
        pieces = list(stream)
        assert "".join(pieces).strip() == stream.answer.text
        assert stream.answer.finish == "length"
        assert len(stream.answer.plan.kept) == 4
        old = session.stream(picture(14), "How many?", max_tokens=16)
        next(old)
        session.infer(picture(14), "And now?", max_tokens=2)
        with pytest.raises(Exception, match="interrupted by a newer question"):
            next(old)


def test_scores_are_what_a_free_answer_was_chosen_by(bundles):
    """Teacher forcing along a greedy answer finds that answer, whatever was asked in between."""
    with load(bundles("visipruner").path) as session:
        opened = session.open(picture(15))
        tokens = answer(session, opened, "How many?", 12)
        answer(session, picture(16), "Why?", 3)
        logits = session.score(opened, "How many?", tokens[:-1])
        assert tuple(logits.argmax(-1)) == tokens
        assert np.array_equal(session.score(opened, "How many?", ()), logits[:1])
        other = session.score(opened, "How many?", (tokens[0], (tokens[1] + 1) % 300))
        assert np.array_equal(other[:2], logits[:2])
        assert not np.allclose(other[2], logits[2])
        with pytest.raises(CapacityError):
            session.score(opened, "How many?", [5] * 4096)


def test_options_reach_the_back_end(bundles):
    """Every graph runs on the number of threads that was asked for."""
    for threads in (1, 3):
        with Session(bundles("dense"), threads=threads) as session:
            for graph in session.executor.sessions.values():
                assert graph.get_session_options().intra_op_num_threads == threads
