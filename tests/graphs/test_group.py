"""Rows read and written in turn, in torch and on ONNX Runtime, against whole sequences."""

import numpy as np
import pytest
import torch
from visistage import runtime
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.graphs.chain.chain import Chain
from visistage.graphs.chain.group import GroupReader
from visistage.graphs.chain.torch_reference import TorchExecutor
from visistage.graphs.errors import CapacityError, PlanError, VisistageError
from visistage.graphs.presets.presets import preset
from visistage.tests.support import toy
from visistage.tests.support.asking import picture
from visistage.tests.support.cases import text_dict
from visistage.tests.support.grouped import Grouped, forward, wait_k

LAYERS, VISUAL, NEW = 6, 16, 8
TURNS = "r" * 90 + "wwww" + "rrr" + "ww" + "r" * 70 + "w" * NEW
"""Reads of more rows than a branched graph takes at once, behind writes, too."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return toy.make_checkpoint(tmp_path_factory.mktemp("toy"), layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def weights(path):
    checkpoint = open_checkpoint(str(path))
    return {name: checkpoint.load(name) for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def bundles(path, tmp_path_factory):
    built = {}

    def get(target, plan="dense"):
        if (target, plan) not in built:
            out = tmp_path_factory.mktemp("engines")
            built[target, plan] = make_bundle(str(path), plan=plan, target=target, out=out)
        return built[target, plan]

    return get


def torch_reader(path, weights, phi=0):
    plan = preset("dense", LAYERS, VISUAL)
    text = open_checkpoint(str(path)).config.text
    return GroupReader(Chain(plan, TorchExecutor(text, plan, weights, 1)), phi)


def rows_of(weights, turns):
    ids = torch.randint(5, toy.VOCAB, (len(turns),), generator=torch.Generator().manual_seed(2))
    return weights["model.embed_tokens.weight"][ids]


def through(reader, rows, turns):
    """Logits of every written row."""
    out, start = [], 0
    while start < len(turns):
        stop = start + len(turns[start:]) - len(turns[start:].lstrip(turns[start]))
        if turns[start] == "r":
            reader.read(rows[None, start:stop])
        else:
            out.append(np.asarray(reader.write(rows[None, start:stop]))[0])
        start = stop
    return np.concatenate(out)


def wanted(weights, rows, grouped):
    config = text_dict(toy.make_config(layers=LAYERS, kv_heads=2))
    logits = forward(weights, config, rows, grouped.positions(), grouped.mask())
    return logits[[turn == "w" for turn in grouped.turns]].numpy()


def error(found, want):
    return np.abs(found - want).max(-1) / want.std(-1)


@pytest.mark.parametrize("phi", [0, 40])
def test_the_torch_chain_equals_whole_sequences(path, weights, phi):
    rows = rows_of(weights, TURNS)
    found = through(torch_reader(path, weights, phi), rows, TURNS)
    assert error(found, wanted(weights, rows, Grouped(TURNS, phi))).max() < 1e-4


@pytest.mark.parametrize("target", ["cpu", "cpu-portable"])
def test_onnx_runtime_equals_whole_sequences(bundles, weights, target):
    rows = rows_of(weights, TURNS)
    with runtime.load(bundles(target).path) as session:
        reader = GroupReader(Chain(session.bundle.manifest.plan, session.executor))
        found = through(reader, rows.numpy(), TURNS)
    assert error(found, wanted(weights, rows, Grouped(TURNS))).max() < 1e-4


@pytest.mark.parametrize("mistake", ["by_id", "blind", "early", "together"])
def test_planted_mistakes_are_noticed(path, weights, mistake):
    rows = rows_of(weights, TURNS)
    found = through(torch_reader(path, weights), rows, TURNS)
    assert error(found, wanted(weights, rows, Grouped(TURNS, 0, (mistake,)))).max() > 1e-2


def test_a_later_read_changes_nothing_before_it(path, weights):
    reader, rows = torch_reader(path, weights), rows_of(weights, TURNS)
    reader.read(rows[None, :9])
    reader.write(rows[None, 9:12])
    before = [(key.clone(), value.clone()) for key, value in reader.chain.executor.caches[0]]
    reader.read(rows[None, 12:40])
    for held, now in zip(before, reader.chain.executor.caches[0], strict=True):
        for old, new in zip(held, now, strict=True):
            assert torch.equal(old, new[:, :, : old.shape[2]])
    assert (reader.source, reader.target) == (37, 3)
    order = reader.chain.slots[0].order[0]
    assert order[:9].max() < order[12:40].min()
    assert order[12:40].max() < order[9:12].min()


def test_reading_ahead_is_the_wait_k_mask(path, weights):
    source, target = [6, 4, 5, 3, 4, 2], [3, 2, 4, 1, 2]
    sees = wait_k(source, target, 3)
    assert sees == [15, 15, 18, 18, 22, 22, 22, 22, 24, 24, 24, 24]
    turns = ""
    for count in sees:
        turns += "r" * (count - turns.count("r")) + "w"
    rows = rows_of(weights, turns)
    found = through(torch_reader(path, weights), rows, turns)
    # All of the source first, then the target, under the mask of training.
    first = [at for at, turn in enumerate(turns) if turn == "r"]
    order = [*first, *(at for at, turn in enumerate(turns) if turn == "w")]
    mask = torch.ones(len(turns), len(turns)).tril().bool()
    for row, count in enumerate(sees):
        mask[len(first) + row, count : len(first)] = False
    positions = torch.cat((torch.arange(len(first)), torch.arange(len(sees))))
    config = text_dict(toy.make_config(layers=LAYERS, kv_heads=2))
    want = forward(weights, config, rows[order], positions, mask)[len(first) :].numpy()
    assert error(found, want).max() < 1e-4
    mask[len(first) + 2, 15:18] = False  # as if not shifted by a row
    want = forward(weights, config, rows[order], positions, mask)[len(first) :].numpy()
    assert error(found, want)[2] > 1e-2


def test_rows_are_taken_back_once(path, weights):
    reader, rows = torch_reader(path, weights), rows_of(weights, TURNS)
    reader.read(rows[None, :5])
    first = reader.write(rows[None, 5:8])
    reader.take_back(2)
    assert np.allclose(reader.write(rows[None, 6:8]), first[:, 1:], atol=1e-5)
    reader.read(rows[None, 8:9])
    with pytest.raises(CapacityError, match="are not the target's"):
        reader.take_back()


def test_plans_that_prune_are_refused(path, weights):
    plan = preset("fastv", LAYERS, VISUAL)
    with pytest.raises(PlanError, match="--plan dense"):
        GroupReader(Chain(plan, None))
    with pytest.raises(PlanError, match="phi is -1"):
        GroupReader(Chain(preset("dense", LAYERS, VISUAL), None), phi=-1)


def test_a_conversation_reads_images_and_text_and_writes(bundles, weights):
    with runtime.load(bundles("cpu").path) as session:
        session.eos = frozenset()
        conversation = runtime.Conversation(session, positions="group")
        conversation.read(picture(1))
        conversation.read("What is this?")
        said = conversation.write(max_tokens=3)
        assert said
        reader, written = conversation._reader, conversation._reader.target
        read = reader.source
        conversation.read("Look again.")
        assert reader.source > read
        assert conversation.write(max_tokens=2)
        assert reader.target == written + 2
        other = runtime.Conversation(session)
        with pytest.raises(VisistageError, match="ended by another question"):
            conversation.write()
        other.read(session.decode_image(picture(1)))
        other.read("What is this?")
        assert other.write(max_tokens=3) == said
        assert session.infer(picture(1), "What is this?", max_tokens=2).tokens
        with pytest.raises(VisistageError, match="ended by another question"):
            other.read("And now?")


def test_words_end_before_the_next_and_are_continued(bundles):
    with runtime.load(bundles("cpu").path) as session:
        session.eos = frozenset()
        whole = runtime.Conversation(session)
        whole.read("What is this?")
        text = whole.write(max_tokens=12)
        words = runtime.Conversation(session)
        words.read("What is this?")
        pieces = []
        while len("".join(pieces)) < len(text):
            pieces.append(words.write(word=True, max_tokens=12))
        assert len(pieces) > 1
        assert "".join(pieces).startswith(text)
